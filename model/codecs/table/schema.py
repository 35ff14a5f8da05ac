"""The schema of a table: names and kinds of its columns, read from a YAML file, or inferred from data.

Kinds: continuous, integer, categorical, boolean, datetime; constant and identifier columns are not modelled (a constant
is repeated, an identifier numbered anew). "numerical" leaves the choice between continuous, integer and datetime to the
data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from . import sdv
from .dates import STEPS
from .inference import infer_fields
from .spelling import Spelling
from .text_kinds import IDENTIFIER_ROWS

Kind = Literal["numerical", "continuous", "integer", "categorical", "boolean", "datetime", "constant", "identifier"]
Task = Literal["binclass", "multiclass", "regression"]
NUMERICAL_KINDS = ("continuous", "integer", "datetime")
CATEGORICAL_KINDS = ("categorical", "boolean")
TEXT = pd.Series(["text"]).dtype  # what pandas makes of text: str since version 3, object before
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
    format: str | None = Field(None, description="strftime format of dates that are text or digits, see `dates`")
    step: str | None = Field(None, description=f"resolution of dates and time spans: {', '.join(STEPS)}")
    spelling: Spelling | None = Field(None, description="how numbers that are text are written")
    gaps: list[str] = Field([], description="texts that mean a missing cell among numbers or dates")
    increment: int | float | None = Field(None, description="values are multiples of it, counted from the offset")
    offset: int | float | None = Field(None, description="where the multiples begin, in units of the step for dates")
    zone: str | None = Field(None, description="time zone of the wall times that are modelled; null is UTC")
    cell_type: str | None = Field(None, description="type of the Python objects that a column holds")
    sdv: dict[str, Any] | None = Field(None, description="entries of SDV's metadata that kind and format do not say")
    reason: str | None = Field(None, exclude=True, description="why it has this kind")
    warning: str | None = Field(None, exclude=True, description="what was assumed, and how to change it")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Column) and self.model_dump() == other.model_dump()

    @property
    def is_semantic(self) -> bool:
        """Whether SDV's metadata says what the cells mean (email, phone_number, …) rather than their kind."""
        return self.kind is None and "sdtype" in (self.sdv or {})

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to infer."""
        if self.dtype is None or self.kind in (None, "numerical"):
            return False
        if self.kind == "datetime":
            return self.step is not None
        is_text = self.dtype in ("str", "object") or self.dtype.startswith("string")
        return self.kind not in ("continuous", "integer") or not is_text or bool(self.spelling or self.cell_type)

    def complete(self, values: pd.Series) -> Column:
        """The column with everything that it leaves open inferred from its values."""
        if self.is_complete:
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set if getattr(self, name) is not None}
        if pd.api.types.is_datetime64_any_dtype(values.dtype):
            given.pop("format", None)  # SDV's metadata has one for dates in any form; only text needs it
        inferred = infer_column(self.name, values, given)
        if self.is_semantic and inferred.kind != "constant":
            given["kind"] = _kind_of_words(values)
        if self.kind == "numerical":
            given["kind"] = inferred.kind
            if inferred.kind not in (*NUMERICAL_KINDS, "constant"):
                given["kind"] = "integer" if pd.api.types.is_integer_dtype(values.dtype) else "continuous"
        if given.get("kind", inferred.kind) != inferred.kind:
            given |= dict.fromkeys({"increment", "offset"} - given.keys())
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


def infer_column(name: Any, values: pd.Series, given: Mapping[str, Any] | None = None) -> Column:
    """The column with these values, what is `given` of it kept.

    Raises:
        ValueError: its name or its values are not supported.
    """
    return Column(**infer_fields(name, values, given or {}))


def describe(schema: Schema) -> list[tuple[str, str, str]]:
    """(name, kind and details, reason) of every column, as text to print."""
    rows = []
    for c in schema.columns:
        notes = [c.kind or "inferred"]
        if c.kind == "continuous" and c.decimals is not None:
            notes.append(f"{c.decimals} decimals")
        if c.increment is not None:
            unit = f" {c.step}s" if c.step else ""
            notes.append(f"multiples of {c.increment:g}{unit}" + (f" plus {c.offset:g}" if c.offset else ""))
        elif c.step is not None:
            notes.append(f"to the {c.step}")
        if c.missing:
            notes.append("with missing cells")
        rows.append((str(c.name), ", ".join(notes), c.reason or ""))
    return rows


def warnings_of(schema: Schema) -> list[str]:
    """A line for each column of which something was assumed."""
    return [f"column {c.name!r}: {c.warning}" for c in schema.columns if c.warning]


def _kind_of_words(values: pd.Series) -> str:
    """The kind of names, addresses and the like: identifier if all differ."""
    present = values.dropna()
    is_key = len(present) == len(values) >= IDENTIFIER_ROWS and present.is_unique
    return "identifier" if is_key else "categorical"
