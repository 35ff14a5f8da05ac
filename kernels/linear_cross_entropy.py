"""`linear_cross_entropy`: cross-entropy of a linear head without a (rows, K) tensor, forward and backward.

The head is taken a slice of states at a time: a matmul by the vendor's library fills one buffer of about CHUNK_BYTES,
one kernel folds it into each row's log-sum-exp. Backward makes the slice again, turns it into its gradient in place and
multiplies it out, so any per-row upstream gradient (row weights, means over parts) works and nothing is kept but the
log-sum-exps. A slice's weight gradient is complete at once; only the hidden gradient is added up, in float32 and in a
fixed order, so results are deterministic. Left-out rows (target −1) are not copied away: they cost their share of the
matmul and nothing else.

Floor: 2 N K D FLOPs forward and 4 N K D backward; making the logits again costs another 2 N K D.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    block_size,
    check,
    check_device,
    check_floating,
    check_shape,
    check_tokens,
    custom_op,
    jit,
    matmul_dtype,
    tl,
    use_triton,
    warps,
)
from .tiles import measured

CHUNK_BYTES = 2**27
BLOCK = 2048


@jit
def _fold_kernel(p_logits, p_target, p_lse, p_picked, first, width, BLOCK: tl.constexpr):
    """Adds states first … first + width − 1 to the running log-sum-exp of a row and notes its target's logit."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * width
    lse = tl.load(p_lse + i_row)
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_logits = tl.load(p_row + o, mask=o < width, other=float("-inf")).to(tl.float32)
        # finite, so that a row of −∞ so far does not become −∞ − (−∞)
        top = tl.maximum(tl.maximum(tl.max(b_logits, 0), lse), -1e38)
        lse = top + tl.log(tl.exp(lse - top) + tl.sum(tl.exp(b_logits - top), 0))
    tl.store(p_lse + i_row, lse)
    column = tl.load(p_target + i_row) - first
    if (column >= 0) & (column < width):
        tl.store(p_picked + i_row, tl.load(p_row + column).to(tl.float32))


@jit
def _gradient_kernel(p_logits, p_target, p_lse, p_grad, first, width, z_loss, BLOCK: tl.constexpr):
    """LazyLogits → gradient of the logits in place: g [softmax (1 + 2 z lse) − onehot]; 0 in left-out rows."""
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
    """(first, width) of each slice of states."""
    chunk = measured("linear_cross_entropy", hidden.shape[1], hidden.dtype).get("chunk_bytes", CHUNK_BYTES)
    step = chunk // (max(1, len(hidden)) * hidden.element_size()) // 128 * 128
    step = max(128, step)
    return [(first, min(step, len(weight) - first)) for first in range(0, len(weight), step)]


def slice_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, first: int, width: int) -> Tensor:
    """hidden · weightᵀ + bias of one slice, (N, width) at the start of `buffer`."""
    out = buffer[: len(hidden) * width].view(len(hidden), width)
    part = weight[first : first + width].t()
    if bias is None:
        return torch.mm(hidden, part, out=out)
    return torch.addmm(bias[first : first + width], hidden, part, out=out)


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a · b kept in float32; only CUDA multiplies half-precision operands into a float32 result."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def launch_forward(hidden, weight, bias, target, z_loss: float) -> tuple[Tensor, Tensor]:
    n, parts = len(hidden), slices(hidden, weight)
    lse = torch.full((n,), -torch.inf, device=hidden.device)
    picked = torch.zeros(n, device=hidden.device)
    buffer = hidden.new_empty(n * parts[0][1])
    for first, width in parts if n else []:
        logits = slice_logits(hidden, weight, bias, buffer, first, width)
        block = block_size(width, BLOCK)
        _fold_kernel[(n,)](logits, target, lse, picked, first, width, BLOCK=block, num_warps=warps(block))
    return torch.where(target < 0, 0.0, lse - picked + z_loss * lse.square()), lse


def launch_backward(grad, hidden, weight, bias, target, lse, z_loss: float, needs: list[bool]):
    """Gradients of hidden, weight and bias; an empty tensor for each that `needs` does not ask for."""
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
            _gradient_kernel[(n,)](logits, target, lse, grad, first, width, z_loss, BLOCK=block, num_warps=warps(block))
        if needs_hidden:
            grad_hidden += matmul_float32(logits, weight[first : first + width])
        if needs_weight:
            torch.mm(logits.t(), hidden, out=grad_weight[first : first + width])
        if needs_bias:
            grad_bias[first : first + width] = logits.sum(0, dtype=torch.float32)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


@custom_op("linear_cross_entropy")
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    return launch_forward(hidden, weight, bias, target, z_loss)


@_forward.register_fake
def _(hidden, weight, bias, target, z_loss):
    rows = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows)


@custom_op("linear_cross_entropy_backward")
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    z_loss: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad, hidden, weight, bias, target, lse, z_loss, needs)


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

    hidden (N, D), weight (K, D), bias (K,) or None, target (N,) int64 in [−1, K); a row of target −1 is left out: its
    loss and gradients are zero. Row weights are the caller's factor on the result.
    """
    check(hidden.ndim == 2, "hidden", f"must be (N, D), got {tuple(hidden.shape)}")
    fits = weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[1]
    check(fits, "weight", f"must be (K, {hidden.shape[1]}) with K > 0, got {tuple(weight.shape)}")
    check_shape("bias", bias, weight.shape[:1])
    check_shape("target", target, hidden.shape[:1])
    check_floating(hidden=hidden, weight=weight, bias=bias)
    check_device(hidden.device, weight=weight, bias=bias, target=target)
    check_tokens("target", target, -1, len(weight) - 1)
    hidden, weight, bias = matmul_dtype(hidden=hidden, weight=weight, bias=bias)
    if use_triton(backend, hidden, hidden=hidden):
        return _forward(hidden.contiguous(), weight.contiguous(), bias, target.contiguous(), z_loss)[0]
    return reference.linear_cross_entropy(hidden, weight, bias, target, z_loss)
