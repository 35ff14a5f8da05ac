"""Encoded rows of a table on the device, cut into batches that are a function of (seed, step) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, Rng


class Rows:
    """Tokens (N, C) and normal scores (N, C) of a table; groups without columns are left out of the batches.

    A score that is NaN (the cell holds no number, its token says why) is fresh noise in every batch, so that it says
    nothing and its noised values look like any others.
    """

    def __init__(self, tokens: Tensor, scores: Tensor, device: torch.device | str = "cpu"):
        small = torch.int16 if tokens.numel() == 0 or int(tokens.max()) < 2**15 else torch.int32
        self.tokens, self.scores = tokens.to(device, small), scores.to(device)
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size`: without replacement within an epoch, reshuffled each."""
        order = torch.arange(rows.start, rows.stop) + step * size
        epochs = order // len(self)
        index = torch.empty_like(order)
        for epoch in epochs.unique().tolist():
            now = epochs == epoch
            index[now] = self._permutation(seed, epoch)[order[now] % len(self)]
        index = index.to(self.tokens.device)
        batch = {}
        if self.scores.shape[1]:
            scores = self.scores[index]
            keys = Rng(seed, torch.arange(rows.start, rows.stop, device=scores.device), step).keys("fill", Draw.DATA)
            batch["num"] = torch.where(scores.isnan(), kernels.normal(keys, scores.shape[1]), scores)
        if self.tokens.shape[1]:
            batch["cat"] = self.tokens[index].long()
        return batch

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            self._order = (seed, epoch), torch.randperm(len(self), generator=generator)
        return self._order[1]
