"""Conditions on single columns: what `TableSynthesizer.sample(where=…)` takes, as sets of values.

A set is a union of closed intervals of numbers (see `ColumnCodec.to_numbers`), and whether a missing cell is in it.
Categories are the numbers 0, 1, … in their order, so that one arithmetic serves all columns.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ...model.codecs.table.column import MISSING, RARE, REGULAR, ColumnCodec, from_tag, sort_tags, to_tag

ColumnCondition = Any  # see `parse`

OPERATORS = (">=", "<=", "!=", "==", "=", ">", "<")
AND = re.compile(r"\s*(?:&&?|,|\band\b)\s*(?=[<>=!])", re.IGNORECASE)
LIST = re.compile(r"(not\s+)?in\s*[{(\[](.*)[})\]]", re.IGNORECASE | re.DOTALL)
NOT_EMPTY = ("not null", "not empty", "not missing")


@dataclasses.dataclass(frozen=True)
class Values:
    """A set of values: closed intervals of numbers, and whether a missing cell is in it."""

    intervals: tuple[tuple[float, float], ...] = ()
    missing: bool = False

    def __or__(self, other: Values) -> Values:
        return Values(self.intervals + other.intervals, self.missing or other.missing)

    def __and__(self, other: Values) -> Values:
        both = [(max(a, c), min(b, d)) for a, b in self.intervals for c, d in other.intervals]
        return Values(tuple((low, high) for low, high in both if low <= high), self.missing and other.missing)

    def contains(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) bool, of numbers with NaN for a missing cell."""
        inside = np.isnan(numbers) & self.missing
        for low, high in self.intervals:
            inside |= (low <= numbers) & (numbers <= high)
        return inside

    def nearest(self, numbers: np.ndarray) -> np.ndarray:
        """The nearest numbers in the intervals."""
        choices = np.array([np.clip(numbers, low, high) for low, high in self.intervals])
        return choices[np.abs(choices - numbers).argmin(0), np.arange(len(numbers))]


class Both(tuple):
    """Conditions that must all hold."""


ANYTHING = Values(((-math.inf, math.inf),))


