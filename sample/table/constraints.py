"""What a condition leaves of one column, in terms of tokens and z."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from ...model.codecs.table.column import MISSING, RARE, REGULAR, ColumnCodec
from ...model.codecs.table.tags import from_tag
from .values import Both, ColumnCondition, Values, ordered_tags, parse

NARROW = 0.02  # width of a range of z that is like one number


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
    def is_number(self) -> bool:
        """Whether the set is one regular number."""
        low, high = self.values.intervals[0] if len(self.values.intervals) == 1 else (0.0, 1.0)
        return self._is_one_span and low == high

    @property
    def is_narrow(self) -> bool:
        """Whether the set is one range of regular numbers within which densities hardly change."""
        return self._is_one_span and float(np.diff(self.codec.quantiles.to_z(np.array(self.spans[0])))[0]) < NARROW

    @property
    def _is_one_span(self) -> bool:
        return len(self.spans) == 1 and self.tokens.sum() == bool(self.codec.states)

    def is_given(self, observes: bool) -> bool:
        """Whether the set is like one value, which is an observed cell.

        observes: whether numbers can be given to the network as observed.
        """
        return self.token >= 0 or self.is_number or (observes and self.is_narrow)

    @property
    def is_whole(self) -> bool:
        """Whether all values of a column without numbers z are in the set."""
        return self.codec.quantiles is None and bool(self.tokens.all() and self.rare.all())

    def state_shares(self) -> np.ndarray:
        """(K,) the share of each state that can be in the set: of RARE, that of its rows."""
        shares = self.tokens.astype(np.float64)
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


def as_decoded(codec: ColumnCodec, numbers: np.ndarray) -> np.ndarray:
    """Numbers as they are once they are in the column's dtype and resolution."""
    return codec.to_numbers(codec.from_numbers(numbers))


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
