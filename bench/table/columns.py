"""Two tables made comparable: what each column is, and the same numbers for the same values in both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

TASKS = ("binclass", "multiclass", "regression")
MISSING = "\ue000missing"  # the level of a missing category; no table holds this private character
NO_NUMBER = ("NA", "N/A", "n/a", "na", "NULL", "null", "None", "<NA>", "#N/A", "?", "-")
LEVELS_SHOWN = 64  # categories of a column that get a feature of their own; rarer ones share one


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which columns are numbers (dates included) and which are categories; the target is among them."""

    numerical: tuple[str, ...]
    categorical: tuple[str, ...]
    target: str | None = None
    task: str | None = None
    name: str | None = None

    @property
    def columns(self) -> list[str]:
        return [*self.numerical, *self.categorical]


def load_schema(schema: Mapping | Path | str | None) -> dict:
    """The keys of a schema file (numerical, categorical, target, task, name …); {} for none."""
    if schema is None:
        return {}
    if isinstance(schema, Mapping):
        return dict(schema)
    try:
        loaded = yaml.safe_load(Path(schema).read_text())
    except OSError as error:
        raise ValueError(f"schema {str(schema)!r}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"schema {str(schema)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"schema {str(schema)!r} holds no settings")
    return loaded


def read_table(path: Path | str, schema: Mapping | Path | str | None = None) -> pd.DataFrame:
    """A CSV (also .gz) or Parquet file; categories of the schema are read as text."""
    loaded = load_schema(schema)
    text = [*loaded.get("categorical", []), *([loaded["target"]] if loaded.get("task") in TASKS[:2] else [])]
    try:
        if str(path).endswith((".parquet", ".pq")):
            return pd.read_parquet(path)
        # only an empty cell is missing: "None" and "NA" are words that a category may have
        missing = {"keep_default_na": False, "na_values": ["", "NaN", "nan"]}
        table = pd.read_csv(path, dtype=dict.fromkeys(text, str), low_memory=False, **missing)
    except (OSError, ImportError, UnicodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"table {str(path)!r} cannot be read: {' '.join(str(error).split())}") from None
    for column in table.columns.difference(text):
        if not pd.api.types.is_numeric_dtype(table[column]) and (values := _all_numbers(table[column])) is not None:
            table[column] = values
    return table


def _all_numbers(column: pd.Series) -> pd.Series | None:
    """A column of numbers and words for a missing one as numbers, else None."""
    if not column.map(lambda value: isinstance(value, str), na_action="ignore").dropna().all():
        return None  # flags with gaps
    try:
        values = pd.to_numeric(column.mask(column.isin(NO_NUMBER)))
    except (ValueError, TypeError):
        return None
    return values if values.notna().any() else None


def roles_of(real: pd.DataFrame, schema: Mapping | Path | str | None = None, target: str | None = None) -> Roles:
    """Roles from a schema, or guessed from the dtypes of the real table where there is none."""
    loaded = load_schema(schema)
    target = target if target is not None else loaded.get("target")
    if target is not None and target not in real.columns:
        raise ValueError(f"target {target!r} is not a column; there are: {_some(real.columns)}")
    if "numerical" in loaded or "categorical" in loaded:
        numerical, categorical = list(loaded.get("numerical") or []), list(loaded.get("categorical") or [])
        missing = [c for c in [*numerical, *categorical] if c not in real.columns]
        if missing:
            raise ValueError(f"the schema names column {missing[0]!r}, which the table lacks")
    else:
        numerical = [c for c in real.columns if _is_continuous(real[c])]
        categorical = [c for c in real.columns if c not in numerical]
    task = loaded.get("task") if target == loaded.get("target") else None
    if target is not None:
        task = task or _task(real[target])
        if task not in TASKS:
            raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}")
        numerical = [c for c in numerical if c != target]
        categorical = [c for c in categorical if c != target]
        (numerical if task == "regression" else categorical).append(target)
    return Roles(tuple(numerical), tuple(categorical), target, task, loaded.get("name"))


def check_tables(roles: Roles, **tables: pd.DataFrame | None) -> None:
    """Refuse empty tables, missing columns, duplicate names and text where numbers belong, in one line each."""
    for name, table in tables.items():
        if table is None:
            continue
        if not len(table):
            raise ValueError(f"the {name} table has no rows")
        twice = table.columns[table.columns.duplicated()]
        if len(twice):
            raise ValueError(f"the {name} table has two columns named {twice[0]!r}")
        missing = [c for c in roles.columns if c not in table.columns]
        if missing:
            raise ValueError(f"the {name} table lacks column {missing[0]!r}")
        for column in roles.numerical:
            try:
                numbers(table[column])
            except (ValueError, TypeError):
                raise ValueError(f"column {column!r} of the {name} table holds text where numbers belong") from None


