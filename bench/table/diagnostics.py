"""What is wrong with a synthetic table apart from its distribution: gaps, ranges, categories, keys, steps, dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from ...model.codecs.table.schema import CATEGORICAL_KINDS, NUMERICAL_KINDS, Column

CHANCE = 1e-5  # probability below which values outside the real range are no chance
FIXED_STEPS = ("day", "hour", "minute", "second", "ms", "us")
ERRORS = 4  # standard errors by which shares of missing cells differ by chance, at most


@dataclasses.dataclass(frozen=True)
class Finding:
    """One difference; `warns` marks those that new real rows would not show."""

    column: str
    what: str
    real: str
    synth: str
    warns: bool = True


@dataclasses.dataclass(frozen=True)
class Pair:
    """One column of both tables: as in the tables, and as comparable cells (see `cells.canonical`)."""

    column: Column
    real: pd.Series
    synth: pd.Series
    real_cells: pd.Series
    synth_cells: pd.Series

    @property
    def name(self) -> str:
        return str(self.column.name)


def diagnostics(
    columns: list[Column],
    raw: Mapping[str, pd.DataFrame],
    cells: Mapping[str, pd.DataFrame],
    has_types: bool,
) -> list[Finding]:
    """The findings of the tables "real" and "synth", warnings first.

    Args:
        columns: those of the real table, complete.
        raw, cells: the tables as they are, and as comparable cells.
        has_types: neither comes from a text file, so that their dtypes can be compared.
    """
    real, synth = raw["real"], raw["synth"]
    known = {column.name for column in columns}
    found = [Finding(str(c), "column is missing", "present", "–") for c in known - set(synth.columns)]
    found += [Finding(str(c), "column is new", "–", "present") for c in synth.columns if c not in set(real.columns)]
    for column in columns:
        if column.name in synth.columns:
            parts = (real, synth, cells["real"], cells["synth"])
            found += _of_column(Pair(column, *(part[column.name] for part in parts)), has_types)
    return sorted(found, key=lambda finding: not finding.warns)


def _of_column(pair: Pair, has_types: bool) -> Iterator[Finding]:
    kind = pair.column.kind
    if has_types and pair.real.dtype != pair.synth.dtype:
        yield Finding(pair.name, "another dtype", str(pair.real.dtype), str(pair.synth.dtype), warns=False)
    unreadable = pair.synth.notna() & pair.synth_cells.isna()
    if unreadable.any():
        example = str(pair.synth[unreadable].iloc[0])[:40]
        yield Finding(pair.name, f"cells that are no {_noun(pair.column)}, such as {example}", "–", _share(unreadable))
    yield from _gaps(pair)
    present, drawn = pair.real_cells.dropna(), pair.synth_cells.dropna()
    if not len(present) or not len(drawn):
        return
    if kind in NUMERICAL_KINDS:
        yield from _outside(pair, present, drawn)
        yield from _off_grid(pair, present, drawn)
    elif kind == "identifier":
        yield from _keys(pair, present, drawn)
    elif kind in (*CATEGORICAL_KINDS, "constant"):
        new = ~drawn.isin(present.unique())
        if new.any():
            once = (present.value_counts() == 1).sum()  # Good and Turing: the share of categories not seen yet
            expected = len(drawn) * float(once) / len(present)
            names = ", ".join(map(repr, drawn[new].unique()[:3]))
            what = "other values than the constant" if kind == "constant" else "new categories"
            warns = bool(new.sum() > expected + ERRORS * np.sqrt(expected))
            yield Finding(pair.name, f"{what}, such as {names}", "–", _share(new), warns)


def _gaps(pair: Pair) -> Iterator[Finding]:
    """Shares of missing cells."""
    gaps = [cells.isna() for cells in (pair.real_cells, pair.synth_cells)]
    shares = [float(gap.mean()) for gap in gaps]
    if max(shares) > 0:
        pooled = float(pd.concat(gaps).mean())
        error = np.sqrt(pooled * (1 - pooled) * sum(1 / len(gap) for gap in gaps))
        differs = abs(shares[0] - shares[1]) > ERRORS * error
        yield Finding(pair.name, "missing cells", *(f"{share:.2%}" for share in shares), warns=bool(differs))


def _outside(pair: Pair, present: pd.Series, drawn: pd.Series) -> Iterator[Finding]:
    low, high = present.min(), present.max()
    sides = [drawn < low, drawn > high]
    if any(side.any() for side in sides):
        # k of m new real values lie above the largest of n with probability (m / (n + m))^k
        chance = (len(drawn) / (len(present) + len(drawn))) ** max(side.sum() for side in sides)
        ends = f"{_shown(low)} … {_shown(high)}"
        yield Finding(pair.name, "values outside the real range", ends, _share(sides[0] | sides[1]), chance < CHANCE)
    if pair.column.kind != "datetime" and low >= 0 and (drawn < 0).any():
        yield Finding(pair.name, "negative numbers", "none", _share(drawn < 0))


def _off_grid(pair: Pair, present: pd.Series, drawn: pd.Series) -> Iterator[Finding]:
    """More decimals, or a finer step, than all real values have."""
    for what, misses in _grids(pair.column):
        off = misses(drawn)
        if off.any() and not misses(present).any():
            yield Finding(pair.name, what, "none", _share(off))
            return


def _grids(column: Column) -> Iterator[tuple]:
    """(what is wrong off the grid, function from cells to whether they are off it)."""
    increment, offset = getattr(column, "increment", None), float(getattr(column, "offset", None) or 0)
    if column.kind == "datetime":
        if column.step in FIXED_STEPS and not offset:
            size = pd.Timedelta(1, unit=column.step).value
            yield f"dates between full {column.step}s", lambda cells: cells.astype("int64") % size != 0
        return
    if column.step is not None:  # time spans
        return
    if increment:
        yield f"numbers off the step of {increment:g}", lambda cells: _off(cells, float(increment), offset)
    decimals = 0 if column.kind == "integer" else column.decimals
    if decimals is not None:
        what = f"numbers of more than {decimals} decimals" if decimals else "fractions of whole numbers"
        yield what, lambda cells: (cells - cells.round(decimals)).abs() > 1e-9 * (1 + cells.abs())


def _off(cells: pd.Series, increment: float, offset: float) -> pd.Series:
    steps = (cells - offset) / increment
    return (steps - steps.round()).abs() > 1e-6


def _keys(pair: Pair, present: pd.Series, drawn: pd.Series) -> Iterator[Finding]:
    """Keys of the real table, and keys that occur twice."""
    if present.is_unique and not drawn.is_unique:
        yield Finding(pair.name, "keys that occur more than once", "none", _share(drawn.duplicated(keep=False)))
    known = drawn.isin(present)
    if known.any():
        yield Finding(pair.name, "keys of real rows", "–", _share(known))


def _noun(column: Column) -> str:
    return "date" if column.kind == "datetime" else "number"


def _shown(value: object) -> str:
    return str(value) if isinstance(value, pd.Timestamp) else f"{value:g}"


def _share(rows: pd.Series) -> str:
    return f"{int(rows.sum()):,} ({rows.mean():.2%})"
