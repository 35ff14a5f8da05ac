"""Table files of every format: read with every text as it is written, and written as their name says."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import formats
from .delimited import parse, render
from .dialect import Dialect, decimal_mark, separator
from .text_encoding import decode

WRITABLE = ("csv", "tsv", "parquet", "arrow", "xlsx", "json", "jsonl")
EXCEL_ROWS, EXCEL_COLUMNS = 1_048_576, 16_384  # of a sheet, the header included


@dataclasses.dataclass(frozen=True)
class TableFile:
    """A table that was read from a file.

    Args:
        dialect: how the text is written if the file has separators; None for other formats.
        text: its content in that case, without the byte order mark.
        notes: what the user should know of the reading.
    """

    table: pd.DataFrame
    dialect: Dialect | None = None
    text: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        path: str | Path,
        missing: Sequence[str] = (),
        text_columns: Collection[str | int] = (),
        sep: str | None = None,
        encoding: str | None = None,
        decimal: str | None = None,
        usual: Dialect | None = None,
    ) -> TableFile:
        """Read a file, see `read_table`.

        Args:
            usual: the dialect where the file leaves the guess open, such as that of the training rows.
        """
        path = Path(path)
        sep, decimal = sep and separator(sep), decimal and decimal_mark(decimal)
        data, kind, notes = formats.load(path)
        where = str(path)
        formats.require_library(kind, path)
        if kind == "parquet":
            return cls(formats.read_parquet(data, where), notes=tuple(notes))
        if kind == "arrow":
            return cls(formats.read_arrow(data, where), notes=tuple(notes))
        if kind in ("xlsx", "xls"):
            table, more = formats.read_excel(data, kind, where, missing)
            return cls(table, notes=(*notes, *more))
        if not data.strip():
            raise ValueError(f"{where} is empty: a header and rows are needed")
        text, encoding, prefix = decode(data, where, encoding, usual and usual.encoding)
        if kind in ("json", "jsonl"):
            content = formats.parse_json(text, where, kind == "jsonl")
            return cls(formats.from_records(content, where), notes=tuple(notes))
        if line := re.match(r"sep=(.)(\r\n|\n)", text):  # Excel's own
            sep, text, prefix = sep or line[1], text[line.end() :], prefix + line[0]
        table, dialect, more = parse(text, where, missing, text_columns, sep, decimal, kind == "tsv", usual)
        return cls(table, dataclasses.replace(dialect, encoding=encoding, prefix=prefix), text, (*notes, *more))


def read_table(
    path: str | Path,
    missing: Sequence[str] = (),
    text_columns: Collection[str | int] = (),
    sep: str | None = None,
    encoding: str | None = None,
    decimal: str | None = None,
) -> pd.DataFrame:
    """A table from a file: CSV and its relatives, Parquet, Feather or Arrow, Excel (the first sheet), JSON, JSON Lines,
    also packed as .gz, .bz2, .xz or in a .zip alone; the content counts more than the name.

    A column of a text file becomes numbers if all its cells are plain numbers or missing, and nothing is lost by it:
    "007", "+49301234567" and whole numbers that no 64 bits hold stay text, as does everything else, as it is written. A
    cell is missing if it is empty, NaN, nan or one of the texts `missing`, and among numbers also if it is one of
    NOT_A_NUMBER ("NA", "?", …), which elsewhere are categories. Formats with types keep them; an index becomes columns
    if it has names.

    Args:
        missing: further texts that mean a missing cell.
        text_columns: columns of a CSV that stay text whatever they hold.
        sep: the separator of cells; default: the one of , ; tab | that fits all rows.
        encoding: default UTF-8 or UTF-16, or a code page if no other gives the same bytes a sense.
        decimal: . or , in numbers; default: what the numbers say.

    Raises:
        ValueError: no such file, an unreadable one, a row with another number of fields than the header, or a guess
            that is not safe; names the option.
    """
    file = TableFile.read(path, missing, text_columns, sep, encoding, decimal)
    for note in file.notes:
        warnings.warn(note, stacklevel=2)
    return file.table


def check_output(path: str | Path, rows: int = 0, columns: int = 0) -> None:
    """Raise ValueError, in one line, if `write_table` cannot write a table of this size to a file of this name."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe
        return
    kind, packing = formats.by_name(path)
    if kind not in WRITABLE or (packing and kind in ("parquet", "arrow", "xlsx")):
        raise ValueError(f"{path}: the name says no format that can be written; end it with {formats.READABLE}")
    formats.require_library(kind, path)
    if kind == "xlsx" and (rows >= EXCEL_ROWS or columns > EXCEL_COLUMNS):
        raise ValueError(f"{path}: an Excel sheet holds at most {EXCEL_ROWS - 1:,} rows and {EXCEL_COLUMNS:,} columns")


