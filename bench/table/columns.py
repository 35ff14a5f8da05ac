"""Columns of two tables made comparable: their roles, and equal values as equal numbers, strings or codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from ...model.codecs.table.cells import canonical
from ...model.codecs.table.schema import Column, Schema

MISSING = "\ue000missing"  # the level of a missing category; the character is for private use, so no table holds it
LEVELS = 64  # categories of a column that get a feature of their own; rarer ones share one


@dataclasses.dataclass(frozen=True)
class Roles:
    """The numerical columns (dates included) and the categorical ones; the target is among them."""

    numerical: tuple[str, ...]
    categorical: tuple[str, ...]
    target: str | None = None
    task: str | None = None
    name: str | None = None

    @property
    def columns(self) -> list[str]:
        return [*self.numerical, *self.categorical]


def roles_of(real: pd.DataFrame, schema: Schema | None = None, target: str | None = None) -> Roles:
    """The roles that a schema gives; columns whose kind it leaves open get theirs by the dtype of the real table.

    Raises:
        ValueError: the table lacks a column of the schema, or the target.
    """
    schema = schema or Schema()
    target = target if target is not None else schema.target
    if target is not None and target not in real.columns:
        raise ValueError(f"target {target!r} is not a column; there are: {_some(real.columns)}")
    numerical, categorical = schema.roles()
    for name in [*numerical, *categorical]:
        if name not in real.columns:
            raise ValueError(f"the schema names column {name!r}, which the table lacks")
    if not schema.has_lists:
        undecided = [c.name for c in schema.columns if c.kind is None] if schema.columns else list(real.columns)
        numerical += [c for c in undecided if _is_continuous(real[c])]
        categorical += [c for c in undecided if not _is_continuous(real[c])]
    task = schema.task if target == schema.target else None
    if target is not None:
        task = task or _task(real[target])
        numerical = [c for c in numerical if c != target]
        categorical = [c for c in categorical if c != target]
        (numerical if task == "regression" else categorical).append(target)
    return Roles(tuple(numerical), tuple(categorical), target, task, schema.name)


def check_tables(roles: Roles, **tables: pd.DataFrame | None) -> None:
    """Raise ValueError for an empty table, a missing column, a repeated name, or text in a numerical column."""
    for name, table in tables.items():
        if table is None:
            continue
        if not len(table):
            raise ValueError(f"the {name} table has no rows")
        repeated = table.columns[table.columns.duplicated()]
        if len(repeated):
            raise ValueError(f"the {name} table has two columns named {repeated[0]!r}")
        missing = [c for c in roles.columns if c not in table.columns]
        if missing:
            raise ValueError(f"the {name} table lacks column {missing[0]!r}")
        for column in roles.numerical:
            try:
                numbers(table[column])
            except (ValueError, TypeError):
                raise ValueError(f"column {column!r} of the {name} table holds text where numbers belong") from None


def comparable(table: pd.DataFrame, columns: Sequence[Column], part: str) -> pd.DataFrame:
    """The columns that a table has of those known from the real one, as cells that are equal where their values are,
    whatever file or dtype they come from; cells that are not of the column's kind are missing.

    Raises:
        ValueError: no cell of a column is of its kind; names it and the `part`.
    """
    cells = {}
    for column in columns:
        if column.name in table.columns:
            values = table[column.name].reset_index(drop=True)
            cells[column.name] = _readable(column, values)
            if values.notna().any() and not cells[column.name].notna().any():
                what = "dates" if column.kind == "datetime" else "numbers"
                raise ValueError(f"column {column.name!r} of the {part} table holds text where {what} belong")
    return pd.DataFrame(cells, index=range(len(table)))


def _readable(column: Column, values: pd.Series) -> pd.Series:
    """`canonical` cells; where that refuses some, the halves of the column are read on their own, and so on."""
    try:
        return canonical(column, values)
    except (ValueError, TypeError):
        if len(values) == 1 or not _any_readable(column, values):
            return pd.Series(np.nan, index=values.index)
    middle = len(values) // 2
    return pd.concat([_readable(column, values.iloc[:middle]), _readable(column, values.iloc[middle:])])


def _any_readable(column: Column, values: pd.Series, tried: int = 20) -> bool:
    """Whether one of some cells, spread over the column, is of its kind."""
    present = values.dropna()
    for place in np.linspace(0, len(present) - 1, min(tried, len(present))).astype(int):
        try:
            if canonical(column, present.iloc[[place]]).notna().any():
                return True
        except (ValueError, TypeError):
            continue
    return False


def numbers(column: pd.Series) -> np.ndarray:
    """A numerical or date column as float64; missing values and infinities are NaN."""
    if not pd.api.types.is_numeric_dtype(column):
        seconds = _seconds(column)
        column = pd.to_numeric(column) if seconds is None else seconds
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _seconds(column: pd.Series) -> pd.Series | None:
    """Seconds since 1970 if the column holds dates or text that reads as such, else None."""
    if not pd.api.types.is_datetime64_any_dtype(column):
        first = column.dropna().head(1)
        if not len(first) or not isinstance(first.iloc[0], str) or _is_number(first.iloc[0]):
            return None
        column = pd.to_datetime(column)
    if column.isna().any():
        return (column - pd.Timestamp(0, tz=column.dt.tz)).dt.total_seconds()
    return column.dt.as_unit("ns").astype("int64") / 1e9


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def strings(column: pd.Series) -> pd.Series:
    """A categorical column as strings; 1.0 and 1 become "1", True becomes "True", missing values stay missing."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    if pd.api.types.is_bool_dtype(column.dtype):
        return column.astype(object).map(str, na_action="ignore")
    return column.astype(object).map(_string, na_action="ignore")


