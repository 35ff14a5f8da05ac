"""Numbers as cells of a column: in its dtype, resolution and spelling."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd

from .dates import MONTHS, SIZES, UNITS, write_texts
from .dtypes import dtype_of
from .schema import Column
from .spelling import to_decimal


def from_numbers(column: Column, numbers: np.ndarray, missing: np.ndarray) -> pd.Series | list:
    """The cells of numbers (N,), see `cells.to_numbers`; those where `missing` (N,) is True are missing.

    A list of Python objects, None for a missing cell, where the column holds text or such objects.
    """
    numbers = np.where(missing, 0.0, numbers)
    if column.kind == "datetime":
        return _dates(column, _datetime64(column, numbers), missing)
    if column.step is not None:
        return _spans(column, _whole(numbers, column.offset), missing)
    if column.spelling is not None or column.cell_type is not None:
        return _objects(column, numbers, missing)
    name = column.dtype or "float64"
    if any(word in name.lower() for word in ("float", "double", "decimal")):
        return pd.Series(np.where(missing, np.nan, _rounded(column, numbers))).astype(dtype_of(name))
    whole = _whole(numbers if column.kind == "integer" else _rounded(column, numbers), _whole_offset(column))
    if whole.dtype == object:
        whole = whole.astype("uint64")
    values = pd.Series(whole)
    if missing.any():
        values = values.astype("UInt64" if whole.dtype == np.uint64 else "Int64").mask(missing)
    return values.astype(dtype_of(name))


def _whole_offset(column: Column) -> Any:
    return column.offset if column.kind == "integer" else 0  # that of others is added before they are rounded


def _whole(numbers: np.ndarray, offset: Any) -> np.ndarray:
    """Numbers and an offset as int64, or as Python's integers where that is too short."""
    whole, offset = np.round(numbers).astype(np.int64), int(offset or 0)
    if offset + int(whole.max(initial=0)) >= 2**63:
        return whole.astype(object) + offset
    return whole + offset


def _rounded(column: Column, numbers: np.ndarray) -> np.ndarray:
    """Numbers and the offset, rounded to the column's decimals."""
    numbers = numbers + (column.offset or 0)
    if column.kind == "continuous" and column.decimals is not None:
        numbers = np.round(numbers, column.decimals)
    return numbers


def _objects(column: Column, numbers: np.ndarray, missing: np.ndarray) -> list:
    """Numbers as text, Decimals, ints or floats."""
    is_whole = column.kind == "integer" and bool(np.isfinite(numbers).all())
    exact = _whole(numbers, _whole_offset(column)) if is_whole else _rounded(column, numbers)
    decimals = 0 if column.kind == "integer" else column.decimals
    cells = [None if m else v for v, m in zip(exact.tolist(), missing, strict=True)]
    if column.spelling is not None:
        return [None if v is None else column.spelling.write(v, decimals) for v in cells]
    if column.cell_type == "Decimal":
        return [None if v is None else to_decimal(v, column.decimals) for v in cells]
    if column.cell_type == "number":
        return [int(v) if v is not None and float(v).is_integer() else v for v in cells]
    if column.cell_type == "float":
        return [None if v is None else float(v) for v in cells]
    return cells


def _spans(column: Column, steps: np.ndarray, missing: np.ndarray) -> pd.Series | list:
    spans = pd.Series((steps * SIZES[column.step or "ns"]).astype("timedelta64[ns]")).mask(missing)
    if column.cell_type is None:
        return spans.astype(dtype_of(column.dtype or "timedelta64[ns]"))
    cells = [None if m else span for span, m in zip(spans, missing, strict=True)]
    return [c.to_pytimedelta() if c is not None and column.cell_type == "timedelta" else c for c in cells]


def _datetime64(column: Column, numbers: np.ndarray) -> np.ndarray:
    """Numbers as dates."""
    step = column.step or "ns"
    steps = _whole(np.nan_to_num(numbers), column.offset)
    if step in MONTHS:
        first = steps.astype("datetime64[M]").astype("datetime64[us]")
        return first - np.timedelta64(MONTHS[step], "D")
    return steps.astype(f"datetime64[{UNITS[step]}]").astype("datetime64[ns]" if step == "ns" else "datetime64[us]")


def _dates(column: Column, dates: np.ndarray, missing: np.ndarray) -> pd.Series | list:
    """Dates in the column's format, dtype or type of objects."""
    name = column.dtype or "datetime64[ns]"
    if column.format is not None:
        texts = write_texts(dates, column.format, column.zone)
        cells = [None if m else text for text, m in zip(texts, missing, strict=True)]
        if any(word in name.lower() for word in ("int", "float", "double")):
            digits = pd.Series([None if text is None else int(text) for text in cells], dtype="Int64")
            return digits.astype(dtype_of(name))
        return cells
    if column.cell_type is not None or name == "object":
        kind = column.cell_type or "date"
        cells = [None if m else _object(date, kind) for date, m in zip(dates, missing, strict=True)]
        return cells if name == "object" else pd.Series(cells, dtype=object).astype(dtype_of(name))
    values = pd.Series(dates).mask(missing)
    if name.startswith("period["):
        return values.dt.to_period(name[len("period[") : -1])
    if "," in name:
        if column.zone is None:
            values = values.dt.tz_localize("UTC")
        else:  # times that occur twice are the first; those that do not occur, the next that does
            first = np.ones(len(values), dtype=bool)
            values = values.dt.tz_localize(column.zone, ambiguous=first, nonexistent="shift_forward")
    return values.astype(dtype_of(name))


def _object(date: np.datetime64, kind: str) -> Any:
    if kind == "Timestamp":
        return pd.Timestamp(date)
    moment: datetime.datetime = date.astype("datetime64[us]").item()
    return {"date": moment.date, "time": moment.time}.get(kind, lambda: moment)()
