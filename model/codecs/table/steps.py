"""The grids of numbers and dates: the increment that they are multiples of, and where the grid begins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .dates import MONTHS, SIZES, UNITS

EXACT = 2**53  # up to here, float64 holds every integer
CHANCE = 9  # numbers are on a grid if by chance they would be with probability 10⁻⁹ at most


def find_grid(values: np.ndarray) -> tuple[int, int] | None:
    """(increment, offset) of distinct integers (int64 or Python's), None if any integer is as good.

    They are offset + k · increment. Of n integers drawn at random, all have the same remainder by g with probability
    g¹⁻ⁿ: it must be 10⁻⁹ at most.
    """
    if len(values) < 2:
        return None
    first = int(values.min())
    increment = math.gcd(*{int(v) - first for v in values.tolist()})
    if increment < 2 or (len(values) - 1) * math.log10(increment) < CHANCE:
        return None
    return increment, first % increment


def grid_of_integers(values: np.ndarray) -> dict[str, int]:
    """The fields `increment` and `offset` of a column of these distinct integers.

    Where float64 does not hold them, the smallest one is the offset.
    """
    grid = find_grid(values)
    fields = {} if grid is None else {"increment": grid[0], "offset": grid[1]}
    if len(values) and max(abs(int(values.min())), abs(int(values.max()))) >= EXACT:
        fields["offset"] = int(values.min())
    return {name: value for name, value in fields.items() if value}


def grid_of_decimals(values: np.ndarray, decimals: int) -> dict[str, float]:
    """The same of distinct numbers with so many decimals."""
    scaled = np.round(values * 10**decimals)
    if len(values) == 0 or np.abs(scaled).max() >= EXACT:
        return {}
    grid = find_grid(np.unique(scaled.astype(np.int64)))
    if grid is None:
        return {}
    increment, offset = (round(v / 10**decimals, decimals) for v in grid)
    return {"increment": increment, "offset": offset} if offset else {"increment": increment}


def date_steps(read: np.ndarray) -> dict[str, Any]:
    """The largest step that all dates (none NaT) are on, and increment and offset in it."""
    unique = np.unique(read)
    months = np.unique(unique.astype("datetime64[M]"))
    if (len(months) - 1) * math.log10(30) >= CHANCE:  # that all are on one day of 30 has probability 30¹⁻ⁿ
        for step, days in MONTHS.items():
            first = unique + np.timedelta64(days, "D")
            if (first.astype("datetime64[M]").astype(first.dtype) == first).all():
                return {"step": step, **_grid(first.astype("datetime64[M]").astype(np.int64))}
    step = next(s for s, u in UNITS.items() if (unique.astype(f"datetime64[{u}]").astype(unique.dtype) == unique).all())
    return {"step": step, **_grid(unique.astype(f"datetime64[{UNITS[step]}]").astype(np.int64))}


def duration_steps(ns: np.ndarray) -> dict[str, Any]:
    """The same of time spans in nanoseconds (distinct)."""
    step = next(name for name, size in SIZES.items() if not (ns % size).any())
    return {"step": step, **_grid(ns // SIZES[step])}


def _grid(steps: np.ndarray) -> dict[str, int]:
    """`grid_of_integers`, but for numbers that spread too far to be exact without the offset too."""
    fields = grid_of_integers(steps)
    if "offset" in fields and "increment" not in fields and int(steps.max()) - int(steps.min()) >= EXACT:
        del fields["offset"]
    return fields