def _string(value: object) -> str:
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value).replace("\0", "␀")  # pandas compares strings only up to a zero byte


@dataclasses.dataclass(frozen=True)
class Codes:
    """One categorical column of several tables as indices of `levels`, the categories of all; −1 is missing."""

    levels: list[str]
    codes: tuple[np.ndarray, ...]


def codes(*columns: pd.Series) -> Codes:
    """The codes of one column, as it is in each of several tables."""
    parts = [strings(column) for column in columns]
    joined, levels = pd.factorize(pd.concat(parts, ignore_index=True), sort=True)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return Codes([str(level) for level in levels], tuple(np.split(joined, ends)))


class Features:
    """Rows as points: numbers as quantiles of the real column in [0, 1], categories one-hot at length 1/√2.

    So the largest difference of two numbers and two different categories both are a distance of 1. A missing category
    is a level of its own; a missing number is at the median, with an extra coordinate that marks it. The one-hot points
    are computed in blocks of rows, so that memory does not grow with rows × levels.
    """

    def __init__(self, roles: Roles, real: pd.DataFrame):
        self.roles = roles
        values = {c: numbers(real[c]) for c in roles.numerical}
        self.sorted = {c: np.sort(v[~np.isnan(v)]) for c, v in values.items()}
        self.levels = {
            c: strings(real[c]).fillna(MISSING).value_counts().index[: LEVELS - 1] for c in roles.categorical
        }
        self.width = 2 * len(roles.numerical) + sum(len(v) + 1 for v in self.levels.values())

    def table(self, table: pd.DataFrame) -> Encoded:
        """The rows of a table, encoded."""
        quantiles = np.zeros((len(table), 2 * len(self.roles.numerical)), np.float64)
        for i, column in enumerate(self.roles.numerical):
            values, real = numbers(table[column]), self.sorted[column]
            low, high = np.searchsorted(real, values, "left"), np.searchsorted(real, values, "right")
            rank = (low + high) / (2 * max(len(real), 1))  # the middle rank of equal values
            missing = np.isnan(values)
            quantiles[:, 2 * i] = np.where(missing, 0.5, rank)
            quantiles[:, 2 * i + 1] = missing
        level = np.zeros((len(table), len(self.roles.categorical)), np.int64)
        for i, column in enumerate(self.roles.categorical):
            found = self.levels[column].get_indexer(strings(table[column]).fillna(MISSING))
            level[:, i] = np.where(found < 0, len(self.levels[column]), found)
        starts = np.cumsum([quantiles.shape[1], *(len(v) + 1 for v in self.levels.values())])[:-1]
        return Encoded(quantiles, level + starts, self.width)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Rows encoded by `Features`; `block` computes the points of some of them.

    Args:
        quantiles: (N, 2 × numerical columns), quantiles and marks of missing numbers, the first coordinates.
        hot: (N, categorical columns), the coordinate of each category.
        width: number of coordinates.
    """

    quantiles: np.ndarray
    hot: np.ndarray
    width: int

    def __len__(self) -> int:
        return len(self.quantiles)

    def take(self, rows: np.ndarray) -> Encoded:
        return Encoded(self.quantiles[rows], self.hot[rows], self.width)

    def block(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The points (stop − start, width) of consecutive rows."""
        quantiles = self.quantiles[start:stop]
        points = np.zeros((len(quantiles), self.width))
        points[:, : quantiles.shape[1]] = quantiles
        np.put_along_axis(points, self.hot[start:stop], np.sqrt(0.5), axis=1)
        return points

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, points) of consecutive blocks."""
        for start in range(0, len(self), rows):
            yield start, self.block(start, start + rows)


def _is_continuous(column: pd.Series) -> bool:
    types = pd.api.types
    is_number = types.is_numeric_dtype(column) and not types.is_bool_dtype(column)
    return is_number or types.is_datetime64_any_dtype(column)


def _task(column: pd.Series) -> str:
    distinct = column.nunique()
    if _is_continuous(column) and distinct > 20:
        return "regression"
    return "binclass" if distinct <= 2 else "multiclass"


def _some(names: Iterable, shown: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