@dataclasses.dataclass
class Region:
    """What a condition allows one column.

    Args:
        values: the set, of numbers within the training range.
        tokens: (K,) bool, the states in the set; REGULAR and RARE if a part of them is.
        rare: (R,) bool, the pooled categories in the set.
        spans: the parts of the quantile curve in the set, see `Quantiles.interval`.
    """

    codec: ColumnCodec
    values: Values
    tokens: np.ndarray
    rare: np.ndarray
    spans: list[tuple[float, float]]

    @classmethod
    def of(cls, codec: ColumnCodec, condition: ColumnCondition) -> Region:
        """Raises ValueError if nothing in the column satisfies the condition."""
        return cls.holding(codec, parse(codec, condition), condition)

    @classmethod
    def holding(cls, codec: ColumnCodec, values: Values, condition: ColumnCondition) -> Region:
        """The region of a set; `condition` is shown in errors.

        Raises:
            ValueError: nothing in the column is in the set.
        """
        tokens, rare = np.zeros(len(codec.states), dtype=bool), np.zeros(0, dtype=bool)
        spans: list[tuple[float, float]] = []
        if codec.state(MISSING) >= 0:
            tokens[codec.state(MISSING)] = values.missing
        if not codec.is_numerical:
            position = {tag: i for i, tag in enumerate(ordered_tags(codec))}
            for token, tag in codec.value_states():
                tokens[token] = values.contains(np.array([float(position[tag])]))[0]
            rare = values.contains(np.array([position[tag] for tag, _ in codec.rare], dtype=np.float64))
            if codec.rare:
                tokens[codec.state(RARE)] = rare.any()
        else:
            for token, value in codec.value_states():
                tokens[token] = values.contains(np.array([value]))[0]
            values, spans = _within_training(codec, values, tokens)
            if spans and codec.states:
                tokens[codec.state(REGULAR)] = True
        if not tokens.any() and not spans:
            raise ValueError(_nothing_fits(codec, condition))
        return cls(codec, values, tokens, rare, spans)

    @property
    def token(self) -> int:
        """The token, if the set leaves only one and no choice of a number with it; else −1."""
        return int(self.tokens.argmax()) if self.tokens.sum() == 1 and not self.spans else -1

    @property
    def number(self) -> float | None:
        """The number, if it is the only regular one in the set and nothing else is."""
        low, high = self.values.intervals[0] if len(self.values.intervals) == 1 else (0.0, 1.0)
        return low if self.spans and low == high and self.tokens.sum() == bool(self.codec.states) else None

    @property
    def is_exact(self) -> bool:
        """Whether the set is one value, which then is an observed cell."""
        return self.token >= 0 or self.number is not None

    def state_shares(self) -> np.ndarray:
        """(K,) the share of each state that is in the set: of REGULAR, of the training values; of RARE, of its rows."""
        shares = self.tokens.astype(np.float64)
        if self.spans and self.codec.states:
            shares[self.codec.state(REGULAR)] = max(sum(high - low for low, high in self.spans), 1e-12)
        if self.codec.rare:
            shares[self.codec.state(RARE)] = self._share_of_rare()
        return shares

    def _share_of_rare(self) -> float:
        counts = np.array([count for _, count in self.codec.rare], dtype=np.float64)
        return float(counts[self.rare].sum() / counts.sum())

    def accepts(self, tokens: np.ndarray | None, z: np.ndarray | None, uniforms: np.ndarray) -> np.ndarray:
        """(N,) bool: the cells that are in the set; of pooled categories the share of them that is."""
        inside = np.ones(len(uniforms), dtype=bool) if tokens is None else self.tokens[tokens]
        if z is not None:
            regular = np.ones(len(z), dtype=bool) if tokens is None else tokens == self.codec.state(REGULAR)
            numbers = self.codec.quantiles.decode(z[regular])
            inside[regular] = self.values.contains(self.codec.to_numbers(self.codec.from_numbers(numbers)))
        if self.codec.rare:
            here = tokens == self.codec.state(RARE)
            inside[here] &= uniforms[here] < self._share_of_rare()
        return inside

    def enforce(self, decoded: pd.Series, rng: np.random.Generator) -> pd.Series:
        """Cells in the set in the place of those that are not, because rounding moved them or they were pooled."""
        if self.codec.is_numerical:
            numbers = self.codec.to_numbers(decoded)
            wrong = ~self.values.contains(numbers) & ~np.isnan(numbers)
            return decoded.mask(wrong, self._representable(numbers)) if wrong.any() else decoded
        if not self.codec.rare or not self.rare.any():
            return decoded
        tags = [tag for tag, _ in self.codec.rare]
        weights = np.array([count for _, count in self.codec.rare]) * self.rare
        forbidden = {from_tag(tag) for tag, good in zip(tags, self.rare, strict=True) if not good}
        wrong = decoded.isin(forbidden).to_numpy()
        chosen = rng.choice(len(tags), len(decoded), p=weights / weights.sum())
        return decoded.mask(wrong, pd.Series([from_tag(tags[i]) for i in chosen], index=decoded.index, dtype=object))

    def _representable(self, numbers: np.ndarray) -> pd.Series:
        """The nearest values in the set, in the column's dtype and resolution."""
        target = self.values.nearest(np.nan_to_num(numbers))
        width, best = self.codec.width, target
        if width:
            for away in (2.0, -2.0, 1.0, -1.0, 0.0):
                value = (np.round(target / width) + away) * width
                best = np.where(self.values.contains(as_decoded(self.codec, value)), value, best)
        return self.codec.from_numbers(best)


def parse(codec: ColumnCodec, condition: ColumnCondition) -> Values:
    """The set of values that a condition allows.

    A condition is a value; (low, high) of a numerical column, None for an open end; a list, set or array of
    conditions, one of which must hold; None or NaN for a missing cell; a text such as ">30", ">=18, <65", "!=north",
    "30..40", "in {a, b}" or "not null". A text that is a category of the column is that category.

    Raises:
        ValueError: a value that the column does not have, an empty range, a comparison of categories without an order.
    """
    if isinstance(condition, Mapping):
        raise ValueError(f"column {codec.name!r}: a condition is a value, a range or a list, not a mapping")
    if isinstance(condition, Both):
        values = Values(ANYTHING.intervals, True)
        for one in condition:
            values &= parse(codec, one)
        return values
    if isinstance(condition, pd.Interval):
        ends = (
            ((">=", condition.left) if condition.closed_left else (">", condition.left)),
            (("<=", condition.right) if condition.closed_right else ("<", condition.right)),
        )
        return _compare(codec, *ends[0]) & _compare(codec, *ends[1])
    if isinstance(condition, tuple) and len(condition) == 2 and codec.is_numerical:
        return _range(codec, *condition)
    if isinstance(condition, Collection | pd.Series | pd.Index | np.ndarray) and not isinstance(condition, str | bytes):
        if isinstance(condition, np.ndarray) and condition.ndim == 0:
            return parse(codec, condition.item())
        if not len(condition):
            raise ValueError(f"column {codec.name!r}: an empty list allows no value")
        values = Values()
        for one in condition:
            values |= parse(codec, one)
        return values
    if condition is None or pd.isna(condition):
        return _missing(codec)
    if isinstance(condition, str) and (codec.is_numerical or _position(codec, condition) is None):
        return _parse_text(codec, condition.strip())
    return _compare(codec, "=", condition)


