"""Measured block sizes: {(operation, width, dtype): {launch argument: number}}, from `tiles.json` beside this file.

`python -m anystate.bench.gpu.sweep RESULTS` writes the file from a sweep on a GPU; without one it is empty. An entry
overrides the defaults of the launcher.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

FILE = Path(__file__).with_name("tiles.json")
Key = tuple[str, int, str]


def read(file: Path = FILE) -> dict[Key, dict[str, int]]:
    tiles = {}
    for key, entry in json.loads(file.read_text(encoding="utf-8")).items():
        op, width, dtype = key.split()
        tiles[op, int(width), dtype] = entry
    return tiles


def write(tiles: dict[Key, dict[str, int]], file: Path = FILE) -> None:
    entries = {" ".join(map(str, key)): tiles[key] for key in sorted(tiles)}
    file.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


TILES = read()


def key_of(op: str, width: int, dtype: torch.dtype) -> Key:
    return op, width, str(dtype).removeprefix("torch.")


def measured(op: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch arguments that override the defaults of an operation on rows of this width and dtype."""
    return dict(TILES.get(key_of(op, width, dtype), {}))


@contextlib.contextmanager
def trial(op: str, width: int, dtype: torch.dtype, **values: int) -> Iterator[None]:
    """Use these launch arguments inside, instead of those of the table; for sweeps and tests."""
    key = key_of(op, width, dtype)
    before = TILES.pop(key, None)
    TILES[key] = values
    try:
        yield
    finally:
        del TILES[key]
        if before is not None:
            TILES[key] = before
