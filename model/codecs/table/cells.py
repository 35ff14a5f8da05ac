"""Cells as numbers and comparable values, whatever file or dtype they come from."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from .dates import MONTHS, SIZES, UNITS, find_format, read_texts
from .dtypes import plain, to_datetime64
from .schema import NUMERICAL_KINDS, Column
from .spelling import Spelling
from .steps import EXACT
from .text_kinds import is_gap

PLAIN = Spelling()
OFFSET = re.compile(r"(Z|[+-]\d{2}:?\d{2})$")
LAST = np.datetime64("2262-04-11", "ns")  # dates beyond what nanoseconds hold are this one, or FIRST
FIRST = np.datetime64("1677-09-22", "ns")
TRUE = {"true", "yes", "t", "y", "on", "1", "1.0"}
FALSE = {"false", "no", "f", "n", "off", "0", "0.0"}


def canonical(column: Column, values: pd.Series) -> pd.Series:
    """Cells as comparable values, whatever file or dtype they came from.

    float64 for numbers (seconds for time spans; integers too large for it less the column's offset), datetime64[ns] for
    dates (within its range), text for all others, None for a missing cell. Equal values are equal: 1, 1.0, "1" and
    Decimal("1"); of a boolean column True, "True", "yes".

    Raises:
        ValueError: a cell of a numerical column is not a number or a date; names the column.
    """
    if column.kind == "datetime":
        dates = read_dates(column, values)
        dates = np.where(dates > LAST, LAST, np.where(dates < FIRST, FIRST, dates))
        return pd.Series(dates.astype("datetime64[ns]"), index=values.index, name=values.name)
    if column.kind in NUMERICAL_KINDS:
        numbers = to_numbers(column, values) if _is_large(column) else _to_floats(read_numbers(column, values))
        scale = SIZES[column.step] / 1e9 if column.step else 1.0
        return pd.Series(numbers * scale, index=values.index, name=values.name)
    write = _truth if column.kind == "boolean" else canonical_text
    cells = plain(values)
    texts = _map_distinct(cells.astype(object), write)
    return pd.Series(texts, index=values.index, name=values.name, dtype=object)


def canonical_text(value: Any) -> str:
    """A value as text that equal values share."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, str) and value in ("True", "False")):
        return str(value).lower()
    if isinstance(value, str):
        return _shortest(value) if _is_plain(value) else value
    if isinstance(value, datetime.datetime):
        has_time = value.time() != datetime.time()
        return value.isoformat(sep=" ") if has_time or value.tzinfo else value.date().isoformat()
    if isinstance(value, int | float | np.number | Decimal):
        return _shortest(str(value))
    return str(value)


def _is_plain(text: str) -> bool:
    """Whether a text is a number with a fraction and without leading zeros."""
    whole, point, fraction = text.removeprefix("-").partition(".")
    return bool(point) and whole.isdigit() and fraction.isdigit() and (whole == "0" or whole[0] != "0")


def _shortest(text: str) -> str:
    """A number without needless zeros after the point."""
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text.lower() else text


def _truth(value: Any) -> str:
    text = str(value).strip().lower()
    return "true" if text in TRUE else "false" if text in FALSE else canonical_text(value)


def _map_distinct(cells: pd.Series, read: Callable[[Any], Any]) -> list:
    """`read` of every cell, None of a missing one; equal cells of one type are read once."""
    known: dict[Any, Any] = {}
    out = []
    for value, missing in zip(cells, cells.isna(), strict=True):
        if missing:
            out.append(None)
            continue
        key = (type(value), value)
        if key not in known:
            known[key] = read(value)
        out.append(known[key])
    return out


def gaps(column: Column, values: pd.Series) -> np.ndarray:
    """(N,) bool: the cells that are missing, also those that are a text for a missing cell."""
    missing = values.isna().to_numpy(dtype=bool)
    if (column.kind in NUMERICAL_KINDS or column.gaps) and (
        values.dtype == object or isinstance(values.dtype, pd.StringDtype)
    ):
        words = [isinstance(v, str) and is_word_of_gap(column, v) for v in values]
        missing = missing | np.array(words, dtype=bool)
    return missing


def is_word_of_gap(column: Column, text: str) -> bool:
    """Whether a text means a missing cell: one of the column's `gaps`, and among numbers and dates any usual one."""
    return text in column.gaps or (column.kind in NUMERICAL_KINDS and is_gap(text))


def to_numbers(column: Column, values: pd.Series) -> np.ndarray:
    """float64 (N,), NaN for a missing cell: numbers less the column's offset, dates in its step since 1970.

    Raises:
        ValueError: a cell is not a number or not a date.
    """
    if column.kind == "datetime":
        return _steps(read_dates(column, values), column)
    numbers = read_numbers(column, values)
    if not column.offset:
        return _to_floats(numbers)
    if isinstance(column.offset, int) and numbers.dtype == object:
        return _to_floats(np.array([None if v is None else v - column.offset for v in numbers], dtype=object))
    shifted = _to_floats(numbers) - column.offset
    return shifted if column.decimals is None else np.round(shifted, column.decimals + 3)


def read_numbers(column: Column, values: pd.Series) -> np.ndarray:
    """Cells as numbers: float64 with NaN for missing ones, or Python's integers and None where floats are too short."""
    cells = plain(values)
    if isinstance(cells.dtype, pd.CategoricalDtype):
        cells = cells.astype(cells.cat.categories.dtype)
    if pd.api.types.is_timedelta64_dtype(cells.dtype):
        size = SIZES[column.step or "ns"]
        ns = cells.astype("timedelta64[ns]").to_numpy()
        return np.where(np.isnat(ns), np.nan, ns.astype(np.int64) / size)
    if pd.api.types.is_integer_dtype(cells.dtype) and _is_large(column):
        return np.array([None if v is pd.NA else int(v) for v in cells.tolist()], dtype=object)
    if pd.api.types.is_numeric_dtype(cells.dtype) and not pd.api.types.is_complex_dtype(cells.dtype):
        return cells.to_numpy(dtype=np.float64, na_value=np.nan)
    numbers = np.array([*_map_distinct(cells.astype(object), lambda v: _number(column, v)), None], dtype=object)[:-1]
    wrong = np.array([isinstance(v, str) for v in numbers], dtype=bool)
    if wrong.any():
        raise ValueError(f"column {column.name!r}: {numbers[wrong][0]!r} is not a number")
    return numbers if _is_large(column) else _to_floats(numbers)


def _is_large(column: Column) -> bool:
    return isinstance(column.offset, int) and abs(column.offset) >= EXACT


def _number(column: Column, value: Any) -> Any:
    """A cell as a number, None for a gap; as text if it is none."""
    if isinstance(value, str):
        if is_word_of_gap(column, value):
            return None
        if column.step is not None:
            span = pd.to_timedelta(value, errors="coerce")
            return value if span is pd.NaT else span.value / SIZES[column.step]
        number = (column.spelling or PLAIN).read(value)
        if number is None and column.spelling is not None:
            number = PLAIN.read(value)
        return value if number is None else number
    if isinstance(value, datetime.timedelta):
        return pd.Timedelta(value).value / SIZES[column.step or "ns"]
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, int | float) else str(value)


