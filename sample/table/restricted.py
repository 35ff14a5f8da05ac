"""Rows from the model's joint distribution, restricted to regions such as ranges of columns.

One restricted column that has tokens alone is drawn first, from the network's prediction. All else is sampled by
rejection, until a row fits, which is exact. Attempt t of row i is a function of (seed, i, t), and attempt 0 is the row
that is sampled without the conditions; so a condition that excludes nothing changes nothing.

Rows that are left after a number of attempts, because their region is rare, start inside it: each number from its
training values within its range, weighed by the probability that the network gives to the tokens of the row, of which
the allowed ones are drawn. Then, in turn for each restricted column, it and all free cells are drawn anew given the
other restricted ones, and the first of a few such draws that fits replaces them, which leaves the restricted
distribution as it is (blocked Gibbs sampling). This needs a network that was trained with observed numbers.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, LazyLogits, Rng
from ...model.codecs.table.column import REGULAR
from .cells import CellSampler, ObservedCells
from .where import RowConditions

ATTEMPTS = 24  # per row that is sampled, on average, before rows are started inside their region
LEAST_ATTEMPTS = 2048  # in all: fewer are not worth a start inside
ALONE = 20  # times as many attempts where the network cannot start inside a region
PARTICLES = 32  # starts of a row, of which one is kept by its weight
SWEEPS = 4  # of the Gibbs sampling
CANDIDATES, ROUNDS = 8, 2  # a step of it takes the first that fits of 8 draws, of 8 more where none does, …
SEED_STEP = 7_368_787  # seeds of attempts and sweeps are seed + SEED_STEP · stage
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
        self.conditions = [c for c in (c.open() for c in conditions) if (c.which >= 0).any()]

    def sample(self) -> tuple[Tensor, Tensor]:
        """Tokens (n, C) and z (n, C), on the CPU.

        Raises:
            ValueError: the region is too rare for a network that cannot start inside it.
        """
        if (first := self._drawn_first()) is not None:
            return self.sampler.sample_cells(first)
        tokens, z = self.sampler.sample_cells(self.cells)
        pending = np.flatnonzero(~self._fits(np.arange(len(tokens)), tokens, z, 0))
        attempts, spent, n = 1, 0, len(tokens)
        budget = max(ATTEMPTS * n, LEAST_ATTEMPTS) * (1 if self._can_start_inside else ALONE)
        least = LEAST_ATTEMPTS if self._can_start_inside else budget  # where none of these fits, further ones will not
        while len(pending) and spent < (budget if len(pending) < n else least):
            count = min(max(self._size // len(pending), 1), SLOTS - attempts % SLOTS)
            found, new_tokens, new_z = self._try(pending, attempts, count)
            tokens[pending[found]], z[pending[found]] = new_tokens, new_z
            attempts, spent = attempts + count, spent + count * len(pending)
            pending = pending[~found]
        if len(pending) and not self._can_start_inside:
            names = ", ".join(repr(c.name) for c in self.conditions)
            raise ValueError(
                f"no row in {attempts:,} attempts satisfies the conditions on {names}: they are too rare for this "
                "model; one that is fitted with conditioning_prob=0.25 or so can start inside a range"
            )
        if len(pending):
            tokens[pending], z[pending] = Inside(self, pending).sample()
        return tokens, z

    @property
    def _can_start_inside(self) -> bool:
        return "num" not in self.sampler.space or "num" in self.sampler.pipeline.net.observes

    @property
    def _size(self) -> int:
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
        tokens, z = self.draw(cells, repeated, first // SLOTS, first % SLOTS + slots)
        fits = self._fits(repeated, tokens, z, first // SLOTS, first % SLOTS + slots)
        found, best = first_of(fits.reshape(len(rows), count))
        return found, tokens[best], z[best]

    def draw(self, cells: ObservedCells, rows: np.ndarray, stage: int, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens and z given observed cells: number `slots` (m,) of the rows (m,) of a stage, in batches."""
        indices, parts, m = torch.from_numpy(numbers(rows, slots)), [], len(rows)
        sampler = dataclasses.replace(self.sampler, seed=self.sampler.seed + SEED_STEP * stage)
        for start in range(0, m, self._size):
            batch = torch.arange(start, start + self._size).clamp(max=m - 1)
            observed = cells.rows(batch).to(sampler.device)
            parts.append([x.cpu() for x in sampler.sample_batch(observed, 0, indices=indices[batch])])
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


