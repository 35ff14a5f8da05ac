"""The metadata JSON of SDV (docs.sdv.dev, "Metadata JSON") as the content of a schema, and back.

| sdtype | kind |
|---|---|
| numerical | integer if its `computer_representation` is one, else numerical |
| categorical, boolean | the same |
| datetime | the same; `datetime_format` is the format of text |
| id, and the primary and alternate keys | identifier |
| email, phone_number, address, … | identifier if all cells differ, else categorical |
| unknown | inferred |

What a kind does not say (`regex_format`, `pii`, the meaning of a column, …) is kept in `Column.sdv` and written again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

VERSION = "METADATA_SPEC_VERSION"
KINDS = {"categorical": "categorical", "boolean": "boolean", "datetime": "datetime", "id": "identifier"}
INTEGERS = re.compile(r"U?Int(8|16|32|64)")
SDTYPES = {
    "continuous": "numerical", "integer": "numerical", "numerical": "numerical", "constant": "categorical",
    "identifier": "id", "categorical": "categorical", "boolean": "boolean", "datetime": "datetime",
}  # fmt: skip


def is_metadata(content: Mapping[str, Any]) -> bool:
    """Whether the content of a file is SDV's metadata rather than a schema of ours."""
    return VERSION in content or "tables" in content or isinstance(content.get("columns"), Mapping)


def content(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content of a schema that says the same.

    Raises:
        ValueError: several tables, or entries that the specification does not have; names them.
    """
    name = None
    if "tables" in metadata:
        tables = metadata["tables"]
        if not isinstance(tables, Mapping) or len(tables) != 1:
            names = ", ".join(map(str, tables)) if isinstance(tables, Mapping) else "none"
            raise ValueError(f"{where}: metadata of one table is needed, this has {len(tables)}: {names}")
        ((name, metadata),) = tables.items()
    columns = metadata.get("columns") if isinstance(metadata, Mapping) else None
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(f"{where}: SDV's metadata needs the key columns, a mapping of names")
    primary, keys = metadata.get("primary_key"), set()
    for key in (primary, *metadata.get("alternate_keys", ())):
        keys |= set(key) if isinstance(key, list) else {key}
    if unknown := sorted(keys - {None, *columns}):
        raise ValueError(f"{where}: the key {unknown[0]!r} is not one of the columns")
    found = [_column(column, entry, column == primary, column in keys, where) for column, entry in columns.items()]
    return {"columns": found} if name is None else {"name": name, "columns": found}


def _column(name: str, entry: Any, is_primary: bool, is_key: bool, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sdtype"), str):
        raise ValueError(f"{where}: column {name!r} needs an sdtype")
    rest = dict(entry)
    sdtype = rest.pop("sdtype")
    column: dict[str, Any] = {"name": name}
    if sdtype == "numerical":
        representation = rest.get("computer_representation", "")
        column["kind"] = "integer" if INTEGERS.fullmatch(representation) else "numerical"
    elif sdtype in KINDS:
        column["kind"] = KINDS[sdtype]
    elif sdtype != "unknown":
        rest["sdtype"] = sdtype
    if sdtype == "datetime" and rest.get("datetime_format"):
        column["format"] = rest.pop("datetime_format")
    if is_key:
        column["kind"] = "identifier"
        rest |= {"key": "primary" if is_primary else "alternate"}
    return {**column, "sdv": rest} if rest else column


def metadata(columns: Sequence[Any]) -> dict[str, Any]:
    """The metadata of a single table, as JSON content.

    Args:
        columns: the complete `schema.Column`s.
    """
    found: dict[str, Any] = {"columns": {}, VERSION: "SINGLE_TABLE_V1"}
    alternate = []
    for column in columns:
        own = dict(column.sdv or {})
        key = own.pop("key", None)
        entry = {"sdtype": own.pop("sdtype", SDTYPES.get(column.kind or "", "unknown")), **own}
        if entry["sdtype"] == "datetime" and column.format is not None:
            entry["datetime_format"] = column.format
        if column.kind in ("integer", "continuous"):
            entry.setdefault("computer_representation", _representation(column))
        found["columns"][str(column.name)] = entry
        if key == "primary":
            found["primary_key"] = str(column.name)
        elif key == "alternate":
            alternate.append(str(column.name))
    identifiers = [str(column.name) for column in columns if column.kind == "identifier"]
    if "primary_key" not in found and len(identifiers) == 1:
        found["primary_key"] = identifiers[0]
    return found | ({"alternate_keys": alternate} if alternate else {})


def _representation(column: Any) -> str:
    """SDV's name of the dtype of numbers."""
    name = (column.dtype or "float64").lower().replace("int", "Int").replace("u", "U").split("[")[0]
    return name if INTEGERS.fullmatch(name) else "Float"