def _to_floats(numbers: np.ndarray) -> np.ndarray:
    if numbers.dtype == np.float64:
        return numbers
    return np.array([np.nan if v is None else float(v) for v in numbers], dtype=np.float64)


def read_dates(column: Column, values: pd.Series) -> np.ndarray:
    """datetime64 (N,) without a time zone, NaT for a missing cell.

    Raises:
        ValueError: a cell is not a date.
    """
    cells = plain(values)
    if isinstance(cells.dtype, pd.CategoricalDtype):
        cells = cells.astype(cells.cat.categories.dtype)
    if pd.api.types.is_datetime64_any_dtype(cells.dtype) or isinstance(cells.dtype, pd.PeriodDtype):
        return to_datetime64(cells, column.zone)
    if pd.api.types.is_numeric_dtype(cells.dtype) and column.format is None and cells.notna().any():
        raise ValueError(f"column {column.name!r} does not hold dates: set another kind or a format")
    distinct: dict[Any, Any] = dict.fromkeys(cells.dropna())
    texts = {value: _date_text(column, value) for value in distinct}
    words = [value for value, text in texts.items() if text is not None]
    read = _read_words(column, [texts[v] for v in words])
    dates = dict(zip(words, read, strict=True))
    others = [value for value, text in texts.items() if text is None]
    dates |= dict(zip(others, _read_objects(column, others), strict=True))
    wrong = [v for v, d in dates.items() if np.isnat(d) and not (isinstance(v, str) and is_word_of_gap(column, v))]
    if wrong:
        raise ValueError(f"column {column.name!r}: {wrong[0]!r} is not a date like the others")
    found = [np.datetime64("NaT", "us") if m else dates[v] for v, m in zip(cells, cells.isna(), strict=True)]
    unit = "ns" if any(np.datetime_data(d.dtype)[0] == "ns" for d in dates.values()) else "us"
    return np.array(found, dtype=f"datetime64[{unit}]")


