"""The residual stream of a transformer between two branches.

A block ends with a branch that is scaled by a gate and added to the stream, and the next one begins with a layer norm
of the sum. `Residual` carries the parts, so that one kernel adds and normalizes; the sum alone is formed where nothing
normalizes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels


class Residual(NamedTuple):
    """stream + gate·(branch + bias), not added up yet; without a branch the stream alone.

    stream, branch (B, L, D); gate (B, D); bias (D,) or None for 0.
    """

    stream: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None

    def total(self) -> Tensor:
        """(B, L, D): the sum."""
        if self.branch is None or self.gate is None:
            return self.stream
        return kernels.gated_residual(self.stream, self.branch, self.gate, self.bias)

    def leading(self, n: int | None) -> Residual:
        """The first n samples of a batch; all for None."""
        branch = None if self.branch is None else leading(self.branch, n)
        gate = None if self.gate is None else leading(self.gate, n)
        return Residual(leading(self.stream, n), branch, gate, self.bias)

    def any_batch(self) -> Residual:
        """The same, for code compiled for batches of any size."""
        branch = None if self.branch is None else any_batch(self.branch)
        gate = None if self.gate is None else any_batch(self.gate)
        return Residual(any_batch(self.stream), branch, gate, self.bias)

    def modulated(
        self, scale: Tensor, shift: Tensor, layer: nn.Linear, eps: float = 1e-5, plus_one: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The sum, and its adaLN for a linear layer (`kernels.gated_adaln`)."""
        options = eps, plus_one, matmul_dtype(layer), self.bias, hasattr(layer, "product")
        return kernels.gated_adaln(self.stream, self.branch, self.gate, scale, shift, *options)


def leading(x: Tensor, n: int | None) -> Tensor:
    """The first n samples of a batch; the tensor itself for None."""
    return x if n is None else x[:n]


def any_batch(x: Tensor) -> Tensor:
    """The tensor, marked for torch.compile: one compilation serves batches of every size above 1.

    A view is copied first, because the compiler specializes on views.
    """
    x = x if x._base is None else x.clone()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def matmul_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype that a linear layer casts its input to: that of autocast, else that of its weight."""
    device = layer.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
