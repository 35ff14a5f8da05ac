"""The schema of a table: names and kinds of its columns, read from a YAML file, or inferred from data.

Kinds: continuous, integer, categorical, boolean, datetime; constant and identifier columns are not modelled (a constant
is repeated, an identifier numbered anew). "numerical" leaves the choice between continuous, integer and datetime to the
data.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from . import sdv

Kind = Literal["numerical", "continuous", "integer", "categorical", "boolean", "datetime", "constant", "identifier"]
Task = Literal["binclass", "multiclass", "regression"]
NUMERICAL_KINDS = ("continuous", "integer", "datetime")
CATEGORICAL_KINDS = ("categorical", "boolean")
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
LARGEST_INTEGER = 2**53  # above it, float64 does not hold every integer
IDENTIFIER_ROWS = 20  # rows from which on "all different" means an identifier
DOCUMENTATION = {  # keys of a schema file that describe a data set to its readers; nothing is computed from them
    "rows", "rows_of_the_full_set", "levels", "levels_in_test_but_not_in_train", "levels_in_train_but_not_in_test",
    "numerical_that_are_whole_numbers", "missing", "split", "duplicates", "source", "notes",
}  # fmt: skip


class Column(BaseModel):
    """One column as the user describes it; what is left out is inferred from the table."""

    model_config = ConfigDict(extra="forbid")

    name: str | int
    kind: Kind | None = None
    dtype: str | None = Field(None, description="pandas dtype of decoded values")
    missing: bool = Field(False, description="some cells are missing; missingness is then modelled")
    decimals: int | None = Field(None, description="digits after the point, continuous columns; null is all of them")
    format: str | None = Field(None, description="strftime format of dates that are text")
    step: str | None = Field(None, description=f"resolution of dates: {', '.join(STEPS)}")
    sdv: dict[str, Any] | None = Field(None, description="entries of SDV's metadata that kind and format do not say")

    @property
    def is_semantic(self) -> bool:
        """Whether SDV's metadata says what the cells mean (email, phone_number, …) rather than their kind."""
        return self.kind is None and "sdtype" in (self.sdv or {})

    def complete(self, values: pd.Series) -> Column:
        """The column with everything that it leaves open inferred from its values."""
        if self.dtype is not None and self.kind not in (None, "numerical"):
            return self
        inferred = infer_column(self.name, values)
        given = self.model_dump(exclude_unset=True, exclude_none=True)
        if pd.api.types.is_datetime64_any_dtype(values.dtype):
            given.pop("format", None)  # SDV's metadata has one for dates in any form; only text needs it
        if self.is_semantic:
            given["kind"] = inferred.kind if inferred.kind == "constant" else _kind_of_words(values)
        if self.kind == "numerical":
            given["kind"] = inferred.kind
            if inferred.kind not in (*NUMERICAL_KINDS, "constant"):
                given["kind"] = "integer" if pd.api.types.is_integer_dtype(values.dtype) else "continuous"
        return inferred.model_copy(update=given)


