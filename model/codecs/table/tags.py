"""Categories as texts "type:value", as codec.json holds them."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd


def to_tag(value: Any) -> str:
    """A value as the text "type:value", so that 1, True, 1.0 and "1" stay four values."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, pd.Timestamp | datetime.datetime):
        return f"date:{value.isoformat()}"
    if isinstance(value, datetime.date):
        return f"day:{value.isoformat()}"
    if isinstance(value, pd.Interval):
        return f"interval:{json.dumps([to_tag(value.left), to_tag(value.right), value.closed])}"
    if isinstance(value, pd.Period):
        return f"period:{value.freqstr}:{value}"
    if isinstance(value, datetime.timedelta):
        return f"span:{pd.Timedelta(value).value}"
    return f"{type(value).__name__}:{value}"


def from_tag(tag: str) -> Any:
    """The value of a tag."""
    kind, value = tag.split(":", 1)
    if kind == "bool":
        return value == "True"
    if kind == "interval":
        left, right, closed = json.loads(value)
        return pd.Interval(from_tag(left), from_tag(right), closed)
    if kind == "period":
        frequency, period = value.split(":", 1)
        return pd.Period(period, frequency)
    if kind == "span":
        return pd.Timedelta(int(value), "ns")
    readers = {"int": int, "float": float, "date": pd.Timestamp, "Decimal": Decimal}
    readers |= {"day": datetime.date.fromisoformat, "time": datetime.time.fromisoformat}
    return readers.get(kind, str)(value)


def sort_tags(tags: list[str]) -> list[str]:
    """Tags in the order of their values: numbers by size, or all as text if one of them is text."""
    values = {tag: from_tag(tag) for tag in tags}
    has_text = any(isinstance(value, str) for value in values.values())
    return sorted(tags, key=lambda tag: str(values[tag]) if has_text else values[tag])
