"""`linear_cross_entropy`: cross-entropy of a linear head without a (rows, K) tensor, forward and backward.

The logits are computed one slice of states at a time: cuBLAS writes a slice into a buffer of about CHUNK_BYTES, and a
kernel updates the log-sum-exp of each row. Only the log-sum-exps are kept. The backward pass recomputes each slice,
replaces it by its gradient in place and multiplies that with the head and with the hidden states; it accepts any
upstream gradient per row. The gradient of the hidden states is accumulated in float32 inside the products, in a fixed
order, so that results are deterministic. Ignored rows (target −1) stay in the matmuls.

Floor: 2 N K D FLOPs forward and 4 N K D backward. Recomputing the logits costs another 2 N K D;
`linear_cross_entropy_sum` does without.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    cast_for_matmul,
    check,
    check_device,
    check_floating,
    check_shape,
    check_tokens,
    custom_op,
    use_triton,
)
from .logit_slices import add_product, aligned, fold, gradient, multiple, slice_logits, spans
from .tiles import measured

CHUNK_BYTES = 2**28


def slices(hidden: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    """(first, width) of each slice of states."""
    chunk = measured("linear_cross_entropy", hidden.shape[1], hidden.dtype).get("chunk_bytes", CHUNK_BYTES)
    return spans(len(weight), multiple(chunk // (max(1, len(hidden)) * hidden.element_size())))


def part(value: Tensor | None, first: int, size: int) -> Tensor | None:
    return None if value is None else value[first : first + size]


def slice_buffer(hidden: Tensor, parts: list[tuple[int, int]]) -> Tensor:
    """Memory for the largest slice of logits."""
    return hidden.new_empty(len(hidden) * aligned(max(width for _, width in parts)))


def row_losses(lse: Tensor, picked: Tensor, target: Tensor, z_loss: float) -> Tensor:
    """(N,) losses; 0 in ignored rows."""
    return torch.where(target < 0, 0.0, lse - picked + z_loss * lse.square())


def launch_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and log-sum-exps (N,)."""
    parts = slices(hidden, weight)
    lse = torch.full(target.shape, -torch.inf, device=hidden.device)
    picked, buffer = torch.zeros_like(lse), slice_buffer(hidden, parts)
    for first, width in parts:
        logits = slice_logits(hidden, weight[first : first + width], part(bias, first, width), buffer)
        fold(logits, target, lse, picked, first)
    return row_losses(lse, picked, target, z_loss), lse


def launch_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    z_loss: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor where `needs` is False."""
    parts = slices(hidden, weight)
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.empty(hidden.shape if needs_hidden else 0, device=hidden.device)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    grad_bias = weight.new_empty(len(weight) if needs_bias else 0)
    buffer, grad = slice_buffer(hidden, parts), grad.contiguous()
    for first, width in parts:
        states = weight[first : first + width]
        logits = slice_logits(hidden, states, part(bias, first, width), buffer)
        sums = gradient(logits, target, lse, grad, first, z_loss, needs_bias)
        if needs_hidden:
            add_product(grad_hidden, logits, states, beta=0.0 if first == 0 else 1.0)
        if needs_weight:
            torch.mm(logits.t(), hidden, out=grad_weight[first : first + width])
        if sums is not None:
            grad_bias[first : first + width] = sums
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


_forward = custom_op("linear_cross_entropy", launch_forward)
_backward = custom_op("linear_cross_entropy_backward", launch_backward)


@_forward.register_fake
def _(hidden, weight, bias, target, z_loss):
    rows = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows)


@_backward.register_fake
def _(grad, hidden, weight, bias, target, lse, z_loss, needs):
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _setup(ctx, inputs, output):
    hidden, weight, bias, target, ctx.z_loss = inputs
    ctx.save_for_backward(hidden, weight, bias, target, output[1])


def _autograd(ctx, grad, _):
    needs = list(ctx.needs_input_grad[:3])
    grads = _backward(grad, *ctx.saved_tensors, ctx.z_loss, needs)
    return *(value if needed else None for value, needed in zip(grads, needs, strict=True)), None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    check(hidden.ndim == 2, "hidden", f"must be (N, D), got {tuple(hidden.shape)}")
    fits = weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[1]
    check(fits, "weight", f"must be (K, {hidden.shape[1]}) with K > 0, got {tuple(weight.shape)}")
    check_shape("bias", bias, weight.shape[:1])
    check_shape("target", target, hidden.shape[:1])
    check_floating(hidden=hidden, weight=weight, bias=bias)
    check_device(hidden.device, weight=weight, bias=bias, target=target)
    check_tokens("target", target, -1, len(weight) - 1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """(N,) float32: −log softmax(hidden weightᵀ + bias)[target] + z_loss · lse².

    hidden (N, D), weight (K, D), bias (K,) or None, target (N,) int64 in [−1, K). Rows with target −1 are ignored:
    their loss and gradients are zero.
    """
    check_head(hidden, weight, bias, target)
    hidden, weight, bias = cast_for_matmul(hidden=hidden, weight=weight, bias=bias)
    if use_triton(backend, hidden, hidden=hidden):
        return _forward(hidden.contiguous(), weight.contiguous(), bias, target.contiguous(), z_loss)[0]
    return reference.linear_cross_entropy(hidden, weight, bias, target, z_loss)
