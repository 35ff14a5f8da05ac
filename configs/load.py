"""Reading configs: YAML files with their bases, `key=value` overrides, and errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .aliases import TABLE_BASE, merge, modernize, upgrade
from .config import Config, Section
from .kinds import find_kind

HERE = Path(__file__).parent


class ConfigError(ValueError):
    """A setting is wrong; the message is one line for the user."""


def load_config(source: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config (a path, or the name of one shipped in `configs/`) and apply `key.key=value` overrides.

    A file may say `base: OTHER`, a file beside it or a shipped name: it is then OTHER with its own keys put over it.

    Raises:
        ConfigError: missing file, broken YAML, unknown key, wrong type or value; names the key and the way out.
    """
    path = find_config(source)
    raw = _upgrade(_read(path), str(path))
    for override in overrides or []:
        raw = _override(raw, override)
    return parse_config(raw, str(path))


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain data of a config file laid over that of its bases."""
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    raw = _modernize(raw, str(path))
    base = raw.pop("base", None)
    if base is None:
        return raw
    if path in seen:
        raise ConfigError(f"{path}: base leads back to this file")
    beside = path.parent / base
    return merge(_read(beside if beside.is_file() else find_config(base), (*seen, path)), raw)


def find_config(source: str | Path) -> Path:
    """The config file of that path or shipped name."""
    for path in (Path(source), HERE / source, HERE / f"{source}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(str(p.relative_to(HERE).with_suffix("")) for p in HERE.rglob("*.yaml")))
    raise ConfigError(f"config {str(source)!r} not found; shipped configs: {shipped}")


def parse_config(raw: dict[str, Any], where: str) -> Config:
    """A config from plain data, under today's names of settings or earlier ones; `where` names its origin in errors.

    The modalities come last: their kinds may need torch, and other errors should appear at once.
    """
    raw = _upgrade(_modernize(raw, where), where)
    modalities = raw.get("modalities")
    names = dict.fromkeys(modalities, Section()) if isinstance(modalities, dict) else modalities
    settings = _validate(Config, {**raw, "modalities": names} if names is not None else raw, where, "")
    sections = {m: _parse_modality(m, section, where) for m, section in (modalities or {}).items()}
    return settings.model_copy(update={"modalities": sections})


def _parse_modality(m: str, section: Any, where: str) -> Section:
    """The section of a modality as its kind reads it."""
    place = f"modalities.{m}"
    if isinstance(section, Section):
        return section
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: {place} = {section!r}: expected a section with a kind")
    if "kind" not in section:
        raise ConfigError(f"{where}: missing key '{place}.kind'")
    try:
        kind = find_kind(section["kind"])
    except ValueError as error:
        raise ConfigError(f"{where}: {place}: {error}") from None
    return _validate(kind, section, where, place)


def _validate(model: type[Section], raw: Any, where: str, place: str) -> Any:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(error, model, place)}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {place}{': ' if place else ''}{error}") from None


def dump_config(config: BaseModel) -> str:
    """The config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _modernize(raw: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return modernize(raw)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _upgrade(raw: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return upgrade(raw, lambda: _read(find_config(TABLE_BASE)))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """`raw` with the setting of a `key.key=value` replaced."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        new = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {value!r} is not valid YAML") from None
    parts = key.split(".")
    for part in reversed(parts):
        new = {part: new}
    new = _modernize(new, f"override {override!r}")
    try:
        return _replace(raw, new, len(parts))
    except TypeError as error:
        raise ConfigError(f"override {override!r}: {error} is not a section") from None


def _replace(raw: dict[str, Any], new: dict[str, Any], depth: int) -> dict[str, Any]:
    """`raw` with the values `depth` keys deep in `new`; TypeError where a key on the way holds no section."""
    out = dict(raw)
    for key, value in new.items():
        inner = raw.get(key, {})
        if depth > 1 and not isinstance(inner, dict):
            raise TypeError(repr(key))
        out[key] = _replace(inner, value, depth - 1) if depth > 1 else value
    return out


def _first_problem(error: ValidationError, model: type[Section], place: str) -> str:
    """One line: which key, its value, what is allowed; place: of the model in the file."""
    problem = error.errors(include_url=False)[0]
    tags = {"mmdit", "table_dit"}  # pydantic puts the chosen union member into the path
    path = [str(part) for part in problem["loc"] if part not in tags]
    key = ".".join([*([place] if place else []), *path]) or "config"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], model, problem["loc"])
        return f"unknown key {key!r}" + (f"; allowed here: {', '.join(known)}" if known else "")
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # of a whole section
        return (f"{key}: " if key != "config" else "") + str(problem["ctx"]["error"])
    return f"{key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _fields_at(path: list[str], model: type[Section], loc: tuple) -> list[str]:
    """The keys allowed in the section at `path`, as far as the models tell."""
    node: type[BaseModel] = model
    for key in path:
        sections = _sections_in(node.model_fields[key].annotation)
        if not sections:
            return []
        node = next((s for s in sections if getattr(s.model_fields.get("kind"), "default", None) in loc), sections[0])
    return list(node.model_fields)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in getattr(annotation, "__args__", ()) for section in _sections_in(inner)]
