"""The page of all settings, docs/settings.md, from the descriptions of fields: `python -m anystate.configs.page`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .aliases import REMOVED, RENAMED, TABLE, TABLE_MODALITY
from .config import Config
from .kinds import find_kind, shipped_kinds

PATH = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Every key of a config file; `python -m anystate.configs.page` writes this page. The sections below follow in the order
of a file; those of modalities, one for each kind, come last.
`key.key=value` on the command line replaces a setting, `anystate train CONFIG --dry-run` prints all of them, and
`base: OTHER` builds a file on another.
"""
OLD = "## Old names\n\nThey are still read, as the configs of saved runs hold them (`configs/aliases.py`).\n"
LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def page() -> str:
    """The text of the page."""
    sections, places = {}, {}
    roots = {"": Config} | {f"modalities.NAME with kind: {name}": find_kind(name) for name in shipped_kinds()}
    for path, model in roots.items():
        schema = model.model_json_schema()
        sections |= {model.__name__: schema, **schema["$defs"]}
        sections.pop("Section", None)  # of a modality in general
        find_sections(sections, model.__name__, path, places)
    return "\n".join([HEAD, *(describe(name, sections[name], list(places[name])) for name in places), OLD, old_names()])


def find_sections(sections: dict[str, dict], name: str, path: str, places: dict[str, dict[str, None]]) -> None:
    """Add to `places` where a section and those inside it occur in a config file, in the order of the file."""
    places.setdefault(name, {})[f"`{path}`" if path else "The whole file"] = None
    for key, field in sections[name]["properties"].items():
        place = path.split(" with ")[0]
        inner = f"{place}.{key}.NAME" if "additionalProperties" in field else f"{place}.{key}"
        for other in references(field):
            find_sections(sections, other, inner.lstrip("."), places)


def references(field: dict) -> list[str]:
    """The sections that a field may hold."""
    return [name for name in dict.fromkeys(re.findall(r"#/\$defs/(\w+)", json.dumps(field))) if name != "Section"]


def describe(name: str, schema: dict, places: list[str]) -> str:
    """One section: its name, where it occurs, its description and its settings."""
    about = schema.get("description", "").split("\n\n")[0].replace("\n", " ")
    head, rows = ["key", "values", "default", "meaning"], []
    for key, field in schema["properties"].items():
        value = "required" if key in schema.get("required", ()) else default(field)
        rows.append([f"`{key}`", values(field), value, field.get("description", "")])
    return f"## {name}\n\n" + f"{', '.join(places)}. {about}".strip() + "\n\n" + table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def default(field: dict) -> str:
    """The default value, unless that is a whole section."""
    value = field.get("default")
    return "" if value and references(field) else f"`{json.dumps(value, ensure_ascii=False)}`"


def values(field: dict) -> str:
    """The values that a field takes."""
    if names := references(field):
        return " or ".join(
            [f"[{name}](#{name.lower()})" for name in names] + ["null"] * ('"null"' in json.dumps(field))
        )
    if "anyOf" in field:
        return " or ".join(values(choice) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") in ("array", "object"):
        inner = field.get("items") or field.get("additionalProperties") or (field.get("prefixItems") or [True])[0]
        if inner is True:
            return "list" if field["type"] == "array" else "names with values"
        return ("list of " if field["type"] == "array" else "names with ") + values(inner)
    if "$ref" in field:
        return "a section of a kind"
    limits = ", ".join(f"{sign} {field[key]:g}" for key, sign in LIMITS.items() if key in field)
    return f"{field.get('type', 'any')} {limits}".strip()


def old_names() -> str:
    """The table of renamed and removed settings."""
    rows = [
        [f"`{old}`", f"`{new}`", ", ".join(f"{a} → {b}" for a, b in v.items())] for old, (new, v) in RENAMED.items()
    ]
    removed = [[f"`{old}`", "removed", ""] for old in REMOVED]
    moved = [[f"`{key}` at the top of a file", f"`modalities.{TABLE_MODALITY}.{key}`", ""] for key in TABLE]
    moved += [["`data.name`, `data.path`", "`data.source`", ""], ["`modalities.*.process` alone", "`kind`", ""]]
    return table(["old", "new name of its last part, or its place", "values"], [*rows, *removed, *moved])


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
