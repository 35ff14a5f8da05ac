"""Rows of rare regions, by multilevel splitting, also called subset simulation (doi 10.1016/S0266-8920(01)00019-4).

A row is a function of the initial noise of its numbers, which is normal, and of the stream of all other random numbers.
So rows in a region are noise and streams under a condition. A population of them is brought there over levels: the half
that is nearer to the region, by the distance of z to the ranges, replaces the other half; then every member moves by
Markov chain steps that keep the law of noise and streams and are refused where they lead farther away than the level.

The steps are those of preconditioned Crank-Nicolson (arXiv 1202.0709): the noise ε becomes √(1 − β²) ε + β ω, and one
half of the time the stream changes too. Restricted tokens are drawn first, from the network's prediction, and observed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from ... import kernels
from ...kernels import Draw, Rng
from ...model.codecs.table.column import REGULAR
from .constraints import Region

LEVELS = 60  # at most
LEVEL_MOVES, LAST_MOVES = 2, 16  # steps of a member at each level, and in the region
PER_ROW, LEAST, ALL = 2, (32, 512), 8192  # members for a row; for rows under the same conditions, of ALL in all
ACCEPTED = 0.3  # share of the steps that the size β of the steps is adapted to
NARROW = 2e-3  # a range of z that is narrower is taken as so wide, and z is drawn within the range at the end
STAGE = 1 << 20  # its seeds are far from those of other attempts


@dataclasses.dataclass
class Population:
    """Members (N,): the row whose observed cells it has, its noise (N, D), its stream, its tokens, z and distance."""

    home: np.ndarray
    noise: np.ndarray
    stream: np.ndarray
    observed: Tensor
    tokens: Tensor
    z: Tensor
    distance: np.ndarray

    def rows(self, index: np.ndarray) -> Population:
        return Population(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    def put(self, index: np.ndarray, other: Population) -> None:
        """Replace members."""
        for f in dataclasses.fields(self):
            getattr(self, f.name)[index] = getattr(other, f.name)


class Splitting:
    """Samples rows of rare regions.

    Args:
        restricted: the `Restricted` that found none by rejection.
        rows: (m,) the numbers of the rows.
    """

    def __init__(self, restricted, rows: np.ndarray):
        self.whole, self.sampler, self.rows = restricted, restricted.sampler, rows
        self.rng = np.random.default_rng([self.sampler.seed % 2**64, len(rows), STAGE])
        which = np.stack([c.which[rows] for c in restricted.all_conditions], 1)
        keys = np.concatenate([which, restricted.cells.tokens[torch.from_numpy(rows)].numpy()], 1)
        self.of_row = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)  # rows of a group: same conditions
        self.groups = int(self.of_row.max()) + 1
        members = [rows[self.of_row == g] for g in range(self.groups)]
        least = int(np.clip(ALL // self.groups, *LEAST))
        homes = [np.resize(own, max(PER_ROW * len(own), least)) for own in members]
        self.home, self.group = np.concatenate(homes), np.repeat(np.arange(self.groups), [len(h) for h in homes])
        self.conditions = [c.rows(self.home) for c in restricted.conditions]
        self.size = min(restricted.size, len(self.home))

    def sample(self) -> tuple[Tensor, Tensor]:
        """Tokens and z of the rows, on the CPU.

        Raises:
            ValueError: no member comes into the region, and the network cannot take numbers in it as observed.
        """
        members = self._first()
        limit, step = self._limits(members), np.full(self.groups, 0.7)
        for _ in range(LEVELS):
            self._replace(members, limit)
            if not limit.any():
                break
            self._move(members, limit, step, LEVEL_MOVES, np.flatnonzero(limit[self.group] > 0))
            limit = np.minimum(limit, self._limits(members))
        inside = np.bincount(self.group, members.distance == 0, self.groups) > 0
        limit[inside] = 0.0
        self._replace(members, limit)
        kept = self._kept()
        self._move(members, limit, step, LAST_MOVES, kept[inside[self.of_row]])
        self._observe_inside(members, kept[~inside[self.of_row]])
        self._settle(members, kept)
        return members.tokens[kept], members.z[kept]

    def _kept(self) -> np.ndarray:
        """(m,) the member that a row gets: the first ones of its group, one each."""
        order = np.argsort(self.of_row, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order)) - np.searchsorted(self.of_row[order], self.of_row[order])
        return np.searchsorted(self.group, self.of_row) + place

    def _first(self) -> Population:
        """Independent members, each with tokens that are drawn among the allowed ones."""
        n, d = len(self.home), len(self.whole.codec.numerical)
        observed, weights = self._draw_tokens()
        if weights.std() > 0:
            for g in range(self.groups):
                own = np.flatnonzero(self.group == g)
                p = np.exp(weights[own] - weights[own].max())
                observed[own] = observed[own[self.rng.choice(len(own), len(own), p=p / p.sum())]]
        self.drawn = observed  # equally probable ones
        noise, stream = self.rng.standard_normal((n, d)), self.rng.integers(2**32, size=n)
        return self._made(np.arange(n), self.home, noise, stream, observed)

    @torch.no_grad()
    def _draw_tokens(self) -> tuple[Tensor, np.ndarray]:
        """(tokens (N, C), the given ones and those of restricted columns; log probabilities (N,) of the allowed)."""
        n, sampler, codec = len(self.home), self.sampler, self.whole.codec
        cells = self.whole.cells.rows(torch.from_numpy(self.home))
        weights = np.zeros(n)
        for condition in self.conditions:
            c, _ = self.whole.columns(condition)
            for region, index in condition.parts() if c is not None else ():
                for own in np.array_split(index, -(-len(index) // self.size)):
                    rows = torch.from_numpy(own)
                    batch = Rng(sampler.seed + STAGE, rows.to(sampler.device))
                    noise = sampler.space.prior(batch).get("num")
                    logits = sampler.token_logits(cells.rows(rows).to(sampler.device), noise)[:, c, : codec.states[c]]
                    scores = logits.double().log_softmax(-1).cpu() + torch.from_numpy(region.state_shares()).log()
                    u = kernels.uniform(batch.keys(f"region {condition.name}", Draw.PRIOR), 1).double().cpu()
                    total = scores.softmax(-1).cumsum(-1)
                    drawn = (total < u * total[:, -1:]).sum(-1).clamp(max=codec.states[c] - 1)
                    weights[own] += scores.logsumexp(-1).numpy()
                    cells.tokens[rows, c] = drawn
        return cells.tokens, weights

    def _made(
        self, index: np.ndarray, home: np.ndarray, noise: np.ndarray, stream: np.ndarray, observed: Tensor
    ) -> Population:
        """The rows that noise and streams of the members `index` give."""
        cells = dataclasses.replace(self.whole.cells.rows(torch.from_numpy(home)), tokens=observed)
        uniforms = torch.from_numpy(ndtr(noise).clip(1e-15, 1 - 1e-15))
        tokens, z = self.whole.draw(cells, stream, STAGE, self.size, uniforms)
        return Population(home, noise, stream, observed, tokens, z, self._distance(index, tokens, z))

    def _distance(self, index: np.ndarray, tokens: Tensor, z: Tensor) -> np.ndarray:
        """The Euclidean distance of the z of the members `index` from their ranges."""
        square = np.zeros(len(index))
        for region, rows, d in self._numbers(index, tokens):
            own = z[rows, d].double().numpy()
            square[rows] += np.min([(own - own.clip(*span)) ** 2 for span in z_spans(region)], 0)
        return np.sqrt(square)

    def _numbers(self, index: np.ndarray, tokens: Tensor) -> Iterator[tuple[Region, np.ndarray, int]]:
        """(condition, the places in `index` of members that have a number under it, the column of z)."""
        for condition in self.conditions:
            c, d = self.whole.columns(condition)
            for region, rows in condition.rows(index).parts() if d is not None else ():
                if c is not None:
                    rows = rows[tokens[rows, c].numpy() == region.codec.state(REGULAR)]
                if len(rows) and region.spans:
                    yield region, rows, d

    def _limits(self, members: Population) -> np.ndarray:
        """(groups,) the distance that half of the members of a group do not exceed."""
        nearest = [np.sort(members.distance[self.group == g]) for g in range(self.groups)]
        return np.array([own[(len(own) - 1) // 2] for own in nearest])

    def _replace(self, members: Population, limit: np.ndarray) -> None:
        """Members beyond the limit become copies of others."""
        for g in np.unique(self.group[members.distance > limit[self.group]]):
            own = np.flatnonzero(self.group == g)
            near = members.distance[own] <= limit[g]
            if near.any():
                members.put(own[~near], members.rows(self.rng.choice(own[near], (~near).sum())))

    def _move(self, members: Population, limit: np.ndarray, step: np.ndarray, moves: int, index: np.ndarray) -> None:
        """Markov chain steps of the members `index`; adapts the sizes (groups,) of the steps."""
        if not len(index):
            return
        group, count = self.group[index], np.bincount(self.group[index], minlength=self.groups)
        for _ in range(moves):
            now, beta = members.rows(index), step[group][:, None]
            noise = np.sqrt(1 - beta**2) * now.noise + beta * self.rng.standard_normal(now.noise.shape)
            other = self.rng.integers(2**32, size=len(index))
            stream = np.where(self.rng.random(len(index)) < 0.5, other, now.stream)
            observed, swap = now.observed.clone(), self.rng.random(len(index)) < 0.25
            observed[swap] = self.drawn[self._companions(group[swap])]
            new = self._made(index, now.home, noise, stream, observed)
            good = new.distance <= limit[group]
            members.put(index[good], new.rows(np.flatnonzero(good)))
            accepted = np.bincount(group, good, self.groups) / np.maximum(count, 1)
            step[:] = np.where(count > 0, (step * np.exp(accepted - ACCEPTED)).clip(0.02, 1.0), step)

    def _companions(self, group: np.ndarray) -> np.ndarray:
        """Random members of the same groups."""
        first, last = (np.searchsorted(self.group, group, side) for side in ("left", "right"))
        return self.rng.integers(first, last)

    def _observe_inside(self, members: Population, index: np.ndarray) -> None:
        """Numbers from the training values within their ranges, observed, where no noise leads there."""
        if not len(index):
            return
        if not self.sampler.observes:
            names = ", ".join(repr(c.name) for c in self.conditions)
            raise ValueError(
                f"no row of this model satisfies the conditions on {names}: they are too rare for it; one that is "
                "fitted with conditioning_prob=0.25 or so can take numbers in these ranges as given"
            )
        now = members.rows(index)
        cells = dataclasses.replace(self.whole.cells.rows(torch.from_numpy(now.home)), tokens=now.observed)
        for region, rows, d in self._numbers(index, now.observed):
            cells.z[rows, d] = self._within(region, len(rows))
            cells.observed[rows, d] = True
        now.tokens, now.z = self.whole.draw(cells, now.stream, STAGE, self.size)
        members.put(index, now)

    def _settle(self, members: Population, index: np.ndarray) -> None:
        """Draw z anew within ranges that are so narrow that a larger one was taken."""
        for region, places, d in self._numbers(index, members.tokens[index]):
            rows = index[places]
            out = rows[~region.accepts(None, members.z[rows, d].numpy(), np.zeros(len(rows)))]
            members.z[out, d] = self._within(region, len(out))

    def _within(self, region: Region, n: int) -> Tensor:
        """z of n values within the ranges, distributed as in training."""
        low, high = np.array(region.spans).T
        share = (high - low) / (high - low).sum() if (high > low).any() else np.full(len(low), 1 / len(low))
        part = self.rng.choice(len(low), n, p=share)
        z = region.codec.quantiles.to_z(low[part] + self.rng.random(n) * (high - low)[part])
        return torch.from_numpy(z).float()


def z_spans(region: Region) -> list[tuple[float, float]]:
    """The ranges of z in a region, open at an end of the quantile curve, and none narrower than NARROW."""
    spans = []
    for ends in region.spans:
        low, high = region.codec.quantiles.to_z(np.array(ends))
        more = max(NARROW - (high - low), 0.0) / 2
        spans.append((-np.inf if ends[0] <= 0 else low - more, np.inf if ends[1] >= 1 else high + more))
    return spans
