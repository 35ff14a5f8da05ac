"""Between a table and tensors: tokens (N, C) for categorical columns, normal scores (N, C) for numerical ones.

| column | token | number |
|---|---|---|
| categorical, boolean, numbers and dates of few values | one state per value | |
| continuous, integer, date | | normal score of its quantile, whole numbers spread evenly over their width |
| the same with empty cells, infinities or spikes (frequent values) | regular, or which of them | of the regular |
| constant, identifier | | |

Empty cells are a state of their own. Categories beyond the most frequent `most` share one state and are drawn from
their own frequencies when it comes back. Where a cell has no number its score is NaN: training fills in fresh noise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from .columns import NUMERIC, STEPS, TEXT, Column, Schema, dates

REGULAR, MISSING, RARE = ["regular"], ["missing"], ["rare"]  # states that are no single value; a value is ["v", …]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How columns are encoded.

    Args:
        discrete: numerical columns with at most so many values, of five rows each on average, are tokens.
        spike: a value that holds at least this share of the rows is split off a continuous column.
        most: states of a categorical column, the rest are pooled.
        knots: points of a quantile curve.
        ends: rows in as many as in training, by the normal law, in which a number comes back as its smallest value,
            and as many as its largest; 2 or more. Networks learn lighter tails, so 2 are easily none.
    """

    discrete: int = 128
    spike: float = 0.05
    most: int = 256
    knots: int = 2000
    ends: float = 2.0


