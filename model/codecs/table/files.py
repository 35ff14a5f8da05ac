"""Tables in CSV and Parquet files: read with every text as it is written, written, and completed cell by cell."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from .schema import TEXT

MISSING = ("",)
NAN = {"NaN", "nan"}  # missing in every column
NOT_A_NUMBER = {"", "NA", "N/A", "n/a", "na", "NULL", "null", "None", "<NA>", "#N/A", "?", "-"}  # … in one of numbers
INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
ZERO_PADDED = re.compile(r"[+-]?0\d")


def read_table(
    path: str | Path, missing: Sequence[str] = MISSING, text_columns: Collection[str | int] = ()
) -> pd.DataFrame:
    """A table from a CSV (also .gz) or Parquet file.

    A column of a CSV becomes numbers if all its cells are plain numbers ("007" is text) or missing. A cell is missing
    if it is one of the texts `missing`, NaN or nan, and among numbers also if it is one of NOT_A_NUMBER ("NA", "?", …),
    which elsewhere are categories. Decimals of a Parquet file become floats.

    Args:
        text_columns: columns of a CSV that stay text whatever they hold.

    Raises:
        ValueError: no such file, an unreadable one, or a row with another number of fields than the header.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"table {str(path)!r} not found")
    if path.suffix in (".parquet", ".pq"):
        return _read_parquet(path)
    return parse_csv(read_text(path), str(path), missing, text_columns)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install anystate[table]") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None
    decimals = [name for name in table if isinstance(next(iter(table[name].dropna()), None), Decimal)]
    return table.assign(**{name: table[name].astype(float) for name in decimals}) if decimals else table


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, unpacked if its name ends in .gz."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable file ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None


def parse_csv(
    text: str, where: str, missing: Sequence[str] = MISSING, text_columns: Collection[str | int] = ()
) -> pd.DataFrame:
    """A table from the text of a CSV file, see `read_table`; error messages begin with `where`."""
    rows = _csv_rows(text, where)
    header, body = rows[0], rows[1:]
    for i, row in enumerate(body):
        if len(row) != len(header):
            raise ValueError(f"{where}: row {i + 1} has {len(row)} fields, the header {len(header)}")
    for mark, name in ((";", "';'"), ("\t", "tabs"), ("|", "'|'")):
        if len(header) == 1 and all(row[0].count(mark) == header[0].count(mark) > 0 for row in rows):
            raise ValueError(f"{where}: fields are separated by {name}: save it with commas")
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise ValueError(f"{where}: column name {min(repeated)!r} occurs more than once: rename one of them")
    columns = zip(*body, strict=True) if body else [[] for _ in header]
    return pd.DataFrame(
        {name: _to_series(list(cells), {*missing, *NAN}, name in text_columns)
         for name, cells in zip(header, columns, strict=True)}
    )  # fmt: skip


def _csv_rows(text: str, where: str) -> list[list[str]]:
    """The header and the rows of a CSV as texts, without blank lines."""
    limit = csv.field_size_limit(len(text) + 1)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"{where}: malformed CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{where} is empty: a header and rows are needed")
    return rows


def _to_series(cells: list[str], missing: set[str], is_text: bool) -> pd.Series:
    """The cells of a column: numbers if all that are not missing are numbers, else text with None for missing ones."""
    numbers = None if is_text else _to_numbers(cells, missing)
    if numbers is not None:
        return numbers
    return pd.Series([None if cell in missing else cell for cell in cells], dtype=TEXT)


def _to_numbers(cells: list[str], missing: set[str]) -> pd.Series | None:
    """The cells as int64, Int64 or float64, None if they are not numbers; blanks around a number are ignored."""
    if all(cell in missing for cell in cells):
        return pd.Series(np.full(len(cells), np.nan))
    stripped = [cell.strip() for cell in cells]
    missing = missing | NOT_A_NUMBER
    distinct = set(stripped) - missing
    if not distinct or any(ZERO_PADDED.match(cell) for cell in distinct):
        return None
    if all(INTEGER.fullmatch(cell) for cell in distinct):
        empty = np.array([cell in missing for cell in stripped], dtype=bool)
        values = pd.Series([0 if e else int(c) for c, e in zip(stripped, empty, strict=True)], dtype="int64")
        return values.astype("Int64").mask(empty) if empty.any() else values
    if all(NUMBER.fullmatch(cell) for cell in distinct):
        return pd.Series([np.nan if cell in missing else float(cell) for cell in stripped])
    return None


def write_table(table: pd.DataFrame, path: str | Path, missing: str = "") -> None:
    """Write a CSV (also .gz) or Parquet file, by the name's ending; `missing` is the text of a missing cell.

    Raises:
        ValueError: Parquet cannot hold a column.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix not in (".parquet", ".pq"):
        table.to_csv(path, index=False, na_rep=missing)
        return
    try:
        table.to_parquet(path, index=False)
    except ImportError:
        raise ValueError(f"{path}: writing Parquet needs pyarrow: pip install anystate[table]") from None
    except (ValueError, TypeError):
        for name in table:
            types = sorted({type(v).__name__ for v in table[name].dropna()})
            if len(types) > 1:
                raise ValueError(f"{path}: column {name!r} mixes {' and '.join(types)}, which Parquet cannot hold: "
                                 "write a .csv") from None  # fmt: skip
        raise


def fill_csv(text: str, table: pd.DataFrame, filled: pd.DataFrame) -> str:
    """The text of a CSV with its missing cells replaced by those of `filled`; every other byte stays.

    `table` is what `parse_csv` made of the text: a cell is missing where it is NaN there.
    """
    missing = table.isna().to_numpy()
    new_cells = [
        [_csv_field(v) if m else "" for v, m in zip(filled[name], table[name].isna(), strict=True)]
        for name in table.columns
    ]
    out, row = [], -1  # row −1 is the header
    for parts in _records(text):
        is_blank = not "".join(parts[:-1])
        if not is_blank and row >= 0:
            for column in np.flatnonzero(missing[row]):
                parts[2 * column] = new_cells[column][row]
        row += not is_blank
        out.append("".join(parts))
    return "".join(out)


def _csv_field(value: object) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow([value])
    return buffer.getvalue()


def _records(text: str) -> Iterator[list[str]]:
    """The records of a CSV as lists of field, separator, field, …, line end, which joined give the text again."""
    parts: list[str] = []
    for match in re.finditer(r'(?P<field>"(?:[^"]|"")*"|[^",\r\n]*)(?P<end>,|\r\n|\n|\r|\Z)', text):
        parts += [match["field"], match["end"]]
        if match["end"] != ",":
            yield parts
            parts = []
            if match.end() == len(text):
                return
