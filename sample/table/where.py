"""Conditions of the rows to sample: from Python, from the texts of a command line, from a table of conditions."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ...model.codecs.table.codec import TableCodec
from ...model.codecs.table.column import ColumnCodec
from .constraints import Region
from .values import Both, ColumnCondition, is_empty

CONDITION = re.compile(
    r"\s*(>=|<=|!=|==|=|>|<|(?=(?:not\s+)?in\s*[{(\[])|(?=(?:is\s+)?not\s+(?:null|empty|missing)$))", re.IGNORECASE
)


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

    @classmethod
    def each(cls, codec: ColumnCodec, conditions: list[ColumnCondition]) -> RowConditions:
        """One condition a row; an empty cell is none."""
        which, regions, known = np.full(len(conditions), -1), [], {}
        for i, condition in enumerate(conditions):
            if is_empty(condition):
                continue
            key = f"{type(condition).__name__}:{condition!r}"
            if key not in known:
                known[key] = len(regions)
                regions.append(Region.of(codec, condition))
            which[i] = known[key]
        return cls(codec, regions, which)

    def parts(self) -> Iterator[tuple[Region, np.ndarray]]:
        """(condition, numbers of its rows)."""
        for i, region in enumerate(self.regions):
            yield region, np.flatnonzero(self.which == i)

    def rows(self, index: np.ndarray) -> RowConditions:
        return dataclasses.replace(self, which=self.which[index])

    def open(self, observes: bool) -> RowConditions:
        """Without the conditions that are observed cells (see `Region.is_given`), and those that all values meet."""
        exact = np.array([region.is_given(observes) or region.is_whole for region in self.regions] + [False])
        return dataclasses.replace(self, which=np.where(exact[self.which], -1, self.which))

    def accepts(self, tokens: np.ndarray | None, z: np.ndarray | None, uniforms: np.ndarray) -> np.ndarray:
        """(n,) bool, see `Region.accepts`; a row without a condition is accepted."""
        good = np.ones(len(self.which), dtype=bool)
        for region, rows in self.parts():
            own_tokens, own_z = (None if x is None else x[rows] for x in (tokens, z))
            good[rows] = region.accepts(own_tokens, own_z, uniforms[rows])
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


def conditions_of(codec: TableCodec, where: Any, n: int | None) -> tuple[int, list[RowConditions]]:
    """The number of rows, and their conditions.

    Args:
        where: {column: condition} for all rows, or rows of conditions: a DataFrame or a list of mappings, where an
            empty cell or a column that is left out is no condition. The rows of conditions are repeated in their order.
        n: rows; default as many as in training, or one for each row of conditions.

    Raises:
        ValueError: an unknown column, a value that the column does not have, an n that is no multiple of the rows.
    """
    if where is None or isinstance(where, Mapping):
        n = codec.rows if n is None else n
        return n, [RowConditions.same(codec_of(codec, name), value, n) for name, value in (where or {}).items()]
    table = where if isinstance(where, pd.DataFrame) else pd.DataFrame(list(where))
    if not len(table):
        raise ValueError("the table of conditions has no rows")
    n = len(table) if n is None else n
    if n % len(table):
        raise ValueError(f"n = {n} is not a multiple of the {len(table)} rows of conditions")
    repeats = np.arange(n) % len(table)
    columns = [RowConditions.each(codec_of(codec, name), table[name].tolist()) for name in table]
    return n, [column.rows(repeats) for column in columns]


def codec_of(codec: TableCodec, name: Any) -> ColumnCodec:
    """The codec of a column that conditions can be on.

    Raises:
        ValueError: there is no such column, or it is not modelled.
    """
    column = codec.columns.get(name)
    if column is None:
        near = difflib.get_close_matches(str(name), [str(c) for c in codec.columns], n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown column {name!r}; the table has {', '.join(map(str, codec.columns))}{meant}")
    if not column.states and column.quantiles is None:
        raise ValueError(f"column {name!r} is {column.column.kind} and is not modelled")
    return column


def parse_where(codec: TableCodec, texts: list[str]) -> dict[Any, ColumnCondition]:
    """{column: condition} of texts such as "age=30", "age=30..40", "age>=18", "group!=a", "group in {a, b}".

    Several conditions on one column must all hold.

    Raises:
        ValueError: a text that is no condition, or conditions on one column that exclude each other.
    """
    conditions: dict[Any, ColumnCondition] = {}
    for text in texts:
        name, condition = _split(codec, text)
        if name in conditions:
            earlier = conditions[name]
            conditions[name] = Both((*(earlier if isinstance(earlier, Both) else (earlier,)), condition))
        else:
            conditions[name] = condition
    return conditions


def _split(codec: TableCodec, text: str) -> tuple[Any, str]:
    """(column, condition) of one text; of columns whose names begin it, the longest."""
    for name in sorted(codec.columns, key=lambda name: -len(str(name))):
        rest = text.strip().removeprefix(str(name))
        if (rest != text.strip() or not str(name)) and (found := CONDITION.match(rest)):
            return name, found[1] + rest[found.end() :] if found[1] not in ("=", "==") else rest[found.end() :].strip()
    if found := re.match(r"\s*(.+?)\s*(>=|<=|!=|==|=|>|<|\s(?:not\s+)?in\s)", text):
        codec_of(codec, found[1])
    raise ValueError(f"--where {text!r} is not of the form COLUMN=VALUE, COLUMN>VALUE or 'COLUMN in {{A, B}}'")
