"""The checkpoints of a run. A run is a folder of `step_00001000` folders; needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

STEP = re.compile(r"step_(\d{8,})")
WEIGHTS = {"ema": "ema.safetensors", "raw": "model.safetensors"}


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one line for the user."""


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run.glob("step_*") if STEP.fullmatch(path.name)] if run.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def latest(run: Path) -> Path | None:
    found = checkpoints(run)
    return found[-1] if found else None


def resolve(path: str | Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the newest one of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "config.yaml").is_file() and (path / "model.safetensors").is_file():
        return path
    if newest := latest(path):
        return newest
    raise CheckpointError(f"no checkpoint at {str(path)!r}: expected a run folder or one of its step_… folders")