def is_empty(condition: ColumnCondition) -> bool:
    """Whether a cell of a table of conditions is no condition."""
    return condition == "" if isinstance(condition, str) else pd.api.types.is_scalar(condition) and pd.isna(condition)


def ordered_tags(codec: ColumnCodec) -> list[str]:
    """The tags of all categories of a column, in the order of their values."""
    tags = [tag for _, tag in codec.value_states()] + [tag for tag, _ in codec.rare]
    if codec.ordered and codec.categories is not None:
        return sorted(tags, key=codec.categories.index)
    return sort_tags(tags)


def as_decoded(codec: ColumnCodec, numbers: np.ndarray) -> np.ndarray:
    """Numbers as they are once they are in the column's dtype and resolution."""
    return codec.to_numbers(codec.from_numbers(numbers))


def _parse_text(codec: ColumnCodec, text: str) -> Values:
    """The set of a text that is no category."""
    if text.lower().removeprefix("is ") in NOT_EMPTY:
        return ANYTHING
    if text == "":
        return _missing(codec)
    if listed := LIST.fullmatch(text):
        (cells,) = list(csv.reader([listed[2]], skipinitialspace=True)) or [[]]
        values, name = [cell.strip() for cell in cells], "!=" if listed[1] else "="
        parts = [_compare(codec, name, value) for value in values]
        whole = ANYTHING if listed[1] else Values()
        for part in parts:
            whole = whole & part if listed[1] else whole | part
        return whole
    if text.startswith(OPERATORS):
        values = Values(ANYTHING.intervals, True)
        for part in AND.split(text):
            operator = next((o for o in OPERATORS if part.startswith(o)), None)
            if operator is None:
                raise ValueError(f"column {codec.name!r}: {part!r} in {text!r} is not a comparison such as >=30")
            values &= _compare(codec, operator, part[len(operator) :].strip())
        return values
    if codec.is_numerical and ".." in text:
        low, _, high = text.partition("..")
        return _range(codec, low, high)
    return _compare(codec, "=", text)


def _compare(codec: ColumnCodec, operator: str, value: Any) -> Values:
    """The set of the values that compare so with a value; a missing cell only by = and an empty text."""
    if isinstance(value, str) and value == "" and _position(codec, value) is None:
        return _missing(codec) if operator in ("=", "==") else ANYTHING
    if codec.is_numerical:
        number = _number(codec, value)
    else:
        number = _position(codec, value)
        if number is None:
            raise ValueError(_unknown(codec, value))
        if operator[0] in "<>" and not _has_order(codec):
            raise ValueError(
                f"column {codec.name!r} is {codec.column.kind}, its values have no order: give a value, a list or !="
            )
    below, above = float(np.nextafter(number, -math.inf)), float(np.nextafter(number, math.inf))
    return Values(
        {
            "=": ((number, number),),
            "==": ((number, number),),
            "!=": ((-math.inf, below), (above, math.inf)),
            ">": ((above, math.inf),),
            ">=": ((number, math.inf),),
            "<": ((-math.inf, below),),
            "<=": ((-math.inf, number),),
        }[operator]
    )


def _range(codec: ColumnCodec, low: Any, high: Any) -> Values:
    ends = (_end(codec, low, -math.inf), _end(codec, high, math.inf))
    if ends[0] > ends[1]:
        raise ValueError(f"column {codec.name!r}: the range {low}..{high} is empty")
    return Values((ends,))


def _end(codec: ColumnCodec, value: Any, default: float) -> float:
    """A number, or a date as a number; the default for an open end (None or a blank text)."""
    return default if value is None or (isinstance(value, str) and not value.strip()) else _number(codec, value)


def _number(codec: ColumnCodec, value: Any) -> float:
    """A value of a numerical column, in its own spelling or as a plain number or date."""
    if isinstance(value, str):
        value = value.strip()
    try:
        number = float(codec.to_numbers(pd.Series([value]))[0])
    except ValueError:
        if codec.column.kind != "datetime":
            plain = pd.to_numeric(pd.Series([value]), errors="coerce")
            if plain.isna().any():
                raise
            number = float(codec.to_numbers(plain)[0])
        else:
            read = pd.Series(pd.to_datetime([value], errors="coerce"))
            if read.isna().any():
                raise ValueError(f"column {codec.name!r}: {value!r} is not a date") from None
            text = read if codec.column.format is None else read.dt.strftime(codec.column.format).astype(object)
            number = float(codec.to_numbers(text)[0])
    if math.isnan(number):
        raise ValueError(
            f"column {codec.name!r}: {value!r} is not a {'date' if codec.column.kind == 'datetime' else 'number'}"
        )
    return float(np.float32(number)) if codec.column.dtype in ("float32", "Float32") else number


