"""Which rows a batch holds: a function of (seed, step) alone, so a resumed run sees what one never stopped saw."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def batch_rows(n: int, seed: int, step: int, rows: range, size: int) -> Tensor:
    """Indices below n of rows `rows` of batch number `step` of `size`.

    Without replacement within an epoch, reshuffled each; a batch may span epochs.
    """
    order = torch.arange(rows.start, rows.stop) + step * size
    epochs = order // n
    index = torch.empty_like(order)
    for epoch in epochs.unique().tolist():
        now = epochs == epoch
        index[now] = _permutation(n, seed, epoch)[order[now] % n]
    return index


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))
