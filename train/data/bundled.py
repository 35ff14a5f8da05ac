"""Tables that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from ...model.codecs.table.files import read_table

BUNDLED = {"adult": Path(__file__).parent / "adult"}


def load_bundled(name: str = "adult") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test rows of a data set that comes with the package."""
    if name not in BUNDLED:
        raise ValueError(f"data set {name!r} is not bundled; there are {', '.join(BUNDLED)}")
    return tuple(read_table(BUNDLED[name] / f"{part}.csv.gz") for part in ("train", "test"))


def find_table(source: str) -> Path:
    """The file of that path, or the training rows of a bundled set of that name."""
    path = Path(source)
    if not path.is_file() and source in BUNDLED:
        return BUNDLED[source] / "train.csv.gz"
    below = Path(os.environ.get("ANYSTATE_DATA", ".")) / source
    return below if below.is_file() and not path.is_file() else path
