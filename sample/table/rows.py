"""Rows from a table model: unconditional, under conditions on columns, balanced, or with missing cells filled.

A condition that leaves one value is an observed cell. Every other condition, such as a range, restricts the model's
joint distribution of the rows, see `restricted`.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import numpy as np
import pandas as pd
import torch

from ... import kernels
from ...kernels import Draw, Rng
from ...model.codecs.table.column import MISSING, REGULAR
from .cells import CellSampler, ObservedCells
from .incomplete import Incomplete
from .restricted import Restricted
from .where import RowConditions, codec_of, conditions_of

COMBINATION_ROWS = 4096  # rows of the model in which the combinations to balance are sought
DRAW_SEED = 1_000_003  # draw d of an imputation has the seed `seed + DRAW_SEED * d`


@dataclasses.dataclass
class TableSampler(CellSampler):
    """Samples rows of a table model, see `CellSampler`."""

    def sample(self, n: int | None = None, where: Any = None, balance: Any = None) -> pd.DataFrame:
        """n new rows.

        Args:
            n: default as many as in training, or as there are rows of conditions.
            where: {column: condition}, see `constraints.parse`, or rows of conditions, see `where.conditions_of`.
            balance: a column, or several, whose values or combinations of values are equally frequent; combinations
                are those that occur in COMBINATION_ROWS rows of the model.

        Raises:
            ValueError: an unknown column, a value that the column does not have, an empty range, or a column to
                balance that is not categorical.
        """
        n, conditions = conditions_of(self.codec, where, None if n is None else whole_number("n", n))
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        cells = self.no_cells(n)
        if balance is not None:
            names = [balance] if isinstance(balance, str | int) else list(balance)
            for name in names:
                if any(name == condition.name for condition in conditions):
                    raise ValueError(f"column {name!r} cannot be balanced and given at once")
            self._balance(cells, names)
        for condition in conditions:
            self._observe(cells, condition)
        tokens, z = Restricted(self, cells, conditions).sample()
        table = self.codec.decode(tokens, z, self.seed)
        rng = np.random.default_rng([self.seed % 2**64, n])
        for condition in conditions:
            table[condition.name] = condition.enforce(table[condition.name], rng)
        return table

    def impute(
        self, table: pd.DataFrame | Incomplete, draw: int = 0, cells: ObservedCells | None = None
    ) -> pd.DataFrame:
        """The table with its missing cells sampled given the others, which stay as they are.

        Args:
            draw: number of the draw; each has its own random numbers.
            cells: the observed cells of the table, to compute them only once for several draws.
        """
        given = table if isinstance(table, Incomplete) else Incomplete.of(self.codec, table)
        if not len(given.rows):
            return given.filled({})
        cells = self.observed_cells(given.known) if cells is None else cells
        sampler = dataclasses.replace(self, seed=self.seed + DRAW_SEED * draw)
        tokens, z = sampler.sample_cells(cells.rows(torch.from_numpy(given.rows)), self.present_states())
        return given.filled(self.codec.decode(tokens, z, sampler.seed).set_axis(given.rows))

    def observed_cells(self, table: pd.DataFrame) -> ObservedCells:
        """The cells of a table that are not missing."""
        tokens, z = self.codec.encode(table)
        cells = self.no_cells(len(table))
        for c, name in enumerate(self.codec.categorical):
            present = torch.tensor(table[name].notna().to_numpy())
            cells.tokens[:, c] = torch.where(present, tokens[:, c], cells.tokens[:, c])
        for c, name in enumerate(self.codec.numerical):
            cells.observed[:, c] = torch.tensor(table[name].notna().to_numpy())
        # an observed cell that is not regular has a token but no z, and gets noise, as in training
        noise = kernels.normal(Rng.for_batch(self.seed, len(table)).keys("fill", Draw.DATA), max(z.shape[1], 1))
        cells.z = torch.where(z.isnan(), noise[:, : z.shape[1]], z)
        return cells

    def _observe(self, cells: ObservedCells, condition: RowConditions) -> None:
        """Make the cells observed of which a condition leaves only one value."""
        name, rng = condition.name, Rng.for_batch(self.seed, len(cells))
        for region, rows in condition.parts():
            index = torch.from_numpy(rows)
            if region.token >= 0:
                cells.tokens[index, self.codec.categorical.index(name)] = region.token
            elif region.is_given(self.observes):
                if region.codec.states:
                    cells.tokens[index, self.codec.categorical.index(name)] = region.codec.state(REGULAR)
                (low, high), column = region.spans[0], self.codec.numerical.index(name)
                u = kernels.uniform(rng.keys(f"range {name}", Draw.PRIOR), 1)[index, 0].numpy()
                z = region.codec.quantiles.to_z(low + u * (high - low))
                cells.z[index, column], cells.observed[index, column] = torch.from_numpy(z).float(), True

    def _balance(self, cells: ObservedCells, names: list) -> None:
        """Observe the combinations of values of categorical columns in turn."""
        columns = [codec_of(self.codec, name) for name in names]
        for column in columns:
            if not column.states or column.quantiles is not None:
                kind = column.column.kind
                raise ValueError(f"column {column.name!r} is {kind} with many values: it cannot be balanced")
        at = [self.codec.categorical.index(column.name) for column in columns]
        present = [[t for t, state in enumerate(c.states) if state != MISSING] for c in columns]
        combinations = torch.cartesian_prod(*map(torch.tensor, present)).view(-1, len(at))
        if len(at) > 1:  # those that occur in rows of the model, because a codec knows columns one by one
            drawn = self.sample_cells(self.no_cells(COMBINATION_ROWS))[0][:, at].unique(dim=0)
            kept = (drawn[:, None] == combinations).all(-1).any(0) if len(drawn) else None
            combinations = combinations[kept]
        cells.tokens[:, at] = combinations[torch.arange(len(cells)) % len(combinations)]


def whole_number(name: str, value: Any) -> int:
    """An argument that must be a whole number, as int; 1e3 is one.

    Raises:
        ValueError: it is none.
    """
    try:
        whole = operator.index(value)
    except TypeError:
        if isinstance(value, float | np.floating) and float(value).is_integer():
            return int(value)
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    return whole
