"""`Packing`: where the attended keys of a joint sequence lie when they are packed, one sample after another.

Variable-length attention gets all queries, because the network computes masked positions too, and only the attended
keys and values. A network makes the packing of its key mask once per evaluation (`kernels.pack_keys`); in every block
`kernels.qk_norm_pack` then writes keys and values straight to their packed rows, and its backward pass reads their
gradients there. The packing is a permutation of the B·L rows: buffers keep their size, and no number is read back from
the GPU. The rows of positions that are not attended to follow those of the attended ones and hold zeros; kernels leave
their gradients unwritten, so these are never read.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """The rows of B samples of L positions in the packed keys and values, and where each sample begins.

    rows: (B, L) int32, a permutation of the B·L rows; cu_q, cu_k: (B + 1) int32, cumulative numbers of queries and of
    attended keys. The last of `cu_k` is the number of attended keys of all samples.
    """

    rows: Tensor
    cu_q: Tensor
    cu_k: Tensor

    @staticmethod
    def of(key_mask: Tensor, queries: int | None = None) -> "Packing":
        """The packing of a key mask (B, L), True where keys are attended to, for `queries` queries a sample, or L."""
        batch, length = key_mask.shape
        queries = length if queries is None else queries
        up_to = key_mask.flatten().cumsum(0, dtype=torch.int32).view(batch, length)  # attended keys up to each position
        positions = torch.arange(batch * length, dtype=torch.int32, device=key_mask.device).view(batch, length)
        rows = torch.where(key_mask, up_to - 1, up_to[-1, -1] + positions - up_to)
        cu_q = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=key_mask.device)
        return Packing(rows, cu_q, torch.nn.functional.pad(up_to[:, -1], (1, 0)))

    def attended(self) -> Tensor:
        """(B, L) bool: the key mask."""
        return self.rows < self.cu_k[-1]

    def pack(self, x: Tensor) -> Tensor:
        """Keys or values (B, L, …) at their packed rows, with zeros in the rows of positions that are not attended to.

        The result has the shape of x; its dimensions B and L together are the packed rows.
        """
        return _Pack.apply(x, self.rows, self.attended())

    def unpack(self, x: Tensor) -> Tensor:
        """Packed keys or values at their positions, (B, L, …), with zeros where nothing is attended to."""
        return _take(x, self.rows, self.attended())


def _take(x: Tensor, rows: Tensor, attended: Tensor) -> Tensor:
    found = x.flatten(0, 1)[rows.flatten()].view(x.shape)
    return torch.where(attended.view(*attended.shape, *[1] * (x.ndim - 2)), found, 0.0)


class _Pack(torch.autograd.Function):
    """Rows are stored where they belong; their gradients are read there. Autograd's own formulas would add up rows."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, attended: Tensor) -> Tensor:
        ctx.save_for_backward(rows, attended)
        shown = torch.where(attended.view(*attended.shape, *[1] * (x.ndim - 2)), x, 0.0)
        packed = torch.empty_like(shown, memory_format=torch.contiguous_format)
        packed.flatten(0, 1).index_put_((rows.flatten(),), shown.flatten(0, 1))
        return packed

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _take(grad, *ctx.saved_tensors), None, None
