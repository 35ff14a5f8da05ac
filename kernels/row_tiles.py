"""What the operations on rows of a (B, L, D) tensor share: layer norm inside a kernel, tiles, and sums over positions.

In a forward pass a program covers the rows of one tile. In a backward pass it covers a run of consecutive rows of one
sample and adds up what the gradients of (B, D) vectors need. The sums of the runs are then added in a fixed order, so
that results are deterministic.
"""

import torch
from torch import Tensor

from .backend import jit, tl, triton
from .tiles import measured

TILE = 1024  # elements of a tile of several narrow rows
WIDE = 256  # rows of at least this width are tiles of their own, with a barrier or two for each sum over a row
PER_THREAD = 4  # elements of a thread; a backward pass then has 64 registers
PROGRAMS = 512  # of a backward pass; 132 SMs hold 528 programs of 8 warps with 64 registers


@jit
def normalized(b_x, m_d, width, eps):
    """(rows, D) float32 (x − mean)/std, and mean and 1/std (rows,), of b_x, which is 0 where m_d is False."""
    mean = tl.sum(b_x, 1) / width
    b_centered = tl.where(m_d[None, :], b_x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_centered * b_centered, 1) / width + eps)
    return b_centered * rstd[:, None], mean, rstd


@jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@jit
def normalized_gradient(b_grad, b_normed, rstd, width):
    """Gradient of x from that of (x − mean)/std; both means over a row in one reduction."""
    total, slope = tl.reduce((b_grad, b_grad * b_normed), 1, add_pairs)
    return (b_grad - (total / width)[:, None] - b_normed * (slope / width)[:, None]) * rstd[:, None]


def tile(op: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows, features and warps of a tile. Entries of `tiles.json` override the defaults."""
    block = triton.next_power_of_2(width)
    rows = 1 if block >= WIDE else min(64, max(1, TILE // block))
    warps = min(16, max(1, rows * block // (32 * PER_THREAD)))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps} | measured(op, width, dtype)


def backward_tile(op: str, width: int, dtype: torch.dtype, batch: int, length: int) -> tuple[dict[str, int], int]:
    """The tile of a backward kernel and the rows per run: whole tiles, for about PROGRAMS programs in total."""
    shape = tile(op, width, dtype)
    programs, rows = shape.pop("programs", PROGRAMS), shape["ROWS"]
    runs = max(1, min(triton.cdiv(length, rows), programs // max(1, batch)))
    return shape, max(1, triton.cdiv(triton.cdiv(length, runs), rows)) * rows


def run_sums(n: int, x: Tensor, run: int) -> Tensor:
    """(n, B, runs, D) float32, not initialized: a backward kernel writes every run's sums."""
    batch, length, width = x.shape
    return torch.empty(n, batch, triton.cdiv(length, run), width, dtype=torch.float32, device=x.device)
