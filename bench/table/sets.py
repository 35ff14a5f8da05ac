"""The data sets of the benchmarks: one folder each, with train.csv.gz, test.csv.gz and schema.yaml."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from ...model.codecs.table.files import read_table
from ...model.codecs.table.schema import Schema


def find_set(name: str, data: Path | str | None = None) -> Path:
    """The folder of a set in `data`, default $ANYSTATE_DATA/tabular.

    Raises:
        ValueError: it is not there.
    """
    folder = Path(data) if data is not None else Path(os.environ.get("ANYSTATE_DATA", "data")) / "tabular"
    if not (folder / name / "schema.yaml").is_file():
        raise ValueError(f"set {name!r} is not in {folder}; `anystate table fetch {name}` gets it")
    return folder / name


def read_set(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, Schema]:
    """Training rows, test rows and schema of a set."""
    schema = Schema.load(folder / "schema.yaml")
    train, test = (
        read_table(folder / f"{part}.csv.gz", text_columns=schema.text_columns) for part in ("train", "test")
    )
    return train, test, schema
