"""Reading configs: YAML files with their bases, `key=value` overrides, and errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .aliases import modernize, split_balanced
from .config import Config, Image, Latents, Loss, SamplerConfig, Schedule, Section, StreamConfig, Text, Tokenizer

HERE = Path(__file__).parent
MODALITY_SECTIONS: dict[str, type[Section]] = {
    "schedule": Schedule,
    "sampler": SamplerConfig,
    "loss": Loss,
    "stream": StreamConfig,
    "latents": Latents,
    "tokenizer": Tokenizer,
}


class ConfigError(ValueError):
    """A setting is wrong; the message is one line for the user."""


def load_config(source: str | Path, overrides: list[str] | None = None, model: type[Section] = Config):
    """Read a YAML config (a path, or the name of one shipped in `configs/`) and apply `key.key=value` overrides.

    A file may say `base: OTHER`, a file beside it or a shipped name: it is then OTHER with its own keys put over it.

    model: what it describes, a `Config` or another top-level section.

    Raises:
        ConfigError: missing file, broken YAML, unknown key, wrong type or value; names the key and the way out.
    """
    path = find_config(source)
    raw = _read(path)
    for override in overrides or []:
        raw = _override(raw, override)
    return parse_config(raw, str(path), model)


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
    return _merge(_read(beside if beside.is_file() else find_config(base), (*seen, path)), raw)


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`, section by section."""
    both = {k: _merge(base[k], v) for k, v in own.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **own, **both}


def find_config(source: str | Path) -> Path:
    """The config file of that path or shipped name."""
    for path in (Path(source), HERE / source, HERE / f"{source}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(str(p.relative_to(HERE).with_suffix("")) for p in HERE.rglob("*.yaml")))
    raise ConfigError(f"config {str(source)!r} not found; shipped configs: {shipped}")


def parse_config(raw: dict[str, Any], where: str, model: type[Section] = Config):
    """A config from plain data, under today's names of settings or earlier ones; `where` names its origin in errors."""
    raw = _modernize(raw, where)
    try:
        return model.model_validate(split_balanced(raw))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(error, model)}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def dump_config(config: BaseModel) -> str:
    """The config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _modernize(raw: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return modernize(raw)
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


def _first_problem(error: ValidationError, model: type[Section]) -> str:
    """One line: which key, its value, what is allowed."""
    problem = error.errors(include_url=False)[0]
    tags = {"gaussian", "masked", "uniform"}  # pydantic puts the chosen union member into the path
    path = [str(part) for part in problem["loc"] if part not in tags]
    key = ".".join(path) or "config"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], model)
        return f"unknown key {key!r}" + (f"; allowed here: {', '.join(known)}" if known else "")
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    return f"{key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _fields_at(path: list[str], model: type[Section]) -> list[str]:
    """The keys allowed in the section at `path`, as far as the models tell."""
    if path[:1] == ["modalities"]:
        if path[-1] in MODALITY_SECTIONS:
            return list(MODALITY_SECTIONS[path[-1]].model_fields)
        return sorted({*Image.model_fields, *Text.model_fields})
    node: type[BaseModel] = model
    for key in path:
        annotation = node.model_fields[key].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]
        sections = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            return []
        node = sections[0]
    return list(node.model_fields)
