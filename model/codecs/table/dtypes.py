"""Columns of any dtype as plain ones, and plain ones in the dtype again: Arrow, sparse, Python objects."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

ARROW = "arrow:"  # before the name of an Arrow type that pandas does not read by its own name
OBJECTS = {
    datetime.date: "date",
    datetime.time: "time",
    datetime.datetime: "datetime",
    pd.Timestamp: "Timestamp",
    datetime.timedelta: "timedelta",
    pd.Timedelta: "Timedelta",
    Decimal: "Decimal",
    pd.Period: "Period",
    pd.Interval: "Interval",
}


def plain(values: pd.Series) -> pd.Series:
    """The same values in a dtype of NumPy or pandas proper, or as Python objects."""
    dtype = values.dtype
    if isinstance(dtype, pd.SparseDtype):
        return values.sparse.to_dense()
    if not isinstance(dtype, pd.ArrowDtype):
        return values
    if pd.api.types.is_integer_dtype(dtype):
        return values.astype("UInt64" if pd.api.types.is_unsigned_integer_dtype(dtype) else "Int64")
    import pyarrow as pa

    return pa.array(values.array).to_pandas().set_axis(values.index).rename(values.name)


def dtype_name(dtype: Any) -> str:
    """A text that `dtype_of` turns into the dtype again."""
    if isinstance(dtype, pd.CategoricalDtype):
        return "category"
    if isinstance(dtype, pd.StringDtype) and dtype.storage != "python" and dtype.na_value is pd.NA:
        return f"string[{dtype.storage}]"
    if not isinstance(dtype, pd.ArrowDtype):
        return str(dtype)
    try:
        if pd.api.types.pandas_dtype(str(dtype)) == dtype:
            return str(dtype)
    except (NotImplementedError, TypeError, ValueError):
        pass
    return f"{ARROW}{dtype.pyarrow_dtype}"


def dtype_of(name: str) -> Any:
    """The dtype with this name."""
    return pd.ArrowDtype(_arrow_type(name.removeprefix(ARROW))) if name.startswith(ARROW) else name


def _arrow_type(name: str) -> Any:
    import pyarrow as pa

    decimal = re.fullmatch(r"decimal(128|256)\((\d+), (-?\d+)\)", name)
    if decimal is not None:
        make = pa.decimal128 if decimal[1] == "128" else pa.decimal256
        return make(int(decimal[2]), int(decimal[3]))
    dictionary = re.fullmatch(r"dictionary<values=(.+), indices=(\w+), ordered=(\d)>", name)
    if dictionary is not None:
        return pa.dictionary(_arrow_type(dictionary[2]), _arrow_type(dictionary[1]), dictionary[3] == "1")
    return pa.type_for_alias(name)


def cell_types(present: pd.Series) -> set[str]:
    """The types of the cells of an object column: those of OBJECTS, str, bool, int, float; others by their names."""
    return {type_name(kind) for kind in {type(v) for v in present}}


def type_name(kind: type) -> str:
    if issubclass(kind, np.generic):
        kind = type(kind(0).item()) if issubclass(kind, np.number | np.bool_) else kind
    if kind in OBJECTS:
        return OBJECTS[kind]
    return next((t.__name__ for t in (str, bool, int, float) if issubclass(kind, t)), kind.__name__)


def to_datetime64(present: pd.Series, zone: str | None = None) -> np.ndarray:
    """datetime64 without a time zone of dates, periods (their beginning), or Python's dates, datetimes and clock times.

    Args:
        zone: of the wall times of dates that have a time zone; None is UTC.
    """
    if isinstance(present.dtype, pd.PeriodDtype):
        return present.dt.to_timestamp().to_numpy().astype("datetime64[us]")
    if pd.api.types.is_datetime64_any_dtype(present.dtype):
        if getattr(present.dtype, "tz", None) is not None:
            present = present.dt.tz_convert(zone or "UTC").dt.tz_localize(None)
        dates = present.to_numpy()
        return dates if dates.dtype == "datetime64[ns]" else dates.astype("datetime64[us]")
    cells = [_moment(value) for value in present]
    unit = "ns" if any(isinstance(cell, np.datetime64) for cell in cells) else "us"
    return np.array(cells, dtype=f"datetime64[{unit}]")


def _moment(value: Any) -> Any:
    if isinstance(value, datetime.time):
        return datetime.datetime.combine(datetime.date(1900, 1, 1), value)
    if isinstance(value, pd.Timestamp):
        return value.to_datetime64() if value.nanosecond else value.to_pydatetime()
    return value
