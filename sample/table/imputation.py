"""The best single fill of empty cells: the mean of a number, the likeliest value of a category, and how sure they are.

An average of draws carries their variance: with 20 draws the error grows by a fortieth, with the mode of a few draws by
more. So nothing is drawn where the network knows the distribution: with all unknown cells at pure noise, one evaluation
gives the chance of every token given the known cells. Only normal scores are drawn, because the mean of a value is not
the value of a mean score; their starting noise is stratified over the draws of a cell (a Latin hypercube), which leaves
little variance along the probability-flow ODE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, Rng
from ...model.codecs.table.codec import RARE, REGULAR, ColumnCodec
from .rows import Cells, Generator, put


@dataclasses.dataclass
class Moments:
    """Of every row: chances of the tokens {column: (n, K)}; of the drawn regular values, count, mean and mean square
    {column: (n,)}."""

    chances: dict[str, np.ndarray]
    count: dict[str, np.ndarray]
    mean: dict[str, np.ndarray]
    square: dict[str, np.ndarray]


@torch.no_grad()
def expected(generator: Generator, table: pd.DataFrame, draws: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table with its empty cells filled, and the spread of what was filled (see `TableSynthesizer.impute`).

    Args:
        draws: of normal scores, and evaluations over which chances are averaged (at most 4).
    """
    codec, cells = generator.codec, generator.cells_of(table)
    index, table = table.index, table.reset_index(drop=True)
    filled = table.copy()
    spread = pd.DataFrame(float("nan"), index=table.index, columns=table.columns)
    rows = np.flatnonzero(table.isna().to_numpy().any(1))
    if len(rows):
        holes = table.iloc[rows].isna().reset_index(drop=True)
        moments = _moments(generator, cells.rows(torch.from_numpy(rows)), holes, draws)
        for name, column in codec.columns.items():
            empty = holes[name].to_numpy()
            if not empty.any() or column.column.kind == "identifier":
                continue
            if column.column.kind == "constant":
                made, unsure = column.decode(None, None, int(empty.sum()), None), None
            elif column.numeric:
                made, unsure = _mean(column, moments, empty)
            else:
                made, unsure = _mode(column, moments.chances[name][empty])
            made.index = rows[empty]
            filled[name] = put(table[name], made)
            if unsure is not None:
                spread.loc[rows[empty], name] = unsure
    return filled.set_axis(index), spread.set_axis(index)


def _moments(generator: Generator, cells: Cells, holes: pd.DataFrame, draws: int) -> Moments:
    codec, n = generator.codec, len(cells.tokens)
    forbidden, chances = generator.never_missing(), []
    for first, part in _parts(generator, cells) if codec.tokens else ():
        strata, runs = _strata(generator, part, first, draws), range(min(4, draws))
        chances.append(sum(_chances(generator, part, _noise(strata, d, draws), forbidden) for d in runs) / len(runs))
    whole = torch.cat(chances)[:n].cpu().numpy() if chances else np.zeros((n, 0, 0))
    drawn = {name: np.zeros((3, n)) for name in codec.numbers}
    need = np.flatnonzero(holes[codec.numbers].to_numpy().any(1))
    for first, part in _parts(generator, cells.rows(torch.from_numpy(need))) if len(need) else ():
        strata, rows = _strata(generator, part, first, draws), need[first : first + len(part.tokens)]
        for d in range(draws):
            again = dataclasses.replace(generator, seed=generator.seed + 1_000_003 * d)
            made = again.fill_chunk(part, first, forbidden, _noise(strata, d, draws))
            tokens, scores = (x.cpu().numpy()[: len(rows)] for x in made)
            for c, name in enumerate(codec.numbers):
                column = codec.columns[name]
                values = column.quantiles.decode(scores[:, c])
                regular = np.ones(len(rows), dtype=bool)
                if column.states:
                    regular = tokens[:, codec.tokens.index(name)] == column.state(REGULAR)
                drawn[name][:, rows] += np.where(regular, [np.ones_like(values), values, values**2], 0.0)
    sizes = dict(zip(codec.tokens, codec.states, strict=True))
    return Moments(
        {name: whole[:, c, : sizes[name]] for c, name in enumerate(codec.tokens)},
        {name: counted for name, (counted, _, _) in drawn.items()},
        {name: total / np.maximum(counted, 1) for name, (counted, total, _) in drawn.items()},
        {name: total / np.maximum(counted, 1) for name, (counted, _, total) in drawn.items()},
    )


