"""Finds data: at the path itself, or below the folder in ANYSTATE_DATA."""

from __future__ import annotations

import os
import re
from pathlib import Path


def locate(path: str | Path) -> Path | None:
    """The existing file or folder meant by a path, relative ones also below ANYSTATE_DATA; None if there is none."""
    path = Path(path)
    below = [Path(os.environ["ANYSTATE_DATA"]) / path] if "ANYSTATE_DATA" in os.environ else []
    return next((p for p in [path, *below] if p.exists()), None)


def not_found(what: str, path: str | Path) -> str:
    """The error message for a path that `locate` did not find."""
    return f"{what} {str(path)!r} not found (ANYSTATE_DATA is {os.environ.get('ANYSTATE_DATA', 'not set')})"


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME of the Hugging Face hub, without the ending of a file."""
    return name.count("/") == 1 and not Path(name).suffix


def is_on_hub(name: str) -> bool:
    """Whether a name can only mean something on the hub: of the form OWNER/NAME, and there is no local folder OWNER."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).parent.exists()
