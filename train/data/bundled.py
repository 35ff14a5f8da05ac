"""Tables that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...configs.locate import locate

if TYPE_CHECKING:
    import pandas as pd

BUNDLED = {"adult": Path(__file__).parent / "adult"}


def load_bundled(name: str = "adult") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test rows of a bundled data set.

    Raises:
        ValueError: unknown name.
    """
    if name not in BUNDLED:
        raise ValueError(f"data set {name!r} is not bundled; choose one of: {', '.join(BUNDLED)}")
    from ...model.codecs.table.files import read_table

    folder = BUNDLED[name]
    return read_table(folder / "train.csv.gz"), read_table(folder / "test.csv.gz")


def find_table(source: str) -> Path:
    """The path of a table: the file itself, also below $ANYSTATE_DATA, or the training rows of a bundled set.

    Raises:
        ValueError: there is none.
    """
    path = locate(source)
    if path is not None and not (path.is_dir() and source in BUNDLED):
        return path  # the reader says so if it is a folder
    if source in BUNDLED:
        return BUNDLED[source] / "train.csv.gz"
    raise ValueError(f"table {source!r} not found; bundled sets: {', '.join(BUNDLED)}")