class Schema(BaseModel):
    """The columns of a table in their order, and its target.

    A file may give the kind of each column (`columns`), or list the names of the columns and sort them into `numerical`
    and `categorical`. Keys that document a data set (`DOCUMENTATION`) are allowed and ignored.

    Args:
        columns: [] for all columns of the table, each inferred. A column may be its name alone.
        numerical, categorical: names of columns, the target left out; both None if the kinds tell.
        target, task: the column that a model of the other columns predicts, and how.
        partial: the rows are a part of a published set, so that scores are not comparable with published ones.
    """

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    columns: list[Column] = []
    numerical: list[str | int] | None = None
    categorical: list[str | int] | None = None
    target: str | int | None = None
    task: Task | None = None
    partial: bool = False

    @model_validator(mode="before")
    @classmethod
    def _names_to_columns(cls, data: dict) -> dict:
        data = {key: value for key, value in data.items() if key not in DOCUMENTATION}
        if isinstance(data.get("columns"), list):
            data["columns"] = [{"name": c} if isinstance(c, str | int) else c for c in data["columns"]]
        return data

    @model_validator(mode="after")
    def _add_listed_kinds(self) -> Schema:
        if not self.has_lists:
            return self
        kinds = dict.fromkeys(self.numerical or [], "numerical") | dict.fromkeys(self.categorical or [], "categorical")
        if self.target is not None:
            kinds[self.target] = {None: None, "regression": "numerical"}.get(self.task, "categorical")
        columns = {column.name: column for column in self.columns}
        for name, kind in kinds.items():
            column = columns.setdefault(name, Column(name=name))
            column.kind = column.kind or kind
            listed, given = kind == "numerical", column.kind in ("numerical", *NUMERICAL_KINDS)
            if kind is not None and listed != given:
                raise ValueError(f"column {name!r} is listed as {kind}, but its kind is {column.kind}")
        self.columns = list(columns.values())
        return self

    @property
    def has_lists(self) -> bool:
        return self.numerical is not None or self.categorical is not None

    def names(self, *kinds: Kind) -> list[str | int]:
        """The names of the columns of these kinds."""
        return [column.name for column in self.columns if column.kind in kinds]

    @property
    def text_columns(self) -> list[str | int]:
        """Columns whose values are categories, which a reader should leave as they are written."""
        return [c.name for c in self.columns if c.kind in (*CATEGORICAL_KINDS, "identifier") or c.is_semantic]

    def roles(self) -> tuple[list, list]:
        """The names of the numerical columns and of the categorical ones, the target left out."""
        if self.has_lists:
            numerical, categorical = self.numerical or [], self.categorical or []
        else:
            numerical, categorical = self.names("numerical", *NUMERICAL_KINDS), self.names(*CATEGORICAL_KINDS)
        return [c for c in numerical if c != self.target], [c for c in categorical if c != self.target]

    def to_sdv(self) -> str:
        """The schema as the JSON of SDV's metadata of a single table; see `sdv`."""
        return json.dumps(sdv.metadata(self.columns), indent=4, ensure_ascii=False) + "\n"

    def dump(self) -> str:
        """The schema as YAML, without what is at its default."""
        return yaml.safe_dump(self.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True)

    @classmethod
    def load(cls, source: Schema | Mapping[str, Any] | str | Path) -> Schema:
        """A schema from a YAML file, from a JSON file of SDV's metadata, or from the content of either.

        Raises:
            ValueError: no such file, or what is wrong in it, in one line that names file and key.
        """
        if isinstance(source, Schema):
            return source
        is_file = isinstance(source, str | Path)
        where = str(source) if is_file else "schema"
        content = _read_yaml(source) if is_file else source
        if not isinstance(content, Mapping) or not content:
            raise ValueError(f"{where}: a schema is a mapping with the key columns")
        if sdv.is_metadata(content):
            content = sdv.content(content, where)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{where}: {_first_problem(error)}") from None


