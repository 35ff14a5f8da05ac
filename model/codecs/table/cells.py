"""Cells of a column as comparable values, whatever file or dtype they came from."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .schema import NUMERICAL_KINDS, Column


def canonical(column: Column, values: pd.Series) -> pd.Series:
    """The cells of a column in one form: numbers as float64 (NaN missing), dates as datetime64[ns] in UTC (NaT), all
    else as text (None), with booleans as "true" and "false" and 1.0 as "1"; cells of another kind are missing."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    if column.kind == "datetime":
        return _dates(column, values)
    if column.kind in (*NUMERICAL_KINDS, "numerical"):
        numbers = pd.to_numeric(values, errors="coerce")
        return pd.Series(numbers.to_numpy(dtype=np.float64, na_value=np.nan), index=values.index)
    texts = [None if pd.isna(value) else _text(value) for value in values.astype(object)]
    texts = [text.lower() if text and column.kind == "boolean" else text for text in texts]
    return pd.Series(texts, index=values.index, dtype=object)


def _dates(column: Column, values: pd.Series) -> pd.Series:
    if not pd.api.types.is_datetime64_any_dtype(values.dtype):
        text = pd.api.types.is_string_dtype(values.dtype) and values.map(type).eq(str).any()
        read = pd.to_datetime(values, format=column.format, errors="coerce") if column.format and text else None
        if read is None or (read.isna() & values.notna()).any():
            read = pd.to_datetime(values, format="ISO8601" if text else None, errors="coerce", utc=True)
        values = read
    if values.dt.tz is not None:
        values = values.dt.tz_convert("UTC").dt.tz_localize(None)
    return values.astype("datetime64[ns]")


def _text(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)
