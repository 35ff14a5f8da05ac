"""Conditions on single columns, as `TableSynthesizer.sample(where=…)` takes them, in terms of tokens and z."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from ...model.codecs.table.column import MISSING, RARE, REGULAR, ColumnCodec
from ...model.codecs.table.rows import as_in_training

ColumnCondition = Any  # a value, or (low, high) with None for an open end; None or NaN asks for a missing cell


@dataclasses.dataclass
class RangeConstraint:
    """A column that is sampled within a range.

    Args:
        allowed: (K,) bool, the states in the range; None if there is only one, or the column has no states.
        interval: the part of the quantile curve in the range, see `Quantiles.interval`; None if there is none.
    """

    codec: ColumnCodec
    allowed: Tensor | None
    interval: tuple[float, float] | None


def allowed_states(codec: ColumnCodec, condition: ColumnCondition) -> tuple[np.ndarray, tuple[float, float] | None]:
    """The states of a column that satisfy a condition, (K,) bool, and the interval of its quantile curve that does.

    Raises:
        ValueError: nothing satisfies it.
    """
    is_range = isinstance(condition, tuple)
    if not is_range and pd.isna(condition):
        if codec.state(MISSING) < 0:
            raise ValueError(f"column {codec.name!r} had no empty cells in training")
        return _only(codec, codec.state(MISSING)), None
    if codec.is_numerical:
        return _allowed_numbers(codec, condition)
    if is_range:
        raise ValueError(f"column {codec.name!r} is {codec.column.kind}: give a value, not a range")
    token = _token(codec, condition)
    if codec.states[token] == RARE:
        raise ValueError(
            f"column {codec.name!r}: {condition!r} is too rare, it is pooled with others (encoding.max_categories)"
        )
    return _only(codec, token), None


def is_single_number(codec: ColumnCodec, condition: ColumnCondition) -> bool:
    """Whether the condition is one number or date, rather than a range, a category or a missing cell."""
    return codec.is_numerical and not isinstance(condition, tuple) and not pd.isna(condition)


def _only(codec: ColumnCodec, token: int) -> np.ndarray:
    return np.arange(len(codec.states)) == token


def _token(codec: ColumnCodec, value: Any) -> int:
    """The token of a category, which may be a number written as text, as from a command line."""
    values = as_in_training(codec, pd.Series([value], dtype=object))
    tokens, _ = codec.encode(values, np.random.default_rng(0))
    return int(tokens[0])


def _allowed_numbers(codec: ColumnCodec, condition: ColumnCondition) -> tuple[np.ndarray, tuple[float, float] | None]:
    """`allowed_states` of a numerical column and a number or range."""
    is_range = isinstance(condition, tuple)
    ends = condition if is_range else (condition, condition)
    low, high = _number(codec, ends[0], -math.inf), _number(codec, ends[1], math.inf)
    if low > high:
        raise ValueError(f"column {codec.name!r}: the range {ends[0]}..{ends[1]} is empty")
    allowed = np.zeros(len(codec.states), dtype=bool)
    for token, value in codec.value_states():
        allowed[token] = low <= value <= high
    curve, interval = codec.quantiles, None
    is_state = low == high and allowed.any()
    if curve is not None and not is_state and low <= curve.high and high >= curve.low:
        interval = curve.interval(low, high)
        if codec.state(REGULAR) >= 0:
            allowed[codec.state(REGULAR)] = True
    if interval is None and not allowed.any():
        smallest, largest = _range_of(codec)
        raise ValueError(
            f"column {codec.name!r} has no value in {f'{ends[0]}..{ends[1]}' if is_range else condition}; "
            f"its values are from {smallest} to {largest}"
        )
    return allowed, interval


def _number(codec: ColumnCodec, value: Any, default: float) -> float:
    """A number, or a date as a number; the default for an open end (None or a blank text)."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return default
    return float(codec.to_numbers(pd.Series([value]))[0])


def _range_of(codec: ColumnCodec) -> pd.Series:
    """The smallest and the largest training value, in the column's dtype."""
    values = [value for _, value in codec.value_states()]
    if codec.quantiles is not None:
        values += [codec.quantiles.low, codec.quantiles.high]
    return codec.from_numbers(np.array([min(values), max(values)]))
