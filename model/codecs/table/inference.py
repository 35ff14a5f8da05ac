"""What a column is, from its values: kind, spelling, steps, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .dates import STEPS, plain, read_texts
from .dtypes import cell_types, dtype_name, to_datetime64
from .dtypes import plain as plain_dtype
from .identifiers import is_named_key
from .steps import EXACT, date_steps, duration_steps, grid_of_decimals, grid_of_integers
from .text_kinds import IDENTIFIER_ROWS, Fields, digits_format, is_gap, kind_of_text, kind_of_words, note_gaps, warn


def infer_fields(name: Any, values: pd.Series, given: Mapping[str, Any]) -> Fields:
    """The fields of the `Column` with these values.

    Args:
        given: what is known of it; kind, format and spelling decide how its cells are read.

    Raises:
        ValueError: its name or its values are not supported.
    """
    if not isinstance(name, str | int):
        raise ValueError(f"column name {name!r} is neither text nor an integer: rename it")
    dtype, values = values.dtype, plain_dtype(values)
    present = values.dropna()
    found: Fields = {"name": name, "dtype": dtype_name(dtype), "missing": len(present) < len(values)}
    if len(present) == 0 or (not found["missing"] and distinct(name, present) == 1):
        _of_cells(name, present, found, "constant")
        reason = "one value in all rows" if len(present) else "all cells are empty"
        return {**found, "kind": "constant", "reason": reason + ": repeated, not modelled"}
    found |= {key: given[key] for key in ("format", "spelling") if key in given}
    found["kind"] = _kind(name, present, found, given.get("kind"))
    if found["kind"] != "datetime":
        found.pop("format", None)
    if found["missing"] and len(present) == len(values):
        found["reason"] = f"{found['reason']}, with gaps"
    return found


def _kind(name: str | int, present: pd.Series, found: Fields, kind: str | None) -> str:
    """The kind of present values; other fields go into `found`."""
    dtype = present.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        _of_cells(name, present.astype(object), found, "categorical")
        found["reason"] = f"a pandas category, {present.nunique():,} values"
        return "categorical"
    if isinstance(dtype, pd.IntervalDtype):
        found["reason"] = "intervals"
        return "categorical"
    if pd.api.types.is_bool_dtype(dtype):
        found["reason"] = "true and false"
        return "boolean"
    if pd.api.types.is_datetime64_any_dtype(dtype) or isinstance(dtype, pd.PeriodDtype):
        return _dates(present, found)
    if pd.api.types.is_timedelta64_dtype(dtype):
        return _durations(present, found)
    if pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype):
        return _numbers(name, present, found, kind)
    if not (pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype)):
        raise ValueError(
            f"column {name!r} has dtype {found['dtype']}, which is not supported: turn it into numbers or text"
        )
    return _of_cells(name, present, found, kind)


def _of_cells(name: str | int, present: pd.Series, found: Fields, kind: str | None) -> str:
    """The kind of text or of Python objects."""
    types = cell_types(present)
    known = {"str", "bool", "int", "float", "date", "time", "datetime", "Timestamp", "timedelta", "Timedelta",
             "Decimal", "Period", "Interval"}  # fmt: skip
    if unsupported := sorted(types - known):
        raise ValueError(f"column {name!r} holds values of type {unsupported[0]}: turn them into numbers or text")
    if kind in ("constant", "categorical", "boolean", "identifier") or not types:
        if types == {"str"}:
            return kind_of_words(found, _counts(present)) if kind != "constant" else "constant"
        found["reason"] = "as the schema says"
        return kind or "categorical"
    if types == {"str"}:
        return kind_of_text(name, _counts(present), found, kind)
    if types == {"bool"}:
        found["reason"] = "true and false"
        return "boolean"
    words = [v for v in present if isinstance(v, str)]
    others = present[[not isinstance(v, str) for v in present]] if words else present
    if words and all(map(is_gap, words)):
        note_gaps(Counter(words), len(present), found, "values")
        types = types - {"str"}
        if types == {"bool"}:
            found["reason"] = "true and false"
            return "boolean"
    return _of_objects(name, others, types, found, kind)


def _of_objects(name: str | int, present: pd.Series, types: set[str], found: Fields, kind: str | None) -> str:
    """The kind of Python objects that are no text, or text among others."""
    if types == {"int"} and not all(-(2**63) <= v < 2**63 for v in present):
        return kind_of_words(found, _counts(present))
    if types <= {"int", "float", "Decimal"} and len(types - {"Decimal"}) * len(types & {"Decimal"}) == 0:
        found["cell_type"] = types.copy().pop() if len(types) == 1 else "number"
        return _numbers(name, _as_numbers(present, types), found, kind)
    if len(types) == 1 and (single := types.copy().pop()) in ("date", "time", "datetime", "Timestamp"):
        if any(getattr(v, "tzinfo", None) is not None for v in present):
            raise ValueError(f"column {name!r} holds dates with time zones as Python objects: use pd.to_datetime on it")
        found["cell_type"] = single
        return _dates(present, found)
    if types in ({"timedelta"}, {"Timedelta"}):
        found["cell_type"] = types.copy().pop()
        return _durations(pd.Series(pd.to_timedelta(list(present))), found)
    if types == {"Period"} or types == {"Interval"}:
        found["reason"] = f"{types.copy().pop()}s: each value is a category"
    else:
        kinds = " and ".join(sorted(types))
        found["reason"] = f"a mix of {kinds}"
        found["warning"] = f"holds a mix of {kinds}: each value is a category; make it all numbers or all text"
    return "categorical"


def _as_numbers(present: pd.Series, types: set[str]) -> pd.Series:
    """Numbers that are Python objects as a numeric column; whole ones that fit stay exact."""
    if types == {"int"}:
        return present.astype("int64")
    return present.astype("float64")


def _counts(present: pd.Series) -> dict[str, int]:
    return dict(Counter(present.tolist()))


def _numbers(name: str | int, present: pd.Series, found: Fields, kind: str | None) -> str:
    """The kind of a column of numbers; decimals, increment and offset go into `found`."""
    if not pd.api.types.is_integer_dtype(present.dtype):
        numbers = present.to_numpy(dtype=np.float64)
        unique = np.unique(numbers[np.isfinite(numbers)])
        found["decimals"] = next((d for d in range(7) if np.array_equal(np.round(unique, d), unique)), None)
        if found["decimals"] != 0:
            found["reason"] = "numbers with a fraction"
            if found["decimals"] is not None:
                found |= grid_of_decimals(unique, found["decimals"])
            return "continuous"
        found["reason"] = "whole numbers"
        if len(unique) and np.abs(unique).max() >= EXACT:
            warn(
                found, "numbers of more than 15 digits as floats, which have lost digits: read keys as text (dtype=str)"
            )
        if len(unique) and np.abs(unique).max() < EXACT:
            return _maybe_dates(name, np.unique(unique.astype(np.int64)), found, kind)
        return "integer"
    unique = np.unique(present.to_numpy())
    low, high = int(unique[0]), int(unique[-1])
    found["reason"] = f"whole numbers from {low} to {high}"
    all_different = len(unique) == len(present) >= IDENTIFIER_ROWS
    if kind is None and all_different and is_named_key(name):
        found["reason"] = "all cells differ and the name is that of a key: numbered anew, not modelled"
        return "identifier"
    if kind is None and all_different and high - low == len(unique) - 1 and not found["missing"]:
        found["reason"] = "consecutive numbers: numbered anew, not modelled"
        return "identifier"
    if max(-low, high) >= EXACT and kind is None:
        if all_different:
            found["reason"] = "large numbers that all differ: numbered anew, not modelled"
            return "identifier"
        if high - low >= EXACT:
            found["reason"] = "large numbers that a float cannot tell apart: each is a category"
            return "categorical"
    return _maybe_dates(name, unique, found, kind)


def _maybe_dates(name: str | int, unique: np.ndarray, found: Fields, kind: str | None) -> str:
    """`datetime` if distinct integers are the digits of dates, else `integer`."""
    lengths = {len(str(int(v))) for v in (unique[0], unique[-1])}
    form = None
    if kind not in ("integer", "continuous", "numerical"):
        form = found.get("format") or digits_format("date" if kind == "datetime" else name, unique, lengths)
    if form is None:
        found |= grid_of_integers(unique)
        return "integer"
    found["format"], found["decimals"] = form, None
    found["reason"] = f"numbers such as {int(unique[0])} are read as {plain(form)}"
    if kind is None:
        warn(
            found,
            f"numbers such as {int(unique[0])} are taken for {plain(form)}; kind: integer in the schema undoes it",
        )
    width = 4 if form == "%H%M" else 0
    found |= date_steps(read_texts([f"{int(v):0{width}d}" for v in unique], form))
    return "datetime"


def _dates(present: pd.Series, found: Fields) -> str:
    """A column of dates, datetimes, clock times or periods."""
    found["reason"] = "dates and times"
    steps = date_steps(to_datetime64(present))
    tz = getattr(present.dtype, "tz", None)
    if tz is not None:
        local = date_steps(to_datetime64(present, str(tz)))
        if STEPS.index(local["step"]) < STEPS.index(steps["step"]):
            steps, found["reason"] = {**local, "zone": str(tz)}, f"dates and times of {tz}"
    found |= steps
    return "datetime"


def _durations(present: pd.Series, found: Fields) -> str:
    """A column of time spans: integers in units of their step."""
    ns = np.unique(present.astype("timedelta64[ns]").to_numpy().astype(np.int64))
    found |= duration_steps(ns)
    found["reason"] = f"time spans, in {found['step']}s"
    return "integer"


def distinct(name: Any, present: pd.Series) -> int:
    """The number of different values.

    Raises:
        ValueError: values such as lists, which cannot be compared.
    """
    if present.dtype != object:
        return present.nunique()
    try:
        return len({(type(v), v) for v in present})
    except TypeError:
        kinds = sorted({type(v).__name__ for v in present if getattr(type(v), "__hash__", None) is None})
        raise ValueError(
            f"column {name!r} holds values of type {kinds[0] if kinds else 'unknown'}: turn them into numbers or text"
        ) from None
