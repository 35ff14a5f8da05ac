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

from ...model.codecs.table.column import MISSING, ColumnCodec, from_tag, sort_tags, to_tag

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


def _parse_text(codec: ColumnCodec, text: str) -> Values:
    """The set of a text that is no category."""
    if text.lower().removeprefix("is ") in NOT_EMPTY:
        return ANYTHING
    if text == "":
        return _missing(codec)
    if listed := LIST.fullmatch(text):
        (cells,) = list(csv.reader([listed[2]], skipinitialspace=True)) or [[]]
        allowed = ANYTHING if listed[1] else Values()
        for cell in cells:
            one = _compare(codec, "!=" if listed[1] else "=", cell.strip())
            allowed = allowed & one if listed[1] else allowed | one
        return allowed
    if text.startswith(OPERATORS):
        values = Values(ANYTHING.intervals, True)
        for part in AND.split(text):
            operator = next((o for o in OPERATORS if part.startswith(o)), "")
            if not operator:
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
