"""Imputation of table files: empty cells are filled, every other byte of a CSV stays."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..model.codecs.table import formats
from ..model.codecs.table.codec import TableCodec
from ..model.codecs.table.delimited import fill
from ..model.codecs.table.files import TableFile, check_output, write_bytes, write_table
from ..model.codecs.table.schema import NUMERICAL_KINDS
from .synthesizer import TableSynthesizer


def read_incomplete(model: TableSynthesizer, source: Path, reading: dict[str, str | None]) -> TableFile:
    """A table with empty cells; columns that the model has as text stay text.

    Args:
        reading: separator, encoding and decimal mark as far as the user gives them.
    """
    columns = model.columns_.columns.values()
    strings = [c.name for c in columns if c.column.kind not in NUMERICAL_KINDS or c.column.format]
    return TableFile.read(source, model.missing_, strings, **reading, usual=model.dialect_)


def write_filled(file: TableFile, path: Path, filled: pd.DataFrame, model: TableSynthesizer) -> None:
    """Write the table of a file with the columns of `filled` in the place of its own."""
    whole = file.table.assign(**{str(name): filled[name] for name in filled.columns})
    kind, packing = formats.by_name(path)
    if file.dialect is None or (kind or "csv") != ("tsv" if file.dialect.sep == "\t" else "csv"):
        write_table(whole, path, model.missing_[0], model.dialect_)
        return
    text = fill(file.text, file.table, whole, file.dialect)
    write_bytes(path, formats.pack(file.dialect.to_bytes(text, str(path)), packing, path.name))


def numbered(out: Path, draw: int) -> Path:
    """NAME.1.csv, NAME.2.csv, … of NAME.csv."""
    return out.with_name(out.name.replace(".", f".{draw}.", 1))


def impute_file(
    model: TableSynthesizer,
    source: Path,
    out: Path,
    draws: int | None = None,
    expected: bool = False,
    spread: Path | None = None,
    seed: int | None = None,
    reading: dict[str, str | None] | None = None,
) -> tuple[str, list[Path], tuple[str, ...]]:
    """Fill the empty cells of a table file.

    Returns (what was filled as a text, paths of the files written, notes on how the file was read).

    Args:
        out: the file to write; several draws go to NAME.1.csv, NAME.2.csv, …
        draws: see `TableSynthesizer.impute`; default 1, with `expected` 20.
        expected: fill with the mean of numbers and the most probable category instead of draws.
        spread: with `expected`, write standard deviations and probabilities of other values to this file.
        reading: sep, encoding and decimal of the file, where they should not be guessed.
    """
    codec: TableCodec = model.columns_
    file = read_incomplete(model, source, reading or {})
    for path in filter(None, (out, spread)):
        check_output(path, *file.table.shape)
    modelled = file.table[[name for name in file.table.columns if name in codec.columns]]
    written = []
    if expected:
        filled, deviation = model.impute(modelled, "expected", draws, seed)
        tables = [filled]
    else:
        tables = model.impute(modelled, "draw", draws or 1, seed)
    for i, filled in enumerate(tables):
        written.append(out if len(tables) == 1 else numbered(out, i + 1))
        write_filled(file, written[-1], filled, model)
    if expected and spread is not None:
        write_table(deviation, spread)
        written.append(spread)
    return counted(file.table, tables[0]), written, file.notes


def counted(table: pd.DataFrame, filled: pd.DataFrame) -> str:
    """The number of cells that were filled and, by column, of those that stay empty, as a text."""
    before = table.reindex(columns=filled.columns).isna()
    cells = int((before & filled.notna()).sum().sum())
    text = f"filled {cells:,} cell{'s' * (cells != 1)}"
    left = {**filled.isna().sum(), **{name: table[name].isna().sum() for name in table if name not in filled}}
    why = {True: "had no value in training", False: "the model does not have"}
    parts = [f"{count:,} of column {name!r}, which {why[name in filled]}" for name, count in left.items() if count]
    return text + (f", left empty: {'; '.join(parts)}" if parts else "")