def _missing(codec: ColumnCodec) -> Values:
    if codec.state(MISSING) < 0:
        raise ValueError(f"column {codec.name!r} had no empty cells in training")
    return Values((), True)


def _position(codec: ColumnCodec, value: Any) -> float | None:
    """The position of a category among all; a text stands for the category that is written so, say "1" for 1."""
    if codec.is_numerical:
        return None
    tags = ordered_tags(codec)
    if isinstance(value, bool | str | int | float | np.generic | pd.Timestamp) and to_tag(value) in tags:
        return float(tags.index(to_tag(value)))
    texts = [str(from_tag(tag)) for tag in tags]
    names = [str(value)]
    if isinstance(value, int | float | np.number) and not isinstance(value, bool) and float(value).is_integer():
        names += [str(int(value)), str(float(value))]
    if codec.column.kind == "boolean":
        names += _spelt(value, texts)
    return next((float(texts.index(name)) for name in names if name in texts), None)


def _spelt(value: Any, texts: list[str]) -> list[str]:
    """The categories of a boolean column that mean the same as the value."""
    meaning = {"true": True, "yes": True, "t": True, "y": True, "1": True, "1.0": True, "on": True}
    meaning |= {"false": False, "no": False, "f": False, "n": False, "0": False, "0.0": False, "off": False}
    wanted = meaning.get(str(value).strip().lower())
    return [text for text in texts if wanted is not None and meaning.get(text.strip().lower()) == wanted]


def _has_order(codec: ColumnCodec) -> bool:
    """Whether categories are ordered, or all of them are numbers."""
    return codec.ordered or not any(isinstance(from_tag(tag), str | bool) for tag in ordered_tags(codec))


def _unknown(codec: ColumnCodec, value: Any) -> str:
    texts = [str(from_tag(tag)) for tag in ordered_tags(codec)]
    near = difflib.get_close_matches(str(value), texts, n=3)
    shown = ", ".join(texts[:12]) + (", …" if len(texts) > 12 else "")
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"column {codec.name!r} has no value {value!r}; it has {shown}{meant}"


def _nothing_fits(codec: ColumnCodec, condition: ColumnCondition) -> str:
    shown = f"{condition[0]}..{condition[1]}" if isinstance(condition, tuple) and len(condition) == 2 else condition
    if isinstance(condition, Both):
        shown = " and ".join(str(one) for one in condition)
    if not codec.is_numerical:
        return f"column {codec.name!r} has no value that is {shown}"
    values = [value for _, value in codec.value_states()]
    if codec.quantiles is not None:
        values += [codec.quantiles.low, codec.quantiles.high]
    ends = codec.from_numbers(np.array([min(values), max(values)]))
    step = f" in steps of {codec.width:g}" if codec.quantiles is not None and codec.width else ""
    return f"column {codec.name!r} has no value in {shown}; its values are from {ends[0]} to {ends[1]}{step}"


def _within_training(
    codec: ColumnCodec, values: Values, tokens: np.ndarray
) -> tuple[Values, list[tuple[float, float]]]:
    """The set within the range of the regular training values, with its states, and its parts of the curve.

    An interval without a value of the column's resolution is left out, and one number that is a state has no part.
    """
    states = [value for token, value in codec.value_states() if tokens[token]]
    points = tuple((value, value) for value in states)
    curve = codec.quantiles
    if curve is None:
        return Values(points, values.missing), []
    kept = []
    for a, b in values.intervals:
        low, high = max(a, curve.low), min(b, curve.high)
        if low <= high and not (a == b and a in states) and _has_value(codec, low, high):
            kept.append((low, high))
    return Values((*kept, *points), values.missing), [curve.interval(low, high) for low, high in kept]


def _has_value(codec: ColumnCodec, low: float, high: float) -> bool:
    """Whether a value of the column's resolution lies in [low, high]."""
    if not codec.width:
        return True
    numbers = (np.ceil(low / codec.width) + np.array([-1.0, 0.0, 1.0])) * codec.width
    return bool(Values(((low, high),)).contains(as_decoded(codec, numbers)).any())
