"""Rows from the model's joint distribution, restricted to regions such as ranges of columns.

One restricted column that has tokens alone is drawn first, from the network's prediction. All else is sampled by
rejection, until a row fits, which is exact. Attempt t of row i is a function of (seed, i, t), and attempt 0 is the row
that is sampled without the conditions; so a condition that excludes nothing changes nothing.

Rows that are left after a number of attempts, because their region is rare, are sampled by `splitting`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, LazyLogits, Rng
from .cells import CellSampler, ObservedCells
from .splitting import Splitting
from .where import RowConditions

ATTEMPTS = 24  # per row that is sampled, on average, before the rest is sampled by splitting
LEAST_ATTEMPTS = 2048  # in all: fewer cost less than splitting
SEED_STEP = 7_368_787  # the seeds of attempts are seed + SEED_STEP · stage
SLOTS = 64  # attempts of one seed: number i of attempt s is s · 2²⁶ + i
ROW_BITS = 26


class Restricted:
    """Samples rows whose open conditions hold.

    Args:
        cells: the observed cells of the rows.
        conditions: of the rows; those that leave one value are among the observed cells.
    """

    def __init__(self, sampler: CellSampler, cells: ObservedCells, conditions: list[RowConditions]):
        self.sampler, self.cells, self.codec = sampler, cells, sampler.codec
        self.all_conditions = conditions
        self.conditions = [c for c in (c.open(sampler.observes) for c in conditions) if (c.which >= 0).any()]

    def sample(self) -> tuple[Tensor, Tensor]:
        """Tokens (n, C) and z (n, C), on the CPU.

        Raises:
            ValueError: the model makes no such rows, and its network cannot take numbers as observed.
        """
        if (first := self._drawn_first()) is not None:
            return self.sampler.sample_cells(first)
        tokens, z = self.sampler.sample_cells(self.cells)
        pending = np.flatnonzero(~self._fits(np.arange(len(tokens)), tokens, z, 0))
        attempts, spent, n = 1, 0, len(tokens)
        budget = max(ATTEMPTS * n, LEAST_ATTEMPTS)
        while len(pending) and spent < (budget if len(pending) < n else LEAST_ATTEMPTS):
            count = min(max(self.size // len(pending), 1), SLOTS - attempts % SLOTS)
            found, new_tokens, new_z = self._try(pending, attempts, count)
            tokens[pending[found]], z[pending[found]] = new_tokens, new_z
            attempts, spent = attempts + count, spent + count * len(pending)
            pending = pending[~found]
        if len(pending):
            tokens[pending], z[pending] = Splitting(self, pending).sample()
        return tokens, z

    @property
    def size(self) -> int:
        """The batch size of attempts."""
        return self.sampler.batch_rows(max(len(self.cells), 512))

    @torch.no_grad()
    def _drawn_first(self) -> ObservedCells | None:
        """The observed cells and the tokens of the only restricted column, if that has tokens alone.

        They are drawn from the network's prediction given the observed cells, among the allowed ones: exact at once.
        """
        if len(self.conditions) != 1:
            return None
        condition, (region, *more) = self.conditions[0], self.conditions[0].regions
        if more or region.codec.quantiles is not None or (condition.which < 0).any() or not region.rare.all():
            return None
        n, cells = len(self.cells), dataclasses.replace(self.cells, tokens=self.cells.tokens.clone())
        size, c, process = self.sampler.batch_rows(n), self.columns(condition)[0], self.sampler.space["cat"]
        allowed = torch.nn.functional.pad(torch.from_numpy(region.tokens), (0, process.states - len(region.tokens)))
        for start in range(0, n, size):
            index = torch.arange(start, start + size).clamp(max=n - 1)
            batch = self.cells.rows(index).to(self.sampler.device)
            rng = Rng.for_batch(self.sampler.seed, size, start, self.sampler.device)
            logits = self.sampler.token_logits(batch, self.sampler.space.prior(rng).get("num"))
            logits = LazyLogits(logits[:, c, None, : process.states].float())
            logits = logits.restrict(allowed[None].to(self.sampler.device)).values()
            masked = torch.full((size, 1), process.mask_id, device=self.sampler.device)
            rate, keys = torch.ones(size, device=self.sampler.device), rng.keys(f"range {condition.name}", Draw.STEP)
            drawn = kernels.tau_leap(logits, masked, rate, keys, process.states, "last")[:, 0].cpu()
            cells.tokens[start : start + size, c] = drawn[: min(size, n - start)]
        return cells

    def _try(self, rows: np.ndarray, first: int, count: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """(whether one of the attempts first, … of a row fits, tokens, z of the rows where one does)."""
        repeated, slots = np.repeat(rows, count), np.tile(np.arange(count), len(rows))
        cells = self.cells.rows(torch.from_numpy(repeated))
        tokens, z = self.draw(cells, numbers(repeated, first % SLOTS + slots), first // SLOTS, self.size)
        fits = self._fits(repeated, tokens, z, first // SLOTS, first % SLOTS + slots)
        found, best = first_of(fits.reshape(len(rows), count))
        return found, tokens[best], z[best]

    def draw(
        self, cells: ObservedCells, indices: np.ndarray, stage: int, size: int, z_uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and z given observed cells, of the random numbers `indices` (m,) of a stage, in batches of a size.

        z_uniforms: (m, C) float64 in (0, 1), which become the initial noise of z, see `CellSampler.sample_batch`.
        """
        parts, m, device = [], len(indices), self.sampler.device
        sampler = dataclasses.replace(self.sampler, seed=self.sampler.seed + SEED_STEP * stage)
        for start in range(0, m, size):
            batch = torch.arange(start, start + size).clamp(max=m - 1)
            noise = None if z_uniforms is None else z_uniforms[batch].to(device)
            made = sampler.sample_batch(
                cells.rows(batch).to(device), 0, z_uniforms=noise, indices=torch.from_numpy(indices)[batch]
            )
            parts.append([x.cpu() for x in made])
        tokens, z = (torch.cat(part)[:m] for part in zip(*parts, strict=True))
        return tokens, z

    def _fits(self, rows: np.ndarray, tokens: Tensor, z: Tensor, stage: int, slots: np.ndarray | int = 0) -> np.ndarray:
        """(m,) bool: whether the conditions of the rows (m,) hold."""
        good = np.ones(len(rows), dtype=bool)
        for condition in self.conditions:
            good &= self.holds(condition, rows, tokens, z, stage, slots)
        return good

    def holds(
        self, condition: RowConditions, rows: np.ndarray, tokens: Tensor, z: Tensor, stage: int, slots: np.ndarray | int
    ) -> np.ndarray:
        """(m,) bool: whether one condition of the rows (m,) holds."""
        rng = Rng(self.sampler.seed + SEED_STEP * stage, torch.from_numpy(numbers(rows, slots)))
        u = kernels.uniform(rng.keys(f"pooled {condition.name}", Draw.PRIOR), 1)[:, 0].numpy()
        c, d = self.columns(condition)
        own = None if c is None else tokens[:, c].numpy(), None if d is None else z[:, d].numpy()
        return condition.rows(rows).accepts(*own, u)

    def columns(self, condition: RowConditions) -> tuple[int | None, int | None]:
        """The number of the column among those with tokens, and among those with z."""
        categorical, numerical, name = self.codec.categorical, self.codec.numerical, condition.name
        return (
            categorical.index(name) if name in categorical else None,
            numerical.index(name) if name in numerical else None,
        )


def numbers(rows: np.ndarray, slots: np.ndarray | int) -> np.ndarray:
    """Addresses of the random numbers of rows and slots."""
    return (np.asarray(slots, dtype=np.int64) << ROW_BITS) | (np.asarray(rows, dtype=np.int64) % (1 << ROW_BITS))


def first_of(fits: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """(whether any of the candidates (m, K) fits, the flat indices of the first ones that do)."""
    found = fits.any(1)
    return found, torch.from_numpy(np.flatnonzero(found) * fits.shape[1] + fits.argmax(1)[found])
