"""`linear_cross_entropy`: cross-entropy of a linear head without a (rows, K) tensor, forward and backward.

The logits are computed one slice of states at a time: cuBLAS writes a slice into a buffer of about CHUNK_BYTES, and a
kernel updates the log-sum-exp of each row. Only the log-sum-exps are kept. The backward pass recomputes each slice,
replaces it by its gradient in place and multiplies that with the head and with the hidden states; it accepts any
upstream gradient per row. The gradient of the hidden states is accumulated in float32 in a fixed order, so that results
are deterministic. Ignored rows (target −1) stay in the matmuls.

Floor: 2 N K D FLOPs forward and 4 N K D backward. Recomputing the logits costs another 2 N K D.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    block_size,
    cast_for_matmul,
    check,
    check_device,
    check_floating,
    check_shape,
    check_tokens,
    custom_op,
    jit,
    tl,
    use_triton,
    warps,
)
from .tiles import measured

CHUNK_BYTES = 2**27
BLOCK = 2048


@jit
def _fold_kernel(p_logits, p_target, p_lse, p_picked, first, width, BLOCK: tl.constexpr):
    """Add states first … first + width − 1 to the running log-sum-exp of a row; store the logit of its target."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * width
    lse = tl.load(p_lse + i_row)
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_logits = tl.load(p_row + o, mask=o < width, other=float("-inf")).to(tl.float32)
        # finite, because −∞ − (−∞) is NaN
        top = tl.maximum(tl.maximum(tl.max(b_logits, 0), lse), -1e38)
        lse = top + tl.log(tl.exp(lse - top) + tl.sum(tl.exp(b_logits - top), 0))
    tl.store(p_lse + i_row, lse)
    column = tl.load(p_target + i_row) - first
    if (column >= 0) & (column < width):
        tl.store(p_picked + i_row, tl.load(p_row + column).to(tl.float32))


@jit
def _gradient_kernel(p_logits, p_target, p_lse, p_grad, first, width, z_loss, BLOCK: tl.constexpr):
    """Replace logits by their gradient g [softmax · (1 + 2 z lse) − onehot]; 0 in ignored rows."""
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + i_row)
    lse = tl.load(p_lse + i_row)
    grad = tl.where(target < 0, 0.0, tl.load(p_grad + i_row))
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < width
        b_logits = tl.load(p_logits + i_row * width + o, mask=m, other=float("-inf")).to(tl.float32)
        b_grad = tl.exp(b_logits - lse) * (1.0 + 2.0 * z_loss * lse) - tl.where(o + first == target, 1.0, 0.0)
        tl.store(p_logits + i_row * width + o, tl.where(target < 0, 0.0, grad * b_grad), mask=m)


def slices(hidden: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    """(first, width) of each slice of states; widths are multiples of 128 except the last."""
    chunk = measured("linear_cross_entropy", hidden.shape[1], hidden.dtype).get("chunk_bytes", CHUNK_BYTES)
    step = chunk // (max(1, len(hidden)) * hidden.element_size()) // 128 * 128
    step = max(128, step)
    return [(first, min(step, len(weight) - first)) for first in range(0, len(weight), step)]


def slice_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, first: int, width: int) -> Tensor:
    """Logits (N, width) of one slice, written to the start of `buffer`."""
    out = buffer[: len(hidden) * width].view(len(hidden), width)
    part = weight[first : first + width].t()
    if bias is None:
        return torch.mm(hidden, part, out=out)
    return torch.addmm(bias[first : first + width], hidden, part, out=out)


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a · b as float32. Only CUDA supports half-precision operands with a float32 result."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def launch_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and log-sum-exps (N,)."""
    n, parts = len(hidden), slices(hidden, weight)
    lse = torch.full((n,), -torch.inf, device=hidden.device)
    picked = torch.zeros(n, device=hidden.device)
    buffer = hidden.new_empty(n * parts[0][1])
    for first, width in parts if n else []:
        logits = slice_logits(hidden, weight, bias, buffer, first, width)
        block = block_size(width, BLOCK)
        _fold_kernel[(n,)](
            p_logits=logits,
            p_target=target,
            p_lse=lse,
            p_picked=picked,
            first=first,
            width=width,
            BLOCK=block,
            num_warps=warps(block),
        )
    return torch.where(target < 0, 0.0, lse - picked + z_loss * lse.square()), lse


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
    n, parts = len(hidden), slices(hidden, weight)
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.zeros(hidden.shape if needs_hidden else 0, dtype=torch.float32, device=hidden.device)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    grad_bias = weight.new_empty(len(weight) if needs_bias else 0)
    buffer, grad = hidden.new_empty(n * parts[0][1]), grad.contiguous()
    for first, width in parts:
        logits = slice_logits(hidden, weight, bias, buffer, first, width)
        block = block_size(width, BLOCK)
        if n:
            _gradient_kernel[(n,)](
                p_logits=logits,
                p_target=target,
                p_lse=lse,
                p_grad=grad,
                first=first,
                width=width,
                z_loss=z_loss,
                BLOCK=block,
                num_warps=warps(block),
            )
        if needs_hidden:
            grad_hidden += matmul_float32(logits, weight[first : first + width])
        if needs_weight:
            torch.mm(logits.t(), hidden, out=grad_weight[first : first + width])
        if needs_bias:
            grad_bias[first : first + width] = logits.sum(0, dtype=torch.float32)
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
    check(hidden.ndim == 2, "hidden", f"must be (N, D), got {tuple(hidden.shape)}")
    fits = weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[1]
    check(fits, "weight", f"must be (K, {hidden.shape[1]}) with K > 0, got {tuple(weight.shape)}")
    check_shape("bias", bias, weight.shape[:1])
    check_shape("target", target, hidden.shape[:1])
    check_floating(hidden=hidden, weight=weight, bias=bias)
    check_device(hidden.device, weight=weight, bias=bias, target=target)
    check_tokens("target", target, -1, len(weight) - 1)
    hidden, weight, bias = cast_for_matmul(hidden=hidden, weight=weight, bias=bias)
    if use_triton(backend, hidden, hidden=hidden):
        return _forward(hidden.contiguous(), weight.contiguous(), bias, target.contiguous(), z_loss)[0]
    return reference.linear_cross_entropy(hidden, weight, bias, target, z_loss)