class Inside:
    """Rows of a rare region, by starts inside it and Gibbs sampling."""

    def __init__(self, restricted: Restricted, rows: np.ndarray):
        self.whole, self.sampler, self.rows = restricted, restricted.sampler, rows
        self.base = restricted.cells.rows(torch.from_numpy(rows))
        self.conditions = restricted.conditions
        self.stage = 1 << 20  # far from those of the attempts

    def sample(self) -> tuple[Tensor, Tensor]:
        """Tokens and z of the rows, on the CPU."""
        start = self._start()
        tokens, z = self.whole.draw(start, self.rows, self.stage, np.zeros_like(self.rows))
        if len(self.conditions) == 1 and not bool(self.base.observed.any()):
            return tokens, z  # the start was drawn from the distribution itself
        for _ in range(SWEEPS):
            for condition in self.conditions:
                self.stage += 1
                tokens, z = self._renew(condition, tokens, z)
        return tokens, z

    def _renew(self, condition: RowConditions, tokens: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """A restricted column and all free cells drawn anew given the other restricted columns."""
        cells = dataclasses.replace(self.base, tokens=self.base.tokens.clone(), z=self.base.z.clone())
        cells.observed = self.base.observed.clone()
        for other in self.conditions:
            here = torch.from_numpy(other.which[self.rows] >= 0)
            c, d = self.whole.columns(other)
            if other is condition:
                continue
            if c is not None:
                cells.tokens[here, c] = tokens[here, c]
            if d is not None:
                cells.z[here, d], cells.observed[here, d] = z[here, d], True
        tokens, z, pending = tokens.clone(), z.clone(), np.arange(len(self.rows))
        for first in range(0, ROUNDS * CANDIDATES, CANDIDATES):
            repeated = np.repeat(pending, CANDIDATES)
            rows, slots = self.rows[repeated], first + np.tile(np.arange(CANDIDATES), len(pending))
            new_tokens, new_z = self.whole.draw(cells.rows(torch.from_numpy(repeated)), rows, self.stage, slots)
            fits = self.whole.holds(condition, rows, new_tokens, new_z, self.stage, slots)
            found, best = first_of(fits.reshape(len(pending), CANDIDATES))
            tokens[pending[found]], z[pending[found]] = new_tokens[best], new_z[best]
            pending = pending[~found]
            if not len(pending):
                break
        return tokens, z

    @torch.no_grad()
    def _start(self) -> ObservedCells:
        """The restricted cells, inside their regions and observed, beside those that are observed anyway."""
        m, device = len(self.rows), self.sampler.device
        parts = []
        size = max(self.whole._size // PARTICLES, 1)
        for start in range(0, m, size):
            index = torch.arange(start, min(start + size, m))
            parts.append(self._start_batch(self.rows[index.numpy()], self.base.rows(index).to(device)))
        return ObservedCells(*(torch.cat([getattr(p, f) for p in parts]).cpu() for f in ("tokens", "z", "observed")))

    def _start_batch(self, rows: np.ndarray, base: ObservedCells) -> ObservedCells:
        repeat = torch.arange(len(rows), device=base.z.device).repeat_interleave(PARTICLES)
        numbered = numbers(np.repeat(rows, PARTICLES), np.tile(np.arange(PARTICLES), len(rows)))
        rng = Rng(self.sampler.seed + SEED_STEP * self.stage, torch.from_numpy(numbered).to(base.z.device))
        given, cells = base.rows(repeat), base.rows(repeat)
        conditions = {c.name: c.rows(np.repeat(rows, PARTICLES)) for c in self.conditions}
        for condition in conditions.values():
            if self.whole.columns(condition)[0] is None:
                self._start_numbers(cells, condition, rng, torch.ones(len(cells), dtype=torch.bool))
        weights = self._start_tokens(given, cells, conditions, rng)
        u = kernels.uniform(rng.keys("start", Draw.PRIOR), 1)[:, 0].double().view(-1, PARTICLES)
        gumbel = -torch.log(-torch.log(u.clamp(1e-12, 1 - 1e-12)))
        best = (weights.view(-1, PARTICLES) + gumbel).argmax(1)
        return cells.rows(torch.arange(len(rows), device=best.device) * PARTICLES + best)

    def _start_numbers(self, cells: ObservedCells, condition: RowConditions, rng: Rng, wanted: Tensor) -> None:
        """Numbers of one column from its training values within the region, in the wanted rows."""
        d = self.whole.columns(condition)[1]
        u = kernels.uniform(rng.keys(f"start {condition.name}", Draw.PRIOR), 1)[:, 0].cpu().numpy()
        for region, rows in condition.parts():
            rows = rows[wanted.cpu().numpy()[rows]]
            if len(rows) and region.spans:
                index = torch.from_numpy(rows).to(cells.z.device)
                z = torch.from_numpy(region.codec.quantiles.to_z(at_share(region.spans, u[rows]))).float()
                cells.z[index, d], cells.observed[index, d] = z.to(cells.z.device), True

    def _start_tokens(self, given: ObservedCells, cells: ObservedCells, conditions: dict, rng: Rng) -> Tensor:
        """Draw the restricted tokens; returns (m,) log weights: the probability of the given and the allowed ones."""
        codec, weights = self.whole.codec, torch.zeros(len(cells), dtype=torch.float64, device=cells.z.device)
        if not codec.categorical:
            return weights
        mask_id = self.sampler.space["cat"].mask_id
        given_tokens = given.tokens.clone()
        for c, name in enumerate(codec.categorical):
            if name not in conditions and bool((given_tokens[:, c] == mask_id).all()):
                continue
            cells.tokens[:, c] = mask_id
        for c, name in enumerate(codec.categorical):
            known = given_tokens[:, c] != mask_id
            if name not in conditions and not bool(known.any()):
                continue
            share = self._shares(c, given_tokens[:, c], conditions.get(name), codec.states[c])
            noise = self.sampler.space.prior(rng).get("num")
            logits = self.sampler.token_logits(cells, noise)[:, c, : codec.states[c]].double()
            scores = torch.log_softmax(logits, -1) + share.log().to(logits.device)
            weights += torch.logsumexp(scores, -1)
            u = kernels.uniform(rng.keys(f"start token {name}", Draw.PRIOR), 1).double().clamp(1e-12, 1 - 1e-12)
            cumulative = torch.softmax(scores, -1).cumsum(-1)
            drawn = (cumulative < u * cumulative[:, -1:]).sum(-1).clamp(max=codec.states[c] - 1)
            here = known | (share < 1).any(-1).to(known.device)
            cells.tokens[:, c] = torch.where(here, drawn, cells.tokens[:, c])
            if name in conditions and codec.columns[name].quantiles is not None:
                regular = drawn == codec.columns[name].state(REGULAR)
                self._start_numbers(cells, conditions[name], rng, regular)
        return weights

    def _shares(self, c: int, given: Tensor, condition: RowConditions | None, states: int) -> Tensor:
        """(m, K): the share of each state that is allowed; all of it where nothing is given or restricted."""
        share = torch.ones(len(given), states, dtype=torch.float64)
        known = (given < states).cpu()
        share[known] = torch.nn.functional.one_hot(given.cpu()[known], states).double()
        if condition is not None:
            for region, rows in condition.parts():
                allowed = torch.from_numpy(region.state_shares())
                share[torch.from_numpy(rows)] *= allowed
        return share


def numbers(rows: np.ndarray, slots: np.ndarray | int) -> np.ndarray:
    """Addresses of the random numbers of rows and slots."""
    return (np.asarray(slots, dtype=np.int64) << ROW_BITS) | (np.asarray(rows, dtype=np.int64) % (1 << ROW_BITS))


def first_of(fits: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """(whether any of the candidates (m, K) fits, the flat indices of the first ones that do)."""
    found = fits.any(1)
    return found, torch.from_numpy(np.flatnonzero(found) * fits.shape[1] + fits.argmax(1)[found])


def at_share(spans: list[tuple[float, float]], u: np.ndarray) -> np.ndarray:
    """Points of the parts of the quantile curve, u (N,) of the way through all of them."""
    sizes = np.array([high - low for low, high in spans])
    if sizes.sum() == 0:
        return np.full(len(u), spans[0][0])
    ends = np.cumsum(sizes) / sizes.sum()
    part = np.minimum(np.searchsorted(ends, u), len(spans) - 1)
    low, high = np.array(spans).T
    before = np.concatenate([[0.0], ends[:-1]])[part]
    inside = (u - before) * sizes.sum() / np.maximum(sizes[part], 1e-300)
    return low[part] + inside.clip(0.0, 1.0) * (high - low)[part]
