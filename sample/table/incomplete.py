"""Tables with empty cells: which of their cells are filled, and which of the others the model can use.

A cell that the model cannot read, such as a category that training did not have, stays as it is and counts as unknown.
Columns that the model does not have stay too; those that only the model has are filled and come last.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ...model.codecs.table.cells import gaps
from ...model.codecs.table.codec import TableCodec
from ...model.codecs.table.column import ColumnCodec
from ...model.codecs.table.rows import as_in_training, as_text
from ...model.codecs.table.tags import from_tag

NEAR = 3  # similar values that a note names, at most


@dataclasses.dataclass
class Incomplete:
    """A table with empty cells, as a model sees it; rows are numbered from 0.

    Attributes:
        codec: of the model.
        table: all its columns, and empty ones for those that only the model has.
        index: the labels of its rows.
        empty: (n, C) bool, the cells to fill, of the model's columns.
        known: the model's columns; cells that it cannot use are empty.
        notes: what the user should know, a line each.
    """

    codec: TableCodec
    table: pd.DataFrame
    index: pd.Index
    empty: pd.DataFrame
    known: pd.DataFrame
    notes: list[str]

    @classmethod
    def of(cls, codec: TableCodec, table: pd.DataFrame) -> Incomplete:
        """Read a table for a model with this codec.

        Raises:
            ValueError: a column name that occurs twice, or none that the model has.
        """
        repeated = table.columns[table.columns.duplicated()]
        if len(repeated):
            raise ValueError(f"column name {repeated[0]!r} occurs more than once: rename one of them")
        absent = [name for name in codec.columns if name not in table.columns]
        if len(absent) == len(codec.columns):
            raise ValueError(
                f"the table has none of the model's columns, which are {', '.join(map(str, codec.columns))}"
            )
        index, table = table.index, table.reset_index(drop=True)
        notes = [_absence(name, table, codec) for name in absent]
        table = table.reindex(columns=[*table.columns, *absent])
        known = {}
        for name, column in codec.columns.items():
            known[name], note = _readable(column, table[name])
            notes += [note] if note else []
        empty = pd.DataFrame({name: gaps(column.column, table[name]) for name, column in codec.columns.items()})
        return cls(codec, table, index, empty, pd.DataFrame(known), notes)

    @property
    def rows(self) -> np.ndarray:
        """The numbers of the rows with cells to fill."""
        return np.flatnonzero(self.empty.to_numpy().any(1))

    def filled(self, new: Mapping[Any, pd.Series] | pd.DataFrame) -> pd.DataFrame:
        """The table with its empty cells taken from these columns, whose labels are numbers of rows."""
        table = self.table.copy()
        for name, column in self.codec.columns.items():
            rows = np.flatnonzero(self.empty[name])
            if not len(rows):
                continue
            if column.column.kind == "identifier":
                cells = new_identifiers(column, table[name], len(rows)).set_axis(rows)
            else:
                cells = new[name].loc[rows]
            table[name] = fill_cells(table[name], cells)
        return table.set_axis(self.index)


def fill_cells(values: pd.Series, new: pd.Series) -> pd.Series:
    """A column with the cells of `new` in it, by their index: in its own dtype if that holds them, in that of `new` if
    they are all cells there are, else in the one that pandas finds for both."""
    if len(new) == len(values):
        return new
    zones = [getattr(x.dtype, "tz", None) for x in (values, new)]
    if all(pd.api.types.is_datetime64_any_dtype(x.dtype) for x in (values, new)) and zones[0] != zones[1]:
        moments = new.dt.tz_convert("UTC") if zones[1] else new.dt.tz_localize("UTC")
        new = moments.dt.tz_convert(zones[0]) if zones[0] else moments.dt.tz_localize(None)
    if values.dtype != object and not _holds(values, new):
        kept = values.drop(new.index).dropna()
        if isinstance(values.dtype, pd.CategoricalDtype):
            categories = values.cat.categories.append(pd.Index(new.astype(object).unique())).unique()
            values = values.cat.set_categories(categories)
        elif isinstance(values.dtype, pd.StringDtype):
            new = new.map(as_text, na_action="ignore")
        else:
            values = values.astype(pd.concat([kept, new]).dtype)
    filled = values.copy()
    filled.loc[new.index] = new.to_numpy(dtype=object) if filled.dtype == object else new.astype(filled.dtype)
    return filled


def new_identifiers(column: ColumnCodec, values: pd.Series, n: int) -> pd.Series:
    """n identifiers that are not among the values of a column."""
    taken = {as_text(value) for value in values.dropna()}
    made = column.decode(None, None, n + len(taken), np.random.default_rng(0))
    return made[~made.map(as_text).isin(taken)].head(n)


def _holds(values: pd.Series, new: pd.Series) -> bool:
    """Whether the dtype of a column holds these values; a float of fewer bits does."""
    if pd.api.types.is_float_dtype(values.dtype) and pd.api.types.is_numeric_dtype(new.dtype):
        return True
    if isinstance(values.dtype, pd.CategoricalDtype):
        return bool(new.dropna().isin(values.cat.categories).all())
    try:
        cast = new.astype(values.dtype)
        return bool(((cast == new) | new.isna()).all()) and bool((cast.isna() == new.isna()).all())
    except (TypeError, ValueError, OverflowError):
        return False


def _absence(name: Any, table: pd.DataFrame, codec: TableCodec) -> str:
    others = {str(other).casefold(): other for other in table.columns if other not in codec.columns}
    near = difflib.get_close_matches(str(name).casefold(), list(others), 1)
    hint = f"; if {others[near[0]]!r} is meant, rename it" if near else ""
    return f"column {name!r} is not in the table: it is filled in all rows{hint}"


def _readable(column: ColumnCodec, values: pd.Series) -> tuple[pd.Series, str | None]:
    """(values as the model reads them, empty where it cannot; a line about those cells)."""

    def read(cells: pd.Series) -> pd.Series:
        cells = as_in_training(column, cells)
        column.encode(cells, np.random.default_rng(0))
        return cells

    if values.isna().all():
        return values, None
    wrong = _unreadable(read, values.dropna())
    if not len(wrong):
        return read(values), None
    first, count = values.astype(object)[wrong[0]], len(wrong)
    first = first.item() if isinstance(first, np.generic) else first
    is_number = column.is_numerical
    what = "cells that cannot be read as numbers or dates" if is_number else "cells that training did not have"
    near = "" if is_number else _near(column, first)
    return read(values.astype(object).drop(wrong).reindex(values.index)), (
        f"column {column.name!r}: {what}: {count:,}, the first is {first!r}{near}; "
        "they stay as they are and count as unknown"
    )


def _unreadable(read: Callable, present: pd.Series) -> np.ndarray:
    """The labels of the cells that cannot be read; only distinct values are tried."""
    try:
        distinct = present.drop_duplicates()
        wrong = _failing(read, distinct)
        values = set(distinct[wrong])
    except TypeError:  # cells that have no hash
        return np.array(_failing(read, present))
    return np.array([label for label, value in present.items() if value in values]) if wrong else np.array([])


def _failing(read: Callable, cells: pd.Series) -> list:
    """The labels of the cells that cannot be read, found by halving."""
    try:
        read(cells)
    except (ValueError, TypeError, OverflowError, AttributeError):
        half = len(cells) // 2
        return [*_failing(read, cells.iloc[:half]), *_failing(read, cells.iloc[half:])] if half else [cells.index[0]]
    return []


def _near(column: ColumnCodec, value: Any) -> str:
    """The categories most like a value, as text."""
    tags = [tag for _, tag in column.value_states()] + [tag for tag, _ in column.rare]
    near = difflib.get_close_matches(str(value), [str(from_tag(tag)) for tag in tags], NEAR)
    return f" (near it: {', '.join(near)})" if near else ""
