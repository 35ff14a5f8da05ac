"""Kinds of modalities by name: a file of `model/modalities/`, an entry point, or `package.module:Class`.

A kind is a class, the section of a modality in a config with its behaviour (see `model.modalities.base`). Nothing else
in the package names one: a plug-in needs no change of any file.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

GROUP = "anystate.modalities"  # entry points: NAME = package.module:Class
PACKAGE = __package__.rpartition(".")[0]
FOLDER = Path(__file__).parent.parent / "model" / "modalities"


def shipped_kinds() -> list[str]:
    """The names of the kinds that come with the package: one file each."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "base"))


def find_kind(name: str) -> Any:
    """The class of a kind.

    Raises:
        ValueError: no kind of that name, a plug-in that cannot be imported, is not a `Modality`, or lacks a method.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"kind {name!r} is not a name; {_ways()}")
    place = name if ":" in name else _registered(name)
    kind, base = import_object(place, "kind"), importlib.import_module(f"{PACKAGE}.model.modalities.base").Modality
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"kind {name!r} is not a class derived from anystate.Modality")
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ValueError(f"kind {name!r} lacks the method {missing[0]}; see docs/own-modality.md")
    return kind


def _registered(name: str) -> str:
    """`package.module:Class` of a shipped kind or of an entry point."""
    if name in shipped_kinds():
        return f"{PACKAGE}.model.modalities.{name}:{name.capitalize()}"
    points = {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}
    if name in points:
        return points[name]
    more = f" and the plug-ins {', '.join(sorted(points))}" if points else ""
    raise ValueError(f"unknown kind {name!r}; there are {', '.join(shipped_kinds())}{more}, {_ways()}")


def import_object(place: str, what: str) -> Any:
    """The object `package.module:name`; modules are also looked for in the working directory.

    Raises:
        ValueError: it cannot be imported, with the reason.
    """
    module_name, _, attribute = place.partition(":")
    try:
        module = _import(module_name)
    except Exception as error:  # whatever the user's module raises
        if module_name.startswith(f"{PACKAGE}."):  # ours: a library is missing, say pandas
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{what} {place!r} cannot be imported ({reason}); run the command in the folder of its file, or install it"
        ) from None
    if not hasattr(module, attribute):
        raise ValueError(f"{what} {place!r}: the module {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def _import(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def _ways() -> str:
    return "or a class of your own as package.module:Class"
