"""Slices of the logits of a linear head in a buffer: what the cross-entropies share.

A slice is a block of logits (rows, states) that cuBLAS writes. `fold` updates the log-sum-exp of its rows, `gradient`
replaces the logits by their gradient in place and returns its sums over rows, the gradient of the bias. Rows of the
buffer begin at multiples of 128 bytes, also where the number of states is odd, so that the products and the kernels
access 16 bytes at a time.

Floor, per logit: `fold` reads it, `gradient` reads and writes it. The sums over rows are accumulated in registers over
the rows of a program; what is written is one row of float32 in PART.
"""

import torch
from torch import Tensor

from .backend import block_size, jit, tl, triton, warps
from .tiles import measured

ALIGN = 64  # logits; the rows of a buffer begin at multiples of it
STEP = 2048  # sizes that fill the multiprocessors of a GPU and the blocks of the kernels are multiples of it
BLOCK = 1024
PART = 64  # rows of one program of the gradient


@jit
def _fold_kernel(
    p_logits,
    p_target,
    p_lse,
    p_picked,
    rows,
    first,
    width,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add states first … first + width − 1 to the running log-sum-exps; store the logits of the targets."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < rows
    p_row = p_logits + i_row * stride
    lse = tl.load(p_lse + i_row, mask=m_row, other=0.0)
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        # up to the stride, which unlike the width is a multiple of 16: masks then allow wide loads
        m = m_row[:, None] & (o < stride)[None, :]
        b_logits = tl.load(p_row[:, None] + o[None, :], mask=m, other=float("-inf")).to(tl.float32)
        b_logits = tl.where((o < width)[None, :], b_logits, float("-inf"))
        # finite, because −∞ − (−∞) is NaN
        top = tl.maximum(tl.maximum(tl.max(b_logits, 1), lse), -1e38)
        lse = top + tl.log(tl.exp(lse - top) + tl.sum(tl.exp(b_logits - top[:, None]), 1))
    tl.store(p_lse + i_row, lse, mask=m_row)
    column = tl.load(p_target + i_row, mask=m_row, other=-1) - first
    m_here = m_row & (column >= 0) & (column < width)
    tl.store(p_picked + i_row, tl.load(p_row + column, mask=m_here, other=0.0).to(tl.float32), mask=m_here)


@jit
def _gradient_kernel(
    p_logits,
    p_target,
    p_lse,
    p_grad,
    p_sums,
    rows,
    first,
    width,
    stride,
    z_loss,
    SUMS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace logits by their gradient g [softmax · (1 + 2 z lse) − onehot], 0 in ignored rows; sum it over rows."""
    i_part = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        i_row = (i_part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        target = tl.load(p_target + i_row, mask=m_row, other=-1)
        lse = tl.load(p_lse + i_row, mask=m_row, other=0.0)
        grad = tl.load(p_grad + i_row, mask=m_row, other=0.0)
        m = m_row[:, None] & (o < stride)[None, :]
        p_block = p_logits + i_row[:, None] * stride + o[None, :]
        b_logits = tl.load(p_block, mask=m, other=0.0).to(tl.float32)
        b_logits = tl.where((o < width)[None, :], b_logits, float("-inf"))  # the padding has no meaning
        b_grad = tl.exp(b_logits - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None]
        b_grad = (b_grad - tl.where(o[None, :] == (target - first)[:, None], 1.0, 0.0)) * grad[:, None]
        b_grad = tl.where((target < 0)[:, None], 0.0, b_grad)
        tl.store(p_block, b_grad, mask=m)
        if SUMS:
            b_sum += tl.sum(b_grad, 0)
    if SUMS:
        tl.store(p_sums + i_part * width + o, b_sum, mask=o < width)


def aligned(width: int) -> int:
    """The distance between rows of `width` logits in a buffer."""
    return -(-width // ALIGN) * ALIGN


def multiple(size: int) -> int:
    """The largest multiple of STEP below a size, where it holds one; otherwise of 128."""
    step = STEP if size >= STEP else 128
    return max(step, size // step * step)


def spans(size: int, step: int) -> list[tuple[int, int]]:
    """(first, size) of parts of `step`; a small rest joins the last part."""
    starts = range(0, max(1, size - step // 8), step)
    return [(first, step if first < starts[-1] else size - first) for first in starts]


def slice_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """hidden weightᵀ + bias, (rows, states), at the start of `buffer`."""
    rows, width, stride = len(hidden), len(weight), aligned(len(weight))
    out = buffer[: rows * stride].view(rows, stride)[:, :width]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def fold(logits: Tensor, target: Tensor, lse: Tensor, picked: Tensor, first: int) -> None:
    """Update log-sum-exps and picked logits (rows,) by the logits of states first, first + 1, …"""
    rows, width = logits.shape
    block = block_size(width, BLOCK)
    tile = {"ROWS": min(16, 2 * BLOCK // block), "BLOCK": block, "num_warps": 1}
    tile |= measured("linear_cross_entropy_fold", block, logits.dtype)
    _fold_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        p_logits=logits,
        p_target=target,
        p_lse=lse,
        p_picked=picked,
        rows=rows,
        first=first,
        width=width,
        stride=logits.stride(0),
        **tile,
    )


def gradient(
    logits: Tensor, target: Tensor, lse: Tensor, grad: Tensor, first: int, z_loss: float, sums: bool
) -> Tensor | None:
    """Replace logits by their gradient. Returns its sums over rows, (states,) float32 in a fixed order, if `sums`."""
    rows, width = logits.shape
    block = block_size(width, BLOCK)
    tile = {"ROWS": min(16, 4 * BLOCK // block), "BLOCK": block, "num_warps": warps(block)}
    tile |= measured("linear_cross_entropy_gradient", block, logits.dtype)
    steps = triton.cdiv(PART, tile["ROWS"])
    parts = triton.cdiv(rows, steps * tile["ROWS"])
    partial = torch.empty((parts, width) if sums else 0, device=logits.device)
    _gradient_kernel[(triton.cdiv(width, tile["BLOCK"]), parts)](
        p_logits=logits,
        p_target=target,
        p_lse=lse,
        p_grad=grad,
        p_sums=partial,
        rows=rows,
        first=first,
        width=width,
        stride=logits.stride(0),
        z_loss=z_loss,
        SUMS=sums,
        STEPS=steps,
        **tile,
    )
    return partial.sum(0) if sums else None


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: float = 1.0) -> None:
    """total ← beta · total + a · b in float32 inside the product: no tensor and no pass for the sum."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:  # only CUDA has products of half-precision operands with a float32 result
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)
