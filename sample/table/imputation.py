"""The best single value for a missing cell: the mean of a number, the most probable category, and their uncertainty.

Averaging draws adds their variance: with 20 draws the squared error grows by a twentieth of the conditional variance,
and the mode of a few draws is worse still. So nothing is drawn where the network gives the distribution itself: with
all unobserved cells at pure noise, one evaluation predicts the probability of every token given the observed cells.
Only z is drawn, because the mean of a value is not the value of the mean z. The initial noise of the draws of a cell
is stratified (a Latin hypercube over draws), which the probability-flow ODE maps to means of low variance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, LazyLogits, Rng
from ...model.codecs.table.column import RARE, REGULAR, ColumnCodec
from .incomplete import Incomplete
from .rows import DRAW_SEED, ObservedCells, TableSampler

AVERAGED_EVALUATIONS = 4  # noise samples that token probabilities are averaged over, at most


@dataclasses.dataclass
class Draws:
    """Sums over the draws of one column, (n,) each: the number of regular values, the values and their squares."""

    count: np.ndarray
    total: np.ndarray
    square: np.ndarray

    @classmethod
    def none(cls, n: int) -> Draws:
        return cls(np.zeros(n), np.zeros(n), np.zeros(n))

    def add(self, rows: np.ndarray, values: np.ndarray, regular: np.ndarray) -> None:
        self.count[rows] += np.where(regular, 1.0, 0.0)
        self.total[rows] += np.where(regular, values, 0.0)
        self.square[rows] += np.where(regular, values**2, 0.0)


@torch.no_grad()
def expected(sampler: TableSampler, given: Incomplete, draws: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table with its missing cells filled, and the uncertainty of what was filled.

    Args:
        draws: of z, and evaluations over which token probabilities are averaged (at most AVERAGED_EVALUATIONS).

    Returns:
        (filled table, a table of the same shape with standard deviations of numbers and probabilities of any other
        category; NaN where nothing was filled).
    """
    rows, empty = given.rows, given.empty
    new: dict[str, pd.Series] = {}
    uncertainty = pd.DataFrame(float("nan"), index=given.table.index, columns=given.table.columns)
    if len(rows):
        missing = empty.iloc[rows].reset_index(drop=True)
        cells = sampler.observed_cells(given.known).rows(torch.from_numpy(rows))
        probabilities = _token_probabilities(sampler, cells, missing, draws)
        numbers = _draw_numbers(sampler, cells, missing, draws)
        for name, column in sampler.codec.columns.items():
            here = missing[name].to_numpy()
            if not here.any():
                continue
            values, spread = _fill_column(column, probabilities.get(name), numbers.get(name), here)
            new[name] = values.set_axis(rows[here])
            uncertainty.loc[rows[here], name] = spread
    return given.filled(new), uncertainty.set_axis(given.index)


def _fill_column(
    column: ColumnCodec, probabilities: np.ndarray | None, draws: Draws | None, here: np.ndarray
) -> tuple[pd.Series, np.ndarray | float]:
    """(values, uncertainty) of the cells of a column where `here` (n,) is True; probabilities are theirs, (·, K)."""
    if column.column.kind in ("constant", "identifier"):
        return column.decode(None, None, int(here.sum()), None), float("nan")
    if column.is_numerical:
        return _mean(column, probabilities, draws, here)
    return _mode(column, probabilities)


def _token_probabilities(
    sampler: TableSampler, cells: ObservedCells, missing: pd.DataFrame, draws: int
) -> dict[str, np.ndarray]:
    """{categorical column: (its missing cells, K)}, averaged over noise samples for z."""
    codec, count = sampler.codec, min(AVERAGED_EVALUATIONS, draws)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in codec.categorical}
    for start, batch in _batches(sampler, cells) if parts else ():
        strata = _strata(sampler, batch, start, draws)
        total = sum(_predict_tokens(sampler, batch, _uniforms(strata, d, draws)) for d in range(count))
        for c, (name, size) in enumerate(zip(codec.categorical, codec.states, strict=True)):
            here = np.flatnonzero(missing[name][start : start + len(batch)])
            parts[name].append((total[here, c, :size] / count).cpu().numpy())  # of many states, those alone are kept
    return {name: np.concatenate(own) for name, own in parts.items()}


def _draw_numbers(sampler: TableSampler, cells: ObservedCells, missing: pd.DataFrame, draws: int) -> dict[str, Draws]:
    """{numerical column: its draws}, of the rows in which a numerical cell is missing."""
    codec, allowed = sampler.codec, sampler.present_states()
    numbers = {name: Draws.none(len(cells)) for name in codec.numerical}
    needed = np.flatnonzero(missing[codec.numerical].to_numpy().any(1))
    if not len(needed):
        return numbers
    for start, batch in _batches(sampler, cells.rows(torch.from_numpy(needed))):
        strata, rows = _strata(sampler, batch, start, draws), needed[start : start + len(batch)]
        for d in range(draws):
            drawn = dataclasses.replace(sampler, seed=sampler.seed + DRAW_SEED * d).sample_batch(
                batch, start, allowed, _uniforms(strata, d, draws)
            )
            tokens, z = (x.cpu().numpy()[: len(rows)] for x in drawn)
            for c, name in enumerate(codec.numerical):
                column, regular = codec.columns[name], np.ones(len(rows), dtype=bool)
                if column.states:
                    regular = tokens[:, codec.categorical.index(name)] == column.state(REGULAR)
                numbers[name].add(rows, column.quantiles.decode(z[:, c]), regular)
    return numbers


