"""What the columns of a table are: inferred from data, shown and edited as YAML.

Kinds: continuous, integer, categorical, boolean, datetime; constant and identifier columns are not modelled (a constant
is repeated, an identifier numbered anew).
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Kind = Literal["continuous", "integer", "categorical", "boolean", "datetime", "constant", "identifier"]
NUMERIC = ("continuous", "integer", "datetime")
FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S",
    "%Y-%m-%d %H:%M",
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d.%m.%Y",
    "%Y/%m/%d",
)
STEPS = {"day": 86_400_000_000_000, "hour": 3_600_000_000_000, "minute": 60_000_000_000, "second": 1_000_000_000}
STEPS |= {"ms": 1_000_000, "us": 1000, "ns": 1}
BOOLEANS = [{"true", "false"}, {"yes", "no"}, {"t", "f"}, {"y", "n"}]
TEXT = pd.Series(["text"]).dtype  # what pandas makes of text: str since version 3, object before
EXACT = 2**53  # whole numbers from which on float64 has gaps
FEWEST = 20  # rows from which on "all different" means an identifier


class Column(BaseModel):
    """One column as the user sees it."""

    model_config = ConfigDict(extra="forbid")

    name: str | int
    kind: Kind
    dtype: str = Field("object", description="pandas dtype in which values come back")
    missing: bool = Field(False, description="some cells are empty; emptiness is then modelled")
    decimals: int | None = Field(None, description="digits after the point, continuous columns; null is all of them")
    format: str | None = Field(None, description="strftime format of dates that are text")
    step: str | None = Field(None, description=f"resolution of dates: {', '.join(STEPS)}")


class Schema(BaseModel):
    """The columns of a table in their order."""

    model_config = ConfigDict(extra="forbid")

    columns: list[Column] = Field(min_length=1)

    def dump(self) -> str:
        """The schema as YAML, without what is at its default."""
        rows = [column.model_dump(exclude_defaults=True) for column in self.columns]
        return yaml.safe_dump({"columns": rows}, sort_keys=False, allow_unicode=True)

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """A schema from a YAML file.

        Raises:
            ValueError: no such file, or what is wrong with it, in one line.
        """
        try:
            return cls.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(f"schema {str(path)!r} not found") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in problem["loc"]) or "schema"
            raise ValueError(f"{path}: {where}: {problem['msg']}") from None


def infer(table: pd.DataFrame) -> Schema:
    """The schema of a table.

    Raises:
        ValueError: no rows or columns, a name that occurs twice, a column of values that cannot be modelled.
    """
    if not len(table.columns) or not len(table):
        raise ValueError(f"the table has {len(table)} rows and {len(table.columns)} columns; both are needed")
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise ValueError(f"column name {twice[0]!r} occurs more than once: rename one of them")
    return Schema(columns=[infer_column(name, table[name]) for name in table.columns])


def infer_column(name, values: pd.Series) -> Column:
    if not isinstance(name, str | int):
        raise ValueError(f"column name {name!r} is neither text nor a whole number: rename it")
    known = values.dropna()
    dtype, kind = values.dtype, None
    found = {"name": name, "dtype": str(dtype), "missing": len(known) < len(values)}
    if isinstance(dtype, pd.StringDtype) and dtype.storage != "python" and dtype.na_value is pd.NA:
        found["dtype"] = f"string[{dtype.storage}]"
    if isinstance(dtype, pd.CategoricalDtype):
        kind, found["dtype"] = "categorical", "category"
    elif pd.api.types.is_bool_dtype(dtype):
        kind = "boolean"
    elif pd.api.types.is_datetime64_any_dtype(dtype):
        kind, found["step"] = "datetime", _step(known)
    elif pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype):
        kind = _numeric(name, known, found)
    elif not (pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype)):
        raise ValueError(f"column {name!r} has dtype {dtype}, which is not supported: turn it into numbers or text")
    else:
        kind = _text(name, known, found)
    if len(known) == 0 or (not found["missing"] and _distinct(known) == 1):
        kind = "constant"
    return Column(kind=kind, **found)


def dates(values: pd.Series, form: str | None) -> pd.Series:
    """Dates as datetime64[ns] without a time zone; text is read by its format, NaT where it does not fit."""
    if form is not None:
        return pd.to_datetime(values, format=form, errors="coerce").astype("datetime64[ns]")
    if getattr(values.dtype, "tz", None) is not None:
        values = values.dt.tz_convert("UTC").dt.tz_localize(None)
    return values.astype("datetime64[ns]")


def _numeric(name, known: pd.Series, found: dict) -> str:
    numbers = known.to_numpy(dtype=np.float64)
    finite = numbers[np.isfinite(numbers)]
    unique = np.unique(finite)
    if pd.api.types.is_integer_dtype(known.dtype):
        run = len(unique) == len(known) >= FEWEST and unique[-1] - unique[0] == len(unique) - 1
        if len(unique) and max(-unique[0], unique[-1]) >= EXACT:
            return "identifier" if len(unique) == len(known) >= FEWEST and not found["missing"] else "categorical"
        named = re.search(r"(^|[_ .\-])id$", str(name), re.IGNORECASE) and len(unique) == len(known) >= FEWEST
        return "identifier" if (run or named) and not found["missing"] else "integer"
    found["decimals"] = next((d for d in range(7) if np.array_equal(np.round(unique, d), unique)), None)
    return "integer" if found["decimals"] == 0 else "continuous"


def _text(name, known: pd.Series, found: dict) -> str:
    types = {type(v) for v in known}
    if types == {datetime.date}:
        found["step"] = "day"
        return "datetime"
    if odd := [t for t in types if not issubclass(t, str | bool | int | float | np.generic)]:
        raise ValueError(f"column {name!r} holds values of type {odd[0].__name__}: turn them into numbers or text")
    if types == {str}:
        first = known.iloc[0]
        for form in FORMATS if any(c.isdigit() for c in first) else ():
            read = dates(known.astype(object), form)
            if read.notna().all() and (read.dt.strftime(form) == known.astype(object)).all():
                found["format"], found["step"] = form, _step(read)
                return "datetime"
        if {v.lower() for v in known.unique()[:3]} in BOOLEANS:
            return "boolean"
    if types <= {bool, np.bool_}:
        return "boolean"
    if len(known) >= FEWEST and _distinct(known) == len(known) and not found["missing"]:
        return "identifier"
    return "categorical"


def _step(values: pd.Series) -> str:
    ns = dates(values, None).astype("int64").to_numpy()
    return next(name for name, size in STEPS.items() if not (ns % size).any())


def _distinct(known: pd.Series) -> int:
    return known.nunique() if known.dtype != object else len({(type(v), v) for v in known})