def _date_text(column: Column, value: Any) -> str | None:
    """The text of a date that is text or digits, None for other objects."""
    if isinstance(value, str):
        return value.zfill(4) if column.format == "%H%M" else value
    if isinstance(value, int | float | np.number) and column.format is not None:
        text = str(int(value)) if float(value).is_integer() else str(value)
        return text.zfill(4) if column.format == "%H%M" else text
    return None


def _read_words(column: Column, texts: list[str]) -> np.ndarray:
    """Texts as dates, by the column's format or, if it has none or none of them fits, by their own."""
    nothing = np.full(len(texts), np.datetime64("NaT", "us"))
    if not texts:
        return nothing
    read = nothing if column.format is None else read_texts(texts, column.format, column.zone)
    present = [text for text in texts if not is_word_of_gap(column, text)]
    if np.isnat(read).all() and present:
        found = find_format(dict.fromkeys(present, 1))
        if found is not None:
            read = _read_by(column, texts, OFFSET.sub("%z", found.format))
    return read


def _read_by(column: Column, texts: list[str], form: str) -> np.ndarray:
    """Texts by a format that is not the column's; without an offset from UTC, they are wall times of its zone."""
    read = read_texts(texts, form, column.zone)
    zone = (column.dtype or "").partition(", ")[2].partition("]")[0].removeprefix("tz=")
    if not zone or column.zone is not None or "%z" in form:
        return read
    first = np.ones(len(read), dtype=bool)
    walls = pd.Series(read).dt.tz_localize(zone, ambiguous=first, nonexistent="shift_forward")
    return to_datetime64(walls)


def _read_objects(column: Column, values: list) -> list[np.datetime64]:
    try:
        read = [to_datetime64(pd.Series([_period_start(value)], dtype=object))[0] for value in values]
    except (ValueError, TypeError):
        raise ValueError(f"column {column.name!r} does not hold dates: set another kind or a format") from None
    return read


def _period_start(value: Any) -> Any:
    if isinstance(value, pd.Period):
        return value.to_timestamp()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value
    if isinstance(value, np.datetime64):
        return pd.Timestamp(value)
    raise TypeError


def _steps(dates: np.ndarray, column: Column) -> np.ndarray:
    """Dates in the column's step since 1970 and its offset; parts of a step are fractions."""
    step, offset, missing = column.step or "ns", int(column.offset or 0), np.isnat(dates)
    dates = np.where(missing, np.datetime64(0, np.datetime_data(dates.dtype)[0]), dates)
    if step in MONTHS:
        dates = dates + np.timedelta64(MONTHS[step], "D")
        months = dates.astype("datetime64[M]")
        size = ((months + 1).astype("datetime64[D]") - months.astype("datetime64[D]")) / np.timedelta64(1, "D")
        part = (dates - months.astype(dates.dtype)) / np.timedelta64(1, "D") / size
        numbers = months.astype(np.int64) - offset + part
    else:
        whole = dates.astype(f"datetime64[{UNITS[step]}]")
        part = (dates - whole.astype(dates.dtype)) / np.timedelta64(1, UNITS[step])
        numbers = (whole.astype(np.int64) - offset) + np.where(part > 0, part, 0.0)
    return np.where(missing, np.nan, numbers.astype(np.float64))
