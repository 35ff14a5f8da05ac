"""Conditions of the rows to sample: from Python, from the texts of a command line, from a table of conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ...model.codecs.table.column import ColumnCodec
from .constraints import ColumnCondition, Region


@dataclasses.dataclass
class RowConditions:
    """The conditions on one column of n rows.

    Args:
        regions: the different conditions.
        which: (n,) int64, which of them a row has; −1: none.
    """

    codec: ColumnCodec
    regions: list[Region]
    which: np.ndarray

    @property
    def name(self) -> Any:
        return self.codec.name

    @classmethod
    def same(cls, codec: ColumnCodec, condition: ColumnCondition, n: int) -> RowConditions:
        """One condition on all rows."""
        return cls(codec, [Region.of(codec, condition)], np.zeros(n, dtype=np.int64))

    def parts(self) -> Iterator[tuple[Region, np.ndarray]]:
        """(condition, numbers of its rows)."""
        for i, region in enumerate(self.regions):
            yield region, np.flatnonzero(self.which == i)

    def rows(self, index: np.ndarray) -> RowConditions:
        return dataclasses.replace(self, which=self.which[index])

    def open(self) -> RowConditions:
        """Without the conditions that leave only one value, which are observed cells."""
        exact = np.array([region.is_exact for region in self.regions] + [False])
        return dataclasses.replace(self, which=np.where(exact[self.which], -1, self.which))

    def accepts(self, tokens: np.ndarray | None, z: np.ndarray | None, uniforms: np.ndarray) -> np.ndarray:
        """(n,) bool, see `Region.accepts`; a row without a condition is accepted."""
        good = np.ones(len(self.which), dtype=bool)
        for region, rows in self.parts():
            cells = (None if x is None else x[rows] for x in (tokens, z))
            good[rows] = region.accepts(*cells, uniforms[rows])
        return good

    def enforce(self, decoded: pd.Series, rng: np.random.Generator) -> pd.Series:
        """The decoded cells of the column, see `Region.enforce`."""
        if len(self.regions) == 1 and (self.which == 0).all():
            return self.regions[0].enforce(decoded, rng)
        for region, rows in self.parts():
            cells = region.enforce(decoded.iloc[rows], rng)
            if cells is not decoded:
                decoded = decoded.copy()
                decoded.iloc[rows] = cells
        return decoded


def parse_where(codec, pairs):
    conditions = {}
    for name, text in pairs:
        conditions[name] = text
    return conditions