@dataclasses.dataclass
class Quantiles:
    """Values ↔ normal scores by an empirical quantile curve.

    Args:
        share, value: the curve, both rising; share from 0 to 1.
        width: values are multiples of it and are spread over ±width/2; 0 where they are not.
        margin: share beyond either end, which comes back as the smallest and the largest value.
        edge: the same of numbers that a model drew; 0: the margin.
    """

    share: list[float]
    value: list[float]
    width: float
    margin: float
    low: float
    high: float
    edge: float = 0.0

    @classmethod
    def fit(
        cls, values: np.ndarray, width: float, knots: int, rng: np.random.Generator, ends: float = 2.0
    ) -> Quantiles:
        spread = np.sort(values + width * (rng.random(len(values)) - 0.5))
        spread[0], spread[-1] = values.min() - width / 2, values.max() + width / 2
        margin, edge = (min(count / len(values), 0.01) for count in (2.0, ends))
        score = np.linspace(ndtri(margin), -ndtri(margin), min(knots, max(2, len(values))))
        share = (ndtr(score) - margin) / (1.0 - 2.0 * margin)
        share[0], share[-1] = 0.0, 1.0
        value = np.quantile(spread, share)
        return cls(share.tolist(), value.tolist(), width, margin, float(values.min()), float(values.max()), edge)

    def encode(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        spread = values + self.width * (rng.random(len(values)) - 0.5)
        return self.score(np.interp(spread, self.value, self.share))

    def score(self, share):
        return ndtri(self.margin + (1.0 - 2.0 * self.margin) * np.clip(share, 0.0, 1.0))

    def decode(self, scores: np.ndarray) -> np.ndarray:
        margin = 1.001 * self.margin  # so that a float32 score of an end is not just inside it
        share = np.clip((ndtr(scores.astype(np.float64)) - margin) / (1.0 - 2.0 * margin), 0.0, 1.0)
        values = np.interp(share, self.share, self.value)
        if self.width:
            values = np.round(values / self.width) * self.width
        return np.clip(values, self.low, self.high)

    def stretch(self, scores: Tensor) -> Tensor:
        """Drawn scores, those beyond the edge moved into the margin."""
        beyond = scores.abs() >= -float(ndtri(max(self.edge, self.margin)))
        return torch.where(beyond, -1.01 * float(ndtri(self.margin)) * scores.sign(), scores)

    def shares(self, low: float, high: float) -> tuple[float, float]:
        """The part of the curve whose values, once rounded, lie in [low, high]."""
        half = 0.4999 * self.width
        return tuple(float(np.interp(v, self.value, self.share)) for v in (low - half, high + half))


@dataclasses.dataclass
class ColumnCodec:
    """One column's encoding.

    Args:
        states: what each token means, [] for a column without tokens.
        rare: pooled categories as [value, rows].
        fill: the value of a constant, or how an identifier goes on: the next number, or a text to number.
    """

    column: Column
    states: list[list] = dataclasses.field(default_factory=list)
    rare: list[list] = dataclasses.field(default_factory=list)
    quantiles: Quantiles | None = None
    fill: Any = None
    categories: list | None = None
    category_dtype: str | None = None
    ordered: bool = False
    nothing: str = "nan"

    @property
    def name(self):
        return self.column.name

    @property
    def numeric(self) -> bool:
        return self.column.kind in NUMERIC

    @classmethod
    def fit(cls, column: Column, values: pd.Series, how: Encoding, rng: np.random.Generator) -> ColumnCodec:
        made = cls(column)
        if isinstance(values.dtype, pd.CategoricalDtype):
            made.categories, made.ordered = [_tag(v) for v in values.cat.categories], values.cat.ordered
            made.category_dtype = str(values.cat.categories.dtype)
        empty = values.isna()
        if empty.any() and values.dtype == object:
            made.nothing = "none" if values[empty].iloc[0] is None else "nan"
        if column.kind == "constant":
            made.fill = None if empty.all() else _tag(values.dropna().iloc[0])
        elif column.kind == "identifier":
            whole = pd.api.types.is_integer_dtype(values.dtype)
            made.fill = int(values.max()) + 1 if whole else f"{column.name}-"
        elif made.numeric:
            made._fit_numbers(made.to_numbers(values), how, rng)
        else:
            counts = pd.Series(_tags(values[~empty])).value_counts(sort=True)
            order = sorted(counts.index, key=lambda tag: (-counts[tag], tag))
            kept = order if len(order) <= how.most else order[: how.most - 1]
            made.states = [["v", tag] for tag in sorted(kept)]
            made.rare = [[tag, int(counts[tag])] for tag in order[len(kept) :]]
            made.states += [RARE] * bool(made.rare) + [MISSING] * bool(empty.any())
        return made

    def _fit_numbers(self, numbers: np.ndarray, how: Encoding, rng: np.random.Generator) -> None:
        known = numbers[~np.isnan(numbers)]
        values, counts = np.unique(known, return_counts=True)
        finite = np.isfinite(values)
        if len(values) <= min(how.discrete, len(known) // 5):
            self.states = [["v", float(v)] for v in values]
        else:
            often = (counts >= how.spike * len(numbers)) & (counts >= 20)
            if finite[~often].sum() < 2:
                often[:] = True
            odd = often | ~finite
            self.states = [["v", float(v)] for v in values[odd]]
            regular = known[~np.isin(known, values[odd])]
            if len(regular):
                self.states = [REGULAR, *self.states] if self.states else []
                self.quantiles = Quantiles.fit(regular, self.width, how.knots, rng, how.ends)
        if len(known) < len(numbers):
            self.states = (self.states or [REGULAR]) + [MISSING]

    @property
    def width(self) -> float:
        """The distance between neighbouring values of a numerical column; 0 where there is none."""
        if self.column.kind == "continuous":
            return 0.0 if self.column.decimals is None else 10.0**-self.column.decimals
        return 1.0

    def to_numbers(self, values: pd.Series) -> np.ndarray:
        """float64 with NaN for empty cells; dates count their steps.

        Raises:
            ValueError: a cell is not a number or not a date.
        """
        if self.column.kind == "datetime":
            try:
                read = dates(values, self.column.format)
            except (ValueError, TypeError):
                raise ValueError(f"column {self.name!r} does not hold dates: set another kind or a format") from None
            if (bad := read.isna() & values.notna()).any():
                raise ValueError(f"column {self.name!r}: {values[bad].iloc[0]!r} is not a date like the others")
            steps = read.astype("int64").to_numpy() // STEPS[self.column.step or "ns"]
            return np.where(read.isna(), np.nan, steps.astype(np.float64))
        numbers = pd.to_numeric(values, errors="coerce")
        if (bad := numbers.isna() & values.notna()).any():
            raise ValueError(f"column {self.name!r}: {values[bad].iloc[0]!r} is not a number")
        return numbers.to_numpy(dtype=np.float64, na_value=np.nan)

    def encode(self, values: pd.Series, rng: np.random.Generator) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(tokens (N,) int64 or None, scores (N,) float32 or None); an empty cell that has no state is token −1.

        Raises:
            ValueError: a value that was not there in training and has no place.
        """
        if self.column.kind in ("constant", "identifier"):
            return None, None
        if not self.numeric:
            empty = values.isna().to_numpy()
            index = {state[1]: i for i, state in enumerate(self.states) if state[0] == "v"}
            index |= dict.fromkeys((tag for tag, _ in self.rare), len(index))
            tokens = np.full(len(values), -1, dtype=np.int64)
            tags = _tags(values[~empty])
            if unseen := [tag for tag in set(tags) if tag not in index]:
                raise ValueError(f"column {self.name!r}: {_untag(unseen[0])!r} did not occur in training")
            tokens[~empty] = [index[tag] for tag in tags]
            tokens[empty] = self.state(MISSING)
            return tokens, None
        numbers = self.to_numbers(values)
        empty = np.isnan(numbers)
        tokens = np.full(len(numbers), self.state(REGULAR), dtype=np.int64)
        for i, (role, *rest) in enumerate(self.states):
            if role == "v":
                tokens[numbers == rest[0]] = i
        tokens[empty] = self.state(MISSING)
        if self.quantiles is None:
            if (bad := (tokens < 0) & ~empty).any():  # between the known values: the nearest one
                grid = np.array([state[1] for state in self.states if state[0] == "v"])
                tokens[bad] = np.abs(numbers[bad][:, None] - grid).argmin(1)
            return tokens, None
        regular = tokens == self.state(REGULAR) if self.states else ~empty
        scores = np.full(len(numbers), np.nan, dtype=np.float32)
        scores[regular & ~empty] = self.quantiles.encode(numbers[regular & ~empty], rng)
        return (tokens if self.states else None), scores

    def decode(self, tokens: np.ndarray | None, scores: np.ndarray | None, n: int, rng, start: int = 0) -> pd.Series:
        """The column again, (n,) in its own dtype."""
        if self.column.kind == "constant":
            return self._series([None if self.fill is None else _untag(self.fill)] * n)
        if self.column.kind == "identifier":
            whole = isinstance(self.fill, int)
            return self._series([self.fill + start + i if whole else f"{self.fill}{start + i + 1}" for i in range(n)])
        if self.numeric:
            numbers = np.zeros(n) if scores is None else self.quantiles.decode(scores)
            empty = np.zeros(n, dtype=bool)
            for i, (role, *rest) in enumerate(self.states):
                if role == "v":
                    numbers[tokens == i] = rest[0]
                elif role == "missing":
                    empty |= tokens == i
            return self.from_numbers(numbers, empty)
        table = np.empty(len(self.states), dtype=object)
        for i, (role, *rest) in enumerate(self.states):
            table[i] = _untag(rest[0]) if role == "v" else None
        values = table[tokens]
        if self.rare:
            at = np.flatnonzero(tokens == self.state(RARE))
            rows = np.array([count for _, count in self.rare], dtype=np.float64)
            for i, j in zip(at, rng.choice(len(rows), len(at), p=rows / rows.sum()), strict=True):
                values[i] = _untag(self.rare[j][0])
        return self._series(list(values))

    def state(self, role: list) -> int:
        """The token of a state that is no value; −1 where the column has none."""
        return self.states.index(role) if role in self.states else -1

    def from_numbers(self, numbers: np.ndarray, empty: np.ndarray | None = None) -> pd.Series:
        """Numbers in the column's own dtype and resolution, `empty` cells empty."""
        column, empty = self.column, np.zeros(len(numbers), dtype=bool) if empty is None else empty
        if column.kind == "datetime":
            ns = np.where(empty, 0, np.round(np.nan_to_num(numbers))).astype(np.int64) * STEPS[column.step or "ns"]
            values = pd.Series(ns.astype("datetime64[ns]")).mask(empty)
            if column.format is not None:
                values = values.dt.strftime(column.format).astype(object)
                return self._series([None if e else v for v, e in zip(values, empty, strict=True)])
            if column.dtype == "object":  # dates without a time
                return pd.Series([None if e else v for v, e in zip(values.dt.date, empty, strict=True)], dtype=object)
            aware = "," in column.dtype
            return (values.dt.tz_localize("UTC") if aware else values).astype(column.dtype)
        if column.kind == "continuous" and column.decimals is not None:
            numbers = np.round(numbers, column.decimals)
        if "float" in column.dtype.lower():
            return pd.Series(np.where(empty, np.nan, numbers)).astype(column.dtype)
        values = pd.Series(np.where(empty, 0.0, numbers)).round().astype("int64")
        if empty.any():
            values = values.astype("Int64").mask(empty)
        return values.astype(column.dtype) if column.dtype != "object" else values.astype(object)

    def _series(self, values: list) -> pd.Series:
        if self.categories is not None:
            categories = pd.Index([_untag(tag) for tag in self.categories], dtype=self.category_dtype)
            return pd.Series(pd.Categorical(values, categories, ordered=self.ordered))
        if self.nothing == "nan":
            values = [np.nan if v is None else v for v in values]
        if self.column.dtype in ("object", "category"):
            return pd.Series(values, dtype=object)
        # not through pd.array: pandas 3.1 turns large uint64 into zeros there
        return pd.Series(values, dtype=TEXT if self.column.dtype == "str" else self.column.dtype)


class TableCodec:
    """All columns of a table; `tokens` and `numbers` name those that have a token, and a score."""

    def __init__(self, columns: list[ColumnCodec], rows: int):
        self.columns, self.rows = {c.name: c for c in columns}, rows
        self.tokens = [c.name for c in columns if c.states]
        self.numbers = [c.name for c in columns if c.quantiles is not None]

    @classmethod
    def fit(cls, table: pd.DataFrame, schema: Schema, how: Encoding, seed: int = 0) -> TableCodec:
        """Raises ValueError for a schema that does not fit the table, or a table with nothing to model."""
        check_columns(table, [c.name for c in schema.columns])
        rng = np.random.default_rng(seed)
        made = cls([ColumnCodec.fit(c, table[c.name], how, rng) for c in schema.columns], len(table))
        if not made.tokens and not made.numbers:
            raise ValueError(
                "nothing to model: every column is constant or an identifier; set another kind in the schema"
            )
        return made

    @property
    def schema(self) -> Schema:
        return Schema(columns=[c.column for c in self.columns.values()])

    @property
    def states(self) -> list[int]:
        """States of every token column."""
        return [len(self.columns[name].states) for name in self.tokens]

    def encode(self, table: pd.DataFrame, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens (N, C) int64, −1 for an empty cell without a state, and scores (N, C) float32, NaN for none."""
        check_columns(table, list(self.columns))
        rng = np.random.default_rng(seed)
        coded = {name: c.encode(table[name], rng) for name, c in self.columns.items()}
        tokens = [coded[name][0] for name in self.tokens]
        scores = [coded[name][1] for name in self.numbers]
        return (
            torch.from_numpy(np.stack(tokens, 1)) if tokens else torch.zeros(len(table), 0, dtype=torch.int64),
            torch.from_numpy(np.stack(scores, 1).astype(np.float32)) if scores else torch.zeros(len(table), 0),
        )

    def decode(self, tokens: Tensor, scores: Tensor, seed: int = 0, start: int = 0) -> pd.DataFrame:
        """The table of these cells; `start` is the number of rows made before, for identifiers."""
        rng, n = np.random.default_rng(seed), len(tokens)
        tokens, scores = tokens.cpu().numpy(), scores.float().cpu().numpy()
        made = {}
        for name, c in self.columns.items():
            token = tokens[:, self.tokens.index(name)] if name in self.tokens else None
            score = scores[:, self.numbers.index(name)] if name in self.numbers else None
            made[name] = c.decode(token, score, n, rng, start)
        return pd.DataFrame(made)

    def to_json(self) -> dict:
        rows = []
        for c in self.columns.values():
            row = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
            row["column"] = c.column.model_dump()
            row["quantiles"] = None if c.quantiles is None else dataclasses.asdict(c.quantiles)
            rows.append(row)
        return {"rows": self.rows, "columns": rows}

    @classmethod
    def from_json(cls, saved: dict) -> TableCodec:
        columns = []
        for row in saved["columns"]:
            quantiles = None if row["quantiles"] is None else Quantiles(**row["quantiles"])
            columns.append(ColumnCodec(**{**row, "column": Column(**row["column"]), "quantiles": quantiles}))
        return cls(columns, saved["rows"])


def check_columns(table: pd.DataFrame, names: list) -> None:
    """Raise ValueError, naming the column, unless the table has these columns, once each."""
    for name in names:
        if name not in table.columns:
            raise ValueError(f"column {name!r} is missing; the table has {', '.join(map(str, table.columns))}")
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise ValueError(f"column name {twice[0]!r} occurs more than once: rename one of them")


def _tag(value) -> str:
    """A value as "type:value", so that 1, True, 1.0 and "1" stay four values, in JSON as well."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, pd.Timestamp):
        return f"date:{value.isoformat()}"
    return f"{type(value).__name__}:{value}"


def _tags(values: pd.Series) -> list[str]:
    return [_tag(v) for v in values]


def sort_tags(tags: list[str]) -> list[str]:
    """Tags in the order of their values: numbers by size, text by its characters."""
    values = {tag: _untag(tag) for tag in tags}
    text = any(isinstance(value, str) for value in values.values())
    return sorted(tags, key=lambda tag: str(values[tag]) if text else values[tag])


def _untag(tag: str):
    kind, value = tag.split(":", 1)
    if kind == "bool":
        return value == "True"
    return {"int": int, "float": float, "date": pd.Timestamp}.get(kind, str)(value)