def _batches(sampler: TableSampler, cells: ObservedCells) -> Iterator[tuple[int, ObservedCells]]:
    """(first row, cells on the device) of batches of one size; the last row is repeated to fill the last batch."""
    n = len(cells)
    size = sampler.batch_rows(n)
    for start in range(0, n, size):
        yield start, cells.rows(torch.arange(start, start + size).clamp(max=n - 1)).to(sampler.device)


def _strata(sampler: TableSampler, cells: ObservedCells, start: int, draws: int) -> Tensor:
    """(n, C, draws + 1): the stratum of every draw of a cell, and last its offset within the stratum."""
    n, columns = cells.z.shape
    keys = Rng.for_batch(sampler.seed, n, start, cells.z.device).keys("strata", Draw.PRIOR)
    u = kernels.uniform(keys, max(columns * (draws + 1), 1))[:, : columns * (draws + 1)].view(n, columns, draws + 1)
    return torch.cat([u[..., :draws].argsort(-1).float(), u[..., draws:]], -1)


def _uniforms(strata: Tensor, draw: int, draws: int) -> Tensor:
    """(n, C) float64 uniform numbers of one draw, stratified over the draws of a cell."""
    u = (strata[..., draw].double() + strata[..., -1].double()) / draws
    return u.clamp(1e-9, 1 - 1e-9)


def _predict_tokens(sampler: TableSampler, cells: ObservedCells, uniforms: Tensor) -> Tensor:
    """(n, C, K) probabilities of the tokens, predicted with all unobserved cells at pure noise."""
    noise = torch.special.ndtri(uniforms).float() if "num" in sampler.space else None
    logits = LazyLogits(sampler.token_logits(cells, noise)).restrict(sampler.present_states()["cat"].to(cells.z.device))
    return logits.values()[..., : sampler.space["cat"].states].float().softmax(-1)


def _mean(
    column: ColumnCodec, probabilities: np.ndarray | None, draws: Draws, here: np.ndarray
) -> tuple[pd.Series, np.ndarray]:
    """Mean and standard deviation of a numerical column's missing cells.

    The distribution is a mixture: the column's single values by their probabilities, and the drawn regular values. It
    has no mean where ±∞ is possible; the value is then ±∞ if that is more probable than not, else the mean without it.
    """
    parts = []  # (probability, mean, mean square) of the components
    infinities = []  # (probability, ±∞)
    for token, value in column.value_states():
        if np.isfinite(value):
            parts.append((probabilities[:, token], value, value**2))
        else:
            infinities.append((probabilities[:, token], value))
    if column.quantiles is not None:
        regular = probabilities[:, column.state(REGULAR)] if column.states else np.ones(int(here.sum()))
        parts.append((regular, *_regular_moments(column, draws, here)))
    zero = np.zeros(int(here.sum()))
    total = np.maximum(sum((p for p, _, _ in parts), zero), 1e-30)
    mean = sum((p * value for p, value, _ in parts), zero) / total
    square = sum((p * value for p, _, value in parts), zero) / total
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    for p, value in infinities:
        mean, deviation = np.where(p > 0.5, value, mean), np.where(p > 0.5, np.nan, deviation)
    return column.from_numbers(mean), deviation


def _regular_moments(column: ColumnCodec, draws: Draws, here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of the regular values of each cell; those of the column where no draw was regular."""
    typical = column.quantiles.decode(np.random.default_rng(0).standard_normal(2000))
    count, drawn = np.maximum(draws.count[here], 1), draws.count[here] > 0
    mean = np.where(drawn, draws.total[here] / count, typical.mean())
    return mean, np.where(drawn, draws.square[here] / count, (typical**2).mean())


def _mode(column: ColumnCodec, probabilities: np.ndarray) -> tuple[pd.Series, np.ndarray]:
    """The most probable category, and the probability of all others; of pooled ones, only the most frequent counts."""
    if column.rare:
        tag, rows = max(column.rare, key=lambda pair: pair[1])
        probabilities = probabilities.copy()
        probabilities[:, column.state(RARE)] *= rows / sum(count for _, count in column.rare)
        column = dataclasses.replace(column, rare=[[tag, rows]])
    best = probabilities.argmax(1)
    return column.decode(best, None, len(best), np.random.default_rng(0)), 1.0 - probabilities.max(1)
