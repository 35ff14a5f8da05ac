"""Encoded table rows on a device, cut into batches that are a function of (seed, step) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, Rng
from .epochs import batch_rows


class TableData:
    """Tokens (N, C) of the categorical and normal scores z (N, D) of the numerical columns of a table.

    A group without columns is left out of the batches. A NaN in z marks a cell without a number (its token says why);
    such a cell gets fresh standard normal noise in every batch, so its noised values carry no information.
    """

    def __init__(self, tokens: Tensor, z: Tensor, device: torch.device | str = "cpu"):
        fits_int16 = tokens.numel() == 0 or int(tokens.max()) < 2**15
        self.tokens = tokens.to(device, torch.int16 if fits_int16 else torch.int32)
        self.z = z.to(device)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size`, see `batch_rows`."""
        index = batch_rows(len(self), seed, step, rows, size).to(self.tokens.device)
        return self.at(index, torch.arange(rows.start, rows.stop, device=index.device), seed, step)

    def at(self, index: Tensor, samples: Tensor, seed: int, step: int | Tensor) -> dict[str, Tensor]:
        """The table rows `index`; `samples` are their positions within batch `step`, which key the noise."""
        batch = {}
        if self.z.shape[1]:
            z = self.z[index]
            keys = Rng(seed, samples, step).keys("fill", Draw.DATA)
            batch["num"] = torch.where(z.isnan(), kernels.normal(keys, z.shape[1]), z)
        if self.tokens.shape[1]:
            batch["cat"] = self.tokens[index].long()
        return batch
