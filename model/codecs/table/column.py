"""The codec of one column: its values ↔ a token, a z, or both.

| column | token | z |
|---|---|---|
| categorical, boolean; numbers and dates with few distinct values | one state per value | none |
| continuous, integer, date | none | z of its quantile (`quantiles.Quantiles`) |
| the same with missing cells, infinities or frequent values | "regular", or which of these | of regular cells |
| constant, identifier | none | none |

A missing cell is a state of its own. The rarest categories share one state, RARE; it decodes to one of them, drawn by
their frequencies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from . import cells, decoding
from .dates import MONTHS
from .dtypes import dtype_of
from .dtypes import plain as plain_dtype
from .encoding import EncodingConfig
from .identifiers import find_pattern, new_identifier
from .quantiles import Quantiles
from .schema import NUMERICAL_KINDS, TEXT, Column
from .tags import from_tag, to_tag

REGULAR, MISSING, RARE = ["regular"], ["missing"], ["rare"]  # states that are not one value; a value is ["v", value]


@dataclasses.dataclass
class ColumnCodec:
    """The codec of one column.

    Args:
        states: the meaning of each token; [] for a column without tokens.
        rare: the categories of the RARE state as [tag, number of training rows].
        fill: the value of a constant; of an identifier, the next number, or how texts are made (`identifiers`).
        categories, category_dtype, ordered: of a pandas categorical column.
        nothing: how a missing cell of an object column is decoded, "none" or "nan".
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
    def name(self) -> str | int:
        return self.column.name

    @property
    def is_numerical(self) -> bool:
        """Whether cells are numbers or dates, with a token or with a z."""
        return self.column.kind in NUMERICAL_KINDS

    @property
    def width(self) -> float:
        """The distance between neighbouring values of a numerical column; 0 if values are not rounded."""
        if self.column.increment is not None:
            return float(self.column.increment)
        if self.column.kind == "continuous":
            return 0.0 if self.column.decimals is None else 10.0**-self.column.decimals
        return 1.0

    def state(self, role: list) -> int:
        """The token of REGULAR, MISSING or RARE; −1 if the column has no such state."""
        return self.states.index(role) if role in self.states else -1

    @property
    def pooling(self) -> str | None:
        """A line that says what is pooled; None where nothing is."""
        if not self.rare:
            return None
        pooled, rows = len(self.rare), sum(count for _, count in self.rare)
        return (
            f"column {self.name!r} has {pooled + len(self.value_states()):,} categories: the {pooled:,} rarest, of "
            f"{rows:,} rows, are one to the model, which draws among them whatever the rest of the row is; "
            f"encoding.max_categories=N keeps N apart"
        )

    def value_states(self) -> list[tuple[int, Any]]:
        """(token, value or tag) of the states that are one value."""
        return [(token, state[1]) for token, state in enumerate(self.states) if state[0] == "v"]

    @classmethod
    def fit(cls, column: Column, values: pd.Series, config: EncodingConfig, rng: np.random.Generator) -> ColumnCodec:
        """The codec of a column with these training values.

        Raises:
            ValueError: a cell that does not fit the column's kind.
        """
        codec = cls(column)
        values = plain_dtype(values)
        if isinstance(values.dtype, pd.CategoricalDtype):
            codec.categories, codec.ordered = [to_tag(v) for v in values.cat.categories], values.cat.ordered
            codec.category_dtype = str(values.cat.categories.dtype)
        missing = values.isna()
        if missing.any() and values.dtype == object:
            codec.nothing = "none" if values[missing].iloc[0] is None else "nan"
        if column.kind == "constant":
            codec.fill = None if missing.all() else to_tag(values.dropna().iloc[0])
        elif column.kind == "identifier":
            codec._fit_identifier(values)
        elif codec.is_numerical:
            numbers = codec.to_numbers(values)
            codec._check_grid(numbers)
            codec._fit_numerical(numbers, config, rng)
        else:
            codec._fit_categorical(values, config.max_categories)
        return codec

    def _check_grid(self, numbers: np.ndarray) -> None:
        """Raise ValueError if cells are off the increment or the months that an edited schema gives."""
        if self.column.increment is None and self.column.step not in MONTHS:
            return
        finite = numbers[np.isfinite(numbers)] / (self.column.increment or 1)
        if (np.abs(finite - np.round(finite)) > 1e-6).any():
            raise ValueError(
                f"column {self.name!r} has cells between the steps of the schema: delete its step, increment and "
                "offset, which are then inferred"
            )

    def _fit_identifier(self, values: pd.Series) -> None:
        present = values[~cells.gaps(self.column, values)]
        if len(present) < len(values):
            self.states = [REGULAR, MISSING]
        if all(isinstance(value, int | np.integer) for value in present):
            self.fill = int(present.max()) + 1
        else:
            self.fill = find_pattern([str(value) for value in present], self.name)

    def _fit_categorical(self, values: pd.Series, max_categories: int) -> None:
        missing = values.isna()
        counts = pd.Series(_tags(values[~missing])).value_counts(sort=True)
        order = sorted(counts.index, key=lambda tag: (-counts[tag], tag))
        kept = order if len(order) <= max_categories else order[: max_categories - 1]
        self.states = [["v", tag] for tag in sorted(kept)]
        self.rare = [[tag, int(counts[tag])] for tag in order[len(kept) :]]
        self.states += [RARE] * bool(self.rare) + [MISSING] * bool(missing.any())

    def _fit_numerical(self, numbers: np.ndarray, config: EncodingConfig, rng: np.random.Generator) -> None:
        present = numbers[~np.isnan(numbers)]
        values, counts = np.unique(present, return_counts=True)
        finite = np.isfinite(values)
        if len(values) <= min(config.max_discrete_values, len(present) // 5):
            self.states = [["v", float(v)] for v in values]
        else:
            frequent = (counts >= config.spike_share * len(numbers)) & (counts >= 20)
            if finite[~frequent].sum() < 2:
                frequent[:] = True
            split_off = frequent | ~finite | (_far_ends(values) if self.column.kind == "datetime" else False)
            self.states = [["v", float(v)] for v in values[split_off]]
            regular = present[~np.isin(present, values[split_off])]
            if len(regular):
                self.states = [REGULAR, *self.states] if self.states else []
                self.quantiles = Quantiles.fit(regular, self.width, config.n_quantiles, rng, config.tail_rows)
        if len(present) < len(numbers):
            self.states = (self.states or [REGULAR]) + [MISSING]

    def encode(self, values: pd.Series, rng: np.random.Generator) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(tokens (N,) int64 or None, z (N,) float32 or None).

        The token of a missing cell is −1 if the column has no such state; z is NaN where a cell is not regular.

        Raises:
            ValueError: a category that did not occur in training, or a cell that is not a number or a date.
        """
        if self.column.kind in ("constant", "identifier"):
            missing = cells.gaps(self.column, values)
            return (np.where(missing, self.state(MISSING), self.state(REGULAR)) if self.states else None), None
        if not self.is_numerical:
            return self._encode_categorical(values), None
        numbers = self.to_numbers(values)
        missing = np.isnan(numbers)
        tokens = np.full(len(numbers), self.state(REGULAR), dtype=np.int64)
        for token, value in self.value_states():
            tokens[numbers == value] = token
        tokens[missing] = self.state(MISSING)
        if self.quantiles is None:
            return self._nearest(tokens, numbers), None
        regular = ~missing
        if self.states:
            regular &= tokens == self.state(REGULAR)
        z = np.full(len(numbers), np.nan, dtype=np.float32)
        z[regular] = self.quantiles.encode(numbers[regular], rng)
        return (tokens if self.states else None), z

    def _encode_categorical(self, values: pd.Series) -> np.ndarray:
        missing = values.isna().to_numpy()
        token_of = {tag: token for token, tag in self.value_states()}
        token_of |= dict.fromkeys((tag for tag, _ in self.rare), len(token_of))
        tags = _tags(values[~missing])
        unseen = [tag for tag in set(tags) if tag not in token_of]
        if unseen:
            raise ValueError(f"column {self.name!r}: {from_tag(unseen[0])!r} did not occur in training")
        tokens = np.full(len(values), -1, dtype=np.int64)
        tokens[~missing] = [token_of[tag] for tag in tags]
        tokens[missing] = self.state(MISSING)
        return tokens

    def _nearest(self, tokens: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Numbers that did not occur in training get the token of the nearest one that did."""
        unseen = (tokens < 0) & ~np.isnan(numbers)
        if unseen.any():
            values = np.array([value for _, value in self.value_states()])
            tokens[unseen] = np.abs(numbers[unseen][:, None] - values).argmin(1)
        return tokens

    def decode(
        self,
        tokens: np.ndarray | None,
        z: np.ndarray | None,
        n: int,
        rng: np.random.Generator | None,
        start: int = 0,
    ) -> pd.Series:
        """The n values in the column's dtype; `start` counts the rows made before, for identifiers."""
        if self.column.kind == "constant":
            return self._series([None if self.fill is None else from_tag(self.fill)] * n)
        if self.column.kind == "identifier":
            return self._decode_identifiers(tokens, n, start)
        if not self.is_numerical:
            return self._decode_categorical(tokens, rng)
        numbers = np.zeros(n) if z is None else self.quantiles.decode(z)
        for token, value in self.value_states():
            numbers[tokens == token] = value
        missing = tokens == self.state(MISSING) if MISSING in self.states else np.zeros(n, dtype=bool)
        return self.from_numbers(numbers, missing)

    def _decode_identifiers(self, tokens: np.ndarray | None, n: int, start: int) -> pd.Series:
        new: list = (
            [self.fill + start + i for i in range(n)]
            if isinstance(self.fill, int)
            else [new_identifier(self.fill, start + i) for i in range(n)]
        )
        if self.states and tokens is not None:
            new = [None if token == self.state(MISSING) else v for token, v in zip(tokens, new, strict=True)]
        return self._series(new)

    def _decode_categorical(self, tokens: np.ndarray, rng: np.random.Generator | None) -> pd.Series:
        value_of = np.full(len(self.states), None, dtype=object)
        for token, tag in self.value_states():
            value_of[token] = from_tag(tag)
        values = value_of[tokens]
        if self.rare:
            rows = np.flatnonzero(tokens == self.state(RARE))
            counts = np.array([count for _, count in self.rare], dtype=np.float64)
            chosen = rng.choice(len(counts), len(rows), p=counts / counts.sum())
            for row, category in zip(rows, chosen, strict=True):
                values[row] = from_tag(self.rare[category][0])
        return self._series(list(values))

    def to_numbers(self, values: pd.Series) -> np.ndarray:
        """float64 (N,) with NaN for missing cells, see `cells.to_numbers`.

        Raises:
            ValueError: a cell is not a number or not a date.
        """
        return cells.to_numbers(self.column, values)

    def from_numbers(self, numbers: np.ndarray, missing: np.ndarray | None = None) -> pd.Series:
        """Numbers (N,) in the column's dtype and spelling; cells where `missing` (N,) is True are missing."""
        missing = np.zeros(len(numbers), dtype=bool) if missing is None else missing
        made = decoding.from_numbers(self.column, numbers, missing)
        return self._series(made) if isinstance(made, list) else made

    def _series(self, values: list) -> pd.Series:
        """Values that are not numbers, None for a missing one, in the column's dtype."""
        if self.categories is not None:
            categories = pd.Index([from_tag(tag) for tag in self.categories], dtype=self.category_dtype)
            made = pd.Series(pd.Categorical(values, categories, ordered=self.ordered))
            return made if self.column.dtype == "category" else made.astype(dtype_of(self.column.dtype or "category"))
        if self.nothing == "nan":
            values = [np.nan if v is None else v for v in values]
        name = self.column.dtype or "object"
        if name in ("object", "category"):
            return pd.Series(values, dtype=object)
        # not by pd.array: pandas 3.1 turns large uint64 into zeros there
        return pd.Series(values, dtype=TEXT if name == "str" else dtype_of(name))


def _far_ends(values: np.ndarray) -> np.ndarray:
    """(N,) bool: sorted values at either end that are farther from the others than these span: 9999-12-31."""
    low, high = 0, len(values) - 1
    while high - low > 2:
        if values[high] - values[high - 1] > values[high - 1] - values[low]:
            high -= 1
        elif values[low + 1] - values[low] > values[high] - values[low + 1]:
            low += 1
        else:
            break
    index = np.arange(len(values))
    return ((index < low) | (index > high)) & (high - low > 2)


def _tags(values: pd.Series) -> list[str]:
    return [to_tag(v) for v in values]