def _parts(generator: Generator, cells: Cells) -> Iterator[tuple[int, Cells]]:
    """(first row, cells) of chunks of one size, on the device; the last row fills up the last chunk."""
    n = len(cells.tokens)
    size = generator.batch_rows(n)
    for first in range(0, n, size):
        yield first, cells.rows(torch.arange(first, first + size).clamp(max=n - 1)).to(generator.device)


def _strata(generator: Generator, cells: Cells, first: int, draws: int) -> Tensor:
    """(n, C, draws + 1): the stratum of every draw of a cell, and last its offset within the stratum."""
    n, columns = cells.scores.shape
    keys = Rng.for_batch(generator.seed, n, first, cells.scores.device).keys("strata", Draw.PRIOR)
    u = kernels.uniform(keys, max(columns * (draws + 1), 1))[:, : columns * (draws + 1)].view(n, columns, draws + 1)
    return torch.cat([u[..., :draws].argsort(-1).float(), u[..., draws:]], -1)


def _noise(strata: Tensor, draw: int, draws: int) -> Tensor:
    """(n, C) normal numbers of one draw; over the draws of a cell they are evenly spread."""
    share = (strata[..., draw].double() + strata[..., -1].double()) / draws
    return torch.special.ndtri(share.clamp(1e-9, 1 - 1e-9)).float()


def _chances(generator: Generator, cells: Cells, noise: Tensor, forbidden: Tensor) -> Tensor:
    """(n, C, K): chances of the tokens with all that is unknown at pure noise."""
    space = generator.space
    x = {"cat": cells.tokens, **({"num": noise} if "num" in space else {})}
    t = {m: torch.ones(len(noise), dtype=torch.float64, device=noise.device) for m in space}
    out = space.evaluate(generator.net_for(cells, forbidden), x, t, ["cat"])["cat"]
    return out[..., : space["cat"].states].float().softmax(-1)


def _mean(column: ColumnCodec, moments: Moments, empty: np.ndarray) -> tuple[pd.Series, np.ndarray]:
    """Mean and standard deviation of a numerical column's empty cells."""
    name, n = column.name, int(empty.sum())
    parts = []  # (chance, mean, mean square) of every state
    if column.states:
        chances = moments.chances[name][empty]
        parts = [(chances[:, i], s[1], s[1] ** 2) for i, s in enumerate(column.states) if s[0] == "v"]
    if column.quantiles is not None:
        typical = column.quantiles.decode(np.random.default_rng(0).standard_normal(2000))
        seen = moments.count[name][empty] > 0
        mean = np.where(seen, moments.mean[name][empty], typical.mean())
        square = np.where(seen, moments.square[name][empty], (typical**2).mean())
        parts.append((chances[:, column.state(REGULAR)] if column.states else np.ones(n), mean, square))
    endless = [(chance, value) for chance, value, _ in parts if np.isscalar(value) and not np.isfinite(value)]
    parts = [part for part in parts if not (np.isscalar(part[1]) and not np.isfinite(part[1]))]
    total = np.maximum(sum((chance for chance, _, _ in parts), np.zeros(n)), 1e-30)
    mean = sum((chance * value for chance, value, _ in parts), np.zeros(n)) / total
    square = sum((chance * value for chance, _, value in parts), np.zeros(n)) / total
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    for chance, value in endless:  # no mean: infinite where that is the likelier half
        mean, deviation = np.where(chance > 0.5, value, mean), np.where(chance > 0.5, np.nan, deviation)
    return column.from_numbers(mean), deviation


def _mode(column: ColumnCodec, chances: np.ndarray) -> tuple[pd.Series, np.ndarray]:
    """The likeliest category and the chance of all others; of pooled ones, the most frequent stands for all."""
    if column.rare:
        value, rows = max(column.rare, key=lambda pair: pair[1])
        chances = chances.copy()
        chances[:, column.state(RARE)] *= rows / sum(count for _, count in column.rare)
        column = dataclasses.replace(column, rare=[[value, rows]])
    best = chances.argmax(1)
    made = column.decode(best, None, len(best), np.random.default_rng(0))
    return made, 1.0 - chances.max(1)
