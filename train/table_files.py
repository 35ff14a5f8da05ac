"""Imputation of table files: empty cells are filled, every other byte of a CSV stays."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import pandas as pd

from ..model.codecs.table.codec import TableCodec
from ..model.codecs.table.files import fill_csv, parse_csv, read_table, read_text, write_table
from ..model.codecs.table.schema import NUMERICAL_KINDS
from ..model.storage import atomic_write
from .synthesizer import TableSynthesizer

PARQUET = (".parquet", ".pq")


@dataclasses.dataclass(frozen=True)
class TableFile:
    """A table that was read from a file, and the text of the file if it is a CSV."""

    table: pd.DataFrame
    text: str | None
    missing: list[str]

    @classmethod
    def read(cls, path: Path, codec: TableCodec, missing: list[str]) -> TableFile:
        """Read a table with empty cells; columns that the codec models as text stay text.

        Args:
            missing: strings that mean an empty cell.
        """
        if path.suffix in PARQUET:
            return cls(read_table(path), None, missing)
        if not path.is_file():
            raise ValueError(f"table {str(path)!r} not found")
        text = read_text(path)
        strings = [c.name for c in codec.columns.values() if c.column.kind not in NUMERICAL_KINDS or c.column.format]
        return cls(parse_csv(text, str(path), missing, strings), text, missing)

    def write(self, path: Path, filled: pd.DataFrame) -> None:
        """Write the table with the columns of `filled` in the place of its own."""
        whole = self.table.assign(**{str(name): filled[name] for name in filled.columns})
        if self.text is None or path.suffix in PARQUET:
            write_table(whole, path, self.missing[0])
            return
        data = fill_csv(self.text, self.table, whole).encode("utf-8")
        atomic_write(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def impute_file(
    model: TableSynthesizer,
    source: Path,
    out: Path,
    draws: int | None = None,
    expected: bool = False,
    spread: Path | None = None,
    seed: int | None = None,
) -> tuple[str, list[Path]]:
    """Fill the empty cells of a table file; returns what was filled as a text, and the paths of the files written.

    Args:
        out: the file to write; several draws go to NAME.1.csv, NAME.2.csv, …
        draws: see `TableSynthesizer.impute`; default 1, with `expected` 20.
        expected: fill with the mean of numbers and the most probable category instead of draws.
        spread: with `expected`, write standard deviations and probabilities of other values to this CSV.
    """
    codec = model.columns_
    file = TableFile.read(source, codec, model.missing_)
    modelled = file.table[[name for name in file.table.columns if name in codec.columns]]
    written = []
    if expected:
        filled, deviation = model.impute(modelled, "expected", draws, seed)
        tables = [filled]
    else:
        tables = model.impute(modelled, "draw", draws or 1, seed)
    for i, filled in enumerate(tables):
        path = out if len(tables) == 1 else out.with_name(out.name.replace(".", f".{i + 1}.", 1))
        file.write(path, filled)
        written.append(path)
    if expected and spread is not None:
        deviation.to_csv(spread, index=False)
        written.append(spread)
    return counted(file.table, tables[0]), written


def counted(table: pd.DataFrame, filled: pd.DataFrame) -> str:
    """The number of cells that were filled and, by column, of those that stay empty, as a text."""
    before = table.reindex(columns=filled.columns).isna()
    cells = int((before & filled.notna()).sum().sum())
    text = f"filled {cells:,} cell{'s' * (cells != 1)}"
    left = {**filled.isna().sum(), **{name: table[name].isna().sum() for name in table if name not in filled}}
    why = {True: "had no value in training", False: "the model does not have"}
    parts = [f"{count:,} of column {name!r}, which {why[name in filled]}" for name, count in left.items() if count]
    return text + (f", left empty: {'; '.join(parts)}" if parts else "")