def write_table(table: pd.DataFrame, path: str | Path, missing: str = "", dialect: Dialect | None = None) -> None:
    """Write a table in the format that the name says.

    Args:
        missing: the text of a missing cell in a text file.
        dialect: of a .csv; default commas, points and UTF-8. A .tsv has tabs.

    Raises:
        ValueError: no such format, or one that cannot hold a column.
    """
    path = Path(path)
    check_output(path, *table.shape)
    kind, packing = formats.by_name(path)
    data = _to_bytes(table, kind or "csv", path, missing, dialect or Dialect())
    write_bytes(path, formats.pack(data, packing, path.name))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; its old content stays until the new one is complete."""
    from ...storage import atomic_write

    if path.exists() and not path.is_file():
        path.write_bytes(data)
    else:
        atomic_write(path, data)


def _to_bytes(table: pd.DataFrame, kind: str, path: Path, missing: str, dialect: Dialect) -> bytes:
    buffer = io.BytesIO()
    if kind in ("csv", "tsv"):
        if (kind == "tsv") != (dialect.sep == "\t"):  # the training file was of the other kind
            dialect = Dialect(sep="\t" if kind == "tsv" else ",")
        return dialect.to_bytes(render(table, dialect, missing), str(path))
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _records(table, path)).encode()
    if kind == "json":
        return (json.dumps(_records(table, path), ensure_ascii=False, indent=1) + "\n").encode()
    try:
        if kind == "xlsx":
            _without_time_zones(table).to_excel(buffer, index=False, engine="openpyxl")
        elif kind == "arrow":
            table.rename(columns=str).to_feather(buffer)
        else:
            table.to_parquet(buffer, index=False)
    except Exception as error:  # the libraries raise whatever they stumble over
        for name in table:
            types = sorted({type(v).__name__ for v in table[name].dropna()})
            if len(types) > 1:
                raise ValueError(f"{path}: column {name!r} mixes {' and '.join(types)}, which {_format_name(kind)} "
                                 "cannot hold: write a .csv") from None  # fmt: skip
        raise ValueError(f"{path}: {_format_name(kind)} cannot hold the table ({error})") from None
    return buffer.getvalue()


def _format_name(kind: str) -> str:
    return {"xlsx": "Excel", "arrow": "Feather"}.get(kind, "Parquet")


def _without_time_zones(table: pd.DataFrame) -> pd.DataFrame:
    """Times with a zone as text, because Excel has no zones."""
    zoned = [name for name in table if isinstance(table[name].dtype, pd.DatetimeTZDtype)]
    return table.assign(**{name: table[name].map(str, na_action="ignore") for name in zoned})


def _records(table: pd.DataFrame, path: Path) -> list[dict[str, Any]]:
    """The rows as objects of JSON; None for a missing cell."""
    columns = {str(name): [_json_cell(cell, name, path) for cell in table[name].astype(object)] for name in table}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _json_cell(cell: Any, name: Any, path: Path) -> Any:
    if pd.isna(cell):
        return None
    cell = cell.item() if hasattr(cell, "item") else cell
    if isinstance(cell, float) and math.isinf(cell):
        raise ValueError(f"{path}: column {name!r} has infinite numbers, which JSON cannot hold: write a .csv")
    if isinstance(cell, str | int | float | bool):
        return cell
    return cell.isoformat() if hasattr(cell, "isoformat") else str(cell)