def numbers(column: pd.Series) -> np.ndarray:
    """A numerical or date column as float64; missing values and infinities are NaN."""
    if not pd.api.types.is_numeric_dtype(column):
        dated = _dates(column)
        column = pd.to_numeric(column) if dated is None else dated
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _dates(column: pd.Series) -> pd.Series | None:
    """Seconds since 1970 if the column holds dates or text that reads as such, else None."""
    if not pd.api.types.is_datetime64_any_dtype(column):
        first = column.dropna().head(1)
        if not len(first) or not isinstance(first.iloc[0], str) or _is_number(first.iloc[0]):
            return None
        column = pd.to_datetime(column)
    seconds = column.astype("int64") / 1e9 if column.notna().all() else None
    if seconds is None:
        epoch = pd.Timestamp(0, tz=column.dt.tz)
        seconds = (column - epoch).dt.total_seconds()
    elif column.dt.unit != "ns":
        seconds = column.dt.as_unit("ns").astype("int64") / 1e9
    return seconds


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def words(column: pd.Series) -> pd.Series:
    """A categorical column as text, 1.0 and 1 and True and "True" alike; missing values stay missing."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    if pd.api.types.is_bool_dtype(column.dtype):
        return column.astype(object).map(str, na_action="ignore")
    return column.astype(object).map(_word, na_action="ignore")


def _word(value: object) -> str:
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value).replace("\0", "␀")  # pandas compares text only up to a zero byte


@dataclasses.dataclass(frozen=True)
class Codes:
    """One categorical column of several tables as integers; −1 is missing. Levels are those of all tables."""

    levels: list[str]
    codes: tuple[np.ndarray, ...]


def codes(*columns: pd.Series) -> Codes:
    texts = [words(column) for column in columns]
    joined, levels = pd.factorize(pd.concat(texts, ignore_index=True), sort=True)
    ends = np.cumsum([len(text) for text in texts])[:-1]
    return Codes([str(level) for level in levels], tuple(np.split(joined, ends)))


class Features:
    """Rows as points: numbers as quantiles of the real column in [0, 1], categories one-hot at length 1/√2.

    So the widest difference in a number and a differing category both count as distance 1. A missing value is a
    category of its own; a number that is missing sits at the median and is marked by an extra coordinate. Blocks of
    rows are encoded one at a time: nothing here grows with rows × levels.
    """

    def __init__(self, roles: Roles, real: pd.DataFrame):
        self.roles = roles
        self.sorted = {c: np.sort(v[~np.isnan(v)]) for c in roles.numerical for v in [numbers(real[c])]}
        self.levels = {
            c: words(real[c]).fillna(MISSING).value_counts().index[: LEVELS_SHOWN - 1] for c in roles.categorical
        }
        self.width = 2 * len(roles.numerical) + sum(len(v) + 1 for v in self.levels.values())

    def table(self, table: pd.DataFrame) -> Encoded:
        """Quantiles and level numbers of every row, small enough to keep."""
        quantiles = np.zeros((len(table), 2 * len(self.roles.numerical)), np.float64)
        for i, column in enumerate(self.roles.numerical):
            values, known = numbers(table[column]), self.sorted[column]
            low, high = np.searchsorted(known, values, "left"), np.searchsorted(known, values, "right")
            # the middle rank of equal values, so that a spike is one point in the middle of its share
            rank = (low + high) / (2 * max(len(known), 1))
            missing = np.isnan(values)
            quantiles[:, 2 * i] = np.where(missing, 0.5, rank)
            quantiles[:, 2 * i + 1] = missing
        chosen = np.zeros((len(table), len(self.roles.categorical)), np.int64)
        for i, column in enumerate(self.roles.categorical):
            found = self.levels[column].get_indexer(words(table[column]).fillna(MISSING))
            chosen[:, i] = np.where(found < 0, len(self.levels[column]), found)
        starts = np.cumsum([quantiles.shape[1], *(len(v) + 1 for v in self.levels.values())])[:-1]
        return Encoded(quantiles, chosen + starts, self.width)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Encoded rows; `block` gives dense points of a slice of them."""

    quantiles: np.ndarray
    places: np.ndarray
    width: int

    def __len__(self) -> int:
        return len(self.quantiles)

    def take(self, rows: np.ndarray) -> Encoded:
        return Encoded(self.quantiles[rows], self.places[rows], self.width)

    def block(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        quantiles, places = self.quantiles[start:stop], self.places[start:stop]
        points = np.zeros((len(quantiles), self.width))
        points[:, : quantiles.shape[1]] = quantiles
        np.put_along_axis(points, places, np.sqrt(0.5), axis=1)
        return points

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, points) of consecutive slices."""
        for start in range(0, len(self), rows):
            yield start, self.block(start, start + rows)


def _is_continuous(column: pd.Series) -> bool:
    kinds = pd.api.types
    number = kinds.is_numeric_dtype(column) and not kinds.is_bool_dtype(column)
    return number or kinds.is_datetime64_any_dtype(column)


def _task(column: pd.Series) -> str:
    distinct = column.nunique()
    if _is_continuous(column) and distinct > 20:
        return "regression"
    return "binclass" if distinct <= 2 else "multiclass"


def _some(names: object, shown: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
