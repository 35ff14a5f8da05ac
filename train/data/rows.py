"""Encoded rows of a table on the device, cut into batches that are a function of (seed, step) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, Rng
from .epochs import batch_rows


class Rows:
    """Tokens (N, C) and normal scores (N, C) of a table; groups without columns are left out of the batches.

    A score that is NaN (the cell holds no number, its token says why) is fresh noise in every batch, so that it says
    nothing and its noised values look like any others.
    """

    def __init__(self, tokens: Tensor, scores: Tensor, device: torch.device | str = "cpu"):
        small = torch.int16 if tokens.numel() == 0 or int(tokens.max()) < 2**15 else torch.int32
        self.tokens, self.scores = tokens.to(device, small), scores.to(device)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size`, see `batch_rows`."""
        index = batch_rows(len(self), seed, step, rows, size).to(self.tokens.device)
        return self.at(index, torch.arange(rows.start, rows.stop, device=index.device), seed, step)

    def at(self, index: Tensor, samples: Tensor, seed: int, step: int | Tensor) -> dict[str, Tensor]:
        """The rows `index`, which are numbers `samples` of batch `step`."""
        batch = {}
        if self.scores.shape[1]:
            scores = self.scores[index]
            keys = Rng(seed, samples, step).keys("fill", Draw.DATA)
            batch["num"] = torch.where(scores.isnan(), kernels.normal(keys, scores.shape[1]), scores)
        if self.tokens.shape[1]:
            batch["cat"] = self.tokens[index].long()
        return batch