def _read_yaml(path: str | Path) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return json.loads(text) if str(path).lower().endswith(".json") else yaml.safe_load(text)
    except FileNotFoundError:
        raise ValueError(f"schema {str(path)!r} not found") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except (OSError, UnicodeError) as error:
        raise ValueError(f"schema {str(path)!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _first_problem(error: ValidationError) -> str:
    """The first error of a validation as one line."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}"
    return f"{where}: {problem['msg']}" if where else problem["msg"].removeprefix("Value error, ")


def check_columns(table: pd.DataFrame, names: list) -> None:
    """Raise ValueError, naming the column, unless the table has these columns, once each."""
    for name in names:
        if name not in table.columns:
            raise ValueError(f"column {name!r} is missing; the table has {', '.join(map(str, table.columns))}")
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise ValueError(f"column name {repeated[0]!r} occurs more than once: rename one of them")


def infer(table: pd.DataFrame, schema: Schema | None = None) -> Schema:
    """The schema of a table, every column complete.

    Args:
        schema: what is already known of it; the rest is inferred. If it has columns, only those are taken.

    Raises:
        ValueError: no rows or columns, a name that occurs twice, a column of values that cannot be modelled.
    """
    if not len(table.columns) or not len(table):
        raise ValueError(f"the table has {len(table)} rows and {len(table.columns)} columns; both are needed")
    schema = schema or Schema()
    columns = schema.columns or [Column.model_construct(name=name) for name in table.columns]
    check_columns(table, [column.name for column in columns])
    complete = [column.complete(table[column.name]) for column in columns]
    return Schema(columns=complete, name=schema.name, target=schema.target, task=schema.task, partial=schema.partial)


def infer_column(name: Any, values: pd.Series) -> Column:
    """The kind, dtype and format of a column with these values.

    Raises:
        ValueError: its name or its values are not supported.
    """
    if not isinstance(name, str | int):
        raise ValueError(f"column name {name!r} is neither text nor an integer: rename it")
    present = values.dropna()
    dtype, kind = values.dtype, None
    found = {"name": name, "dtype": str(dtype), "missing": len(present) < len(values)}
    if isinstance(dtype, pd.StringDtype) and dtype.storage != "python" and dtype.na_value is pd.NA:
        found["dtype"] = f"string[{dtype.storage}]"
    if isinstance(dtype, pd.CategoricalDtype):
        kind, found["dtype"] = "categorical", "category"
    elif pd.api.types.is_bool_dtype(dtype):
        kind = "boolean"
    elif pd.api.types.is_datetime64_any_dtype(dtype):
        kind, found["step"] = "datetime", _step(present)
    elif pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype):
        kind = _kind_of_numbers(name, present, found)
    elif not (pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype)):
        raise ValueError(f"column {name!r} has dtype {dtype}, which is not supported: turn it into numbers or text")
    else:
        kind = _kind_of_text(name, present, found)
    if len(present) == 0 or (not found["missing"] and _distinct(present) == 1):
        kind = "constant"
    return Column(kind=kind, **found)


def dates(values: pd.Series, form: str | None) -> pd.Series:
    """Dates as datetime64[ns] without a time zone; text is read by its format, NaT where it does not fit."""
    if form is not None:
        return pd.to_datetime(values, format=form, errors="coerce").astype("datetime64[ns]")
    if getattr(values.dtype, "tz", None) is not None:
        values = values.dt.tz_convert("UTC").dt.tz_localize(None)
    return values.astype("datetime64[ns]")


def _kind_of_numbers(name: str | int, present: pd.Series, found: dict) -> str:
    """The kind of a column of numbers; its decimals go into `found`."""
    numbers = present.to_numpy(dtype=np.float64)
    unique = np.unique(numbers[np.isfinite(numbers)])
    if not pd.api.types.is_integer_dtype(present.dtype):
        found["decimals"] = next((d for d in range(7) if np.array_equal(np.round(unique, d), unique)), None)
        return "integer" if found["decimals"] == 0 else "continuous"
    all_different = len(unique) == len(present) >= IDENTIFIER_ROWS and not found["missing"]
    if len(unique) and max(-unique[0], unique[-1]) >= LARGEST_INTEGER:
        return "identifier" if all_different else "categorical"
    consecutive = all_different and unique[-1] - unique[0] == len(unique) - 1
    named_id = all_different and re.search(r"(^|[_ .\-])id$", str(name), re.IGNORECASE)
    return "identifier" if consecutive or named_id else "integer"


def _kind_of_text(name: str | int, present: pd.Series, found: dict) -> str:
    """The kind of a column of text or Python objects; format and step of dates go into `found`."""
    types = {type(v) for v in present}
    if types == {datetime.date}:
        found["step"] = "day"
        return "datetime"
    unsupported = [t for t in types if not issubclass(t, str | bool | int | float | np.generic)]
    if unsupported:
        raise ValueError(
            f"column {name!r} holds values of type {unsupported[0].__name__}: turn them into numbers or text"
        )
    if types == {str}:
        if _are_dates(present, found):
            return "datetime"
        if {v.lower() for v in present.unique()[:3]} in BOOLEANS:
            return "boolean"
    if types <= {bool, np.bool_}:
        return "boolean"
    if len(present) >= IDENTIFIER_ROWS and _distinct(present) == len(present) and not found["missing"]:
        return "identifier"
    return "categorical"


def _kind_of_words(values: pd.Series) -> str:
    """The kind of names, addresses and the like: identifier if all differ."""
    present = values.dropna()
    is_key = len(present) == len(values) >= IDENTIFIER_ROWS and _distinct(present) == len(present)
    return "identifier" if is_key else "categorical"


def _are_dates(present: pd.Series, found: dict) -> bool:
    """Whether all texts are dates of one of the FORMATS, which goes into `found` with their step."""
    if not any(c.isdigit() for c in present.iloc[0]):
        return False
    for form in FORMATS:
        read = dates(present.astype(object), form)
        if read.notna().all() and (read.dt.strftime(form) == present.astype(object)).all():
            found["format"], found["step"] = form, _step(read)
            return True
    return False


def _step(values: pd.Series) -> str:
    """The largest step that all dates are a multiple of."""
    ns = dates(values, None).astype("int64").to_numpy()
    return next(name for name, size in STEPS.items() if not (ns % size).any())


def _distinct(present: pd.Series) -> int:
    return present.nunique() if present.dtype != object else len({(type(v), v) for v in present})
