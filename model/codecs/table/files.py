"""Tables in files: read so that every spelling survives, written as they were, cells filled in place."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from .columns import TEXT, Schema

MISSING = ("",)
INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf", re.IGNORECASE)


def read_table(path: str | Path, missing: Sequence[str] = MISSING) -> pd.DataFrame:
    """A CSV (also .gz) or Parquet file.

    Columns of a CSV become numbers only where every filled cell is a plain number ("007" stays text); `missing` are
    the texts that mean an empty cell. Decimals of a Parquet file become floats.

    Raises:
        ValueError: no such file, unreadable, a row with another number of fields: says which.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"table {str(path)!r} not found")
    if path.suffix in (".parquet", ".pq"):
        try:
            table = pd.read_parquet(path)
        except ImportError:
            raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install anystate[table]") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error})") from None
        exact = [name for name in table if isinstance(next(iter(table[name].dropna()), None), Decimal)]
        return table.assign(**{name: table[name].astype(float) for name in exact}) if exact else table
    return parse_csv(read_text(path), str(path), missing)


def read_text(path: Path) -> str:
    import gzip

    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable file ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None


def parse_csv(text: str, where: str, missing: Sequence[str] = MISSING, words: Sequence[str] = ()) -> pd.DataFrame:
    """A DataFrame from the text of a CSV file, see `read_table`; columns `words` stay text whatever they hold."""
    limit = csv.field_size_limit(len(text) + 1)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"{where}: malformed CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{where} is empty: a header and rows are needed")
    header, body = rows[0], rows[1:]
    for i, row in enumerate(body):
        if len(row) != len(header):
            raise ValueError(f"{where}: row {i + 1} has {len(row)} fields, the header {len(header)}")
    for mark, said in ((";", "';'"), ("\t", "tabs"), ("|", "'|'")):
        if len(header) == 1 and all(row[0].count(mark) == header[0].count(mark) > 0 for row in rows):
            raise ValueError(f"{where}: fields are separated by {said}: save it with commas")
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise ValueError(f"{where}: column name {min(twice)!r} occurs more than once: rename one of them")
    columns = zip(*body, strict=True) if body else [[] for _ in header]
    return pd.DataFrame(
        {name: _typed(list(cells), set(missing), name in words) for name, cells in zip(header, columns, strict=True)}
    )


def _typed(cells: list[str], missing: set[str], word: bool) -> pd.Series:
    """Numbers where all filled cells are numbers (and not `word`), else text with None for empty cells."""
    if word:
        return pd.Series([None if cell in missing else cell for cell in cells], dtype=TEXT)
    distinct = set(cells) - missing
    empty = np.array([cell in missing for cell in cells], dtype=bool)
    if distinct and all(INTEGER.fullmatch(cell) for cell in distinct):
        values = pd.Series([0 if e else int(c) for c, e in zip(cells, empty, strict=True)], dtype="int64")
        return values.astype("Int64").mask(empty) if empty.any() else values
    padded = any(re.match(r"[+-]?0\d", cell) for cell in distinct)
    if distinct and not padded and all(NUMBER.fullmatch(cell) for cell in distinct):
        return pd.Series([np.nan if e else float(c) for c, e in zip(cells, empty, strict=True)])
    return pd.Series([None if e else c for c, e in zip(cells, empty, strict=True)], dtype=TEXT)


def write_table(table: pd.DataFrame, path: str | Path, missing: str = "") -> None:
    """Write a CSV (also .gz) or Parquet file, by the name's ending."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".parquet", ".pq"):
        try:
            table.to_parquet(path, index=False)
        except ImportError:
            raise ValueError(f"{path}: writing Parquet needs pyarrow: pip install anystate[table]") from None
        except (ValueError, TypeError):
            for name in table:
                if len(kinds := {type(v).__name__ for v in table[name].dropna()}) > 1:
                    found = " and ".join(sorted(kinds))
                    raise ValueError(f"{path}: column {name!r} mixes {found}, which Parquet cannot hold: "
                                     "write a .csv") from None  # fmt: skip
            raise
    else:
        table.to_csv(path, index=False, na_rep=missing)


def fill_csv(text: str, table: pd.DataFrame, filled: pd.DataFrame, missing: Sequence[str] = MISSING) -> str:
    """The text of a CSV with its empty cells replaced by those of `filled`; every other byte stays.

    `table` is what `parse_csv` made of the text: a cell is empty where it is NaN there.
    """
    blank = table.isna().to_numpy()
    written = [[_cell(v) if e else "" for v, e in zip(filled[c], table[c].isna(), strict=True)] for c in table.columns]
    out, row = [], -1
    for parts in _records(text):
        if not (blank_line := not "".join(parts[:-1])) and row >= 0:
            for column in np.flatnonzero(blank[row]):
                parts[2 * column] = written[column][row]
        row += not blank_line
        out.append("".join(parts))
    return "".join(out)


def _cell(value) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow([value])
    return buffer.getvalue()


def _records(text: str):
    """The records of a CSV as lists of field, separator, field, …, line end, which joined give the text again."""
    parts: list[str] = []
    for match in re.finditer(r'(?P<field>"(?:[^"]|"")*"|[^",\r\n]*)(?P<end>,|\r\n|\n|\r|\Z)', text):
        parts += [match["field"], match["end"]]
        if match["end"] != ",":
            yield parts
            parts = []
            if match.end() == len(text):
                return


def describe(schema: Schema) -> list[tuple[str, str]]:
    """(name, what it is) of every column, for the screen."""
    rows = []
    for c in schema.columns:
        notes = [c.kind]
        notes += [f"{c.decimals} decimals"] * (c.kind == "continuous" and c.decimals is not None)
        notes += [f"to the {c.step}"] * (c.step is not None)
        notes += ["with empty cells"] * c.missing
        rows.append((str(c.name), ", ".join(notes)))
    return rows
