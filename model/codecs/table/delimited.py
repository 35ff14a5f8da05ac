"""Tables as text: cells of a CSV as numbers or text, and a CSV completed cell by cell."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection

import numpy as np
import pandas as pd

from .dialect import Dialect, guess_decimal, guess_separator, records
from .schema import TEXT

NAN = {"", "NaN", "nan"}  # missing in every column
NOT_A_NUMBER = {"NA", "N/A", "n/a", "na", "NULL", "null", "None", "<NA>", "#N/A", "?", "-"}  # … in one of numbers
INTEGER = re.compile(r"-?(0|[1-9]\d*)")
NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
ZERO_PADDED = re.compile(r"-?0\d")
EXACT = 2**53  # whole numbers up to here are exact as float64
INT64 = 2**63


def parse(
    text: str,
    where: str,
    missing: Collection[str] = (),
    text_columns: Collection[str | int] = (),
    sep: str | None = None,
    decimal: str | None = None,
    prefer_tab: bool = False,
    usual: Dialect | None = None,
) -> tuple[pd.DataFrame, Dialect, list[str]]:
    """A table from text with separators, see `files.read_table`, how it is written, and notes to the user; error
    messages begin with `where`."""
    spaces = False
    given = sep
    if sep is None:
        sep, spaces = guess_separator(text, where, prefer_tab, usual and usual.sep)
    rows = _rows(text, where, sep, spaces)
    header, body = rows[0], rows[1:]
    _check_rows(header, body, where, sep, given is not None)
    if given is None:
        _check_not_spaced(rows, where)
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        what = f"column name {repeated[0]!r} occurs more than once" if repeated[0] else "several columns have no name"
        raise ValueError(f"{where}: {what}: rename one of them")
    gaps = {*missing, *NAN}
    if decimal is None:
        decimal = guess_decimal(header, body, sep, where, gaps | NOT_A_NUMBER, usual and usual.decimal)
    columns, notes = {}, []
    for name, cells in zip(header, zip(*body, strict=True), strict=True):
        columns[name] = _to_series(list(cells), gaps, name in text_columns, decimal)
        if pd.api.types.is_numeric_dtype(columns[name]) and (words := {c.strip() for c in cells} & NOT_A_NUMBER - gaps):
            notes.append(f"column {name!r}: {', '.join(sorted(words))} among numbers is a missing cell")
    return pd.DataFrame(columns), Dialect(sep, decimal, spaces=spaces), notes


def _rows(text: str, where: str, sep: str, spaces: bool) -> list[list[str]]:
    """The header and the rows as texts, without blank lines."""
    limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=True, skipinitialspace=spaces)
        rows = [row for row in reader if row]
    except csv.Error as error:
        problem = "a quotation mark is never closed" if "unexpected end" in str(error) else str(error)
        raise ValueError(f"{where}: malformed CSV in line {reader.line_num}: {problem}") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{where} is empty: a header and rows are needed")
    if len(rows) == 1:
        raise ValueError(f"{where}: the table has no rows below its header {', '.join(rows[0])[:80]}")
    return rows


def _check_rows(header: list[str], body: list[list[str]], where: str, sep: str, is_given: bool) -> None:
    """Raise ValueError for the first row with another number of fields than the header."""
    for i, row in enumerate(body):
        if len(row) != len(header):
            problem = f"{where}: row {i + 1} has {len(row)} fields, the header {len(header)}"
            if len(header) > 1 or is_given:
                raise ValueError(f"{problem}: quote cells that hold the separator {sep!r}")
            raise ValueError(f"{problem}: quote cells that hold a comma, or give --sep")


def _check_not_spaced(rows: list[list[str]], where: str) -> None:
    """Raise ValueError for one column of as many words as its header, one of which is a number in every row."""
    if len(rows[0]) > 1 or " " not in rows[0][0].strip():
        return
    words = [row[0].split() for row in rows]
    if len(set(map(len, words))) == 1 and any(
        all(NUMBER.fullmatch(cell) for cell in column) for column in zip(*words[1:], strict=True)
    ):
        raise ValueError(
            f"{where}: its cells seem to be separated by spaces; give --sep ' ', or --sep , if they are not"
        )


def _to_series(cells: list[str], missing: set[str], is_text: bool, decimal: str) -> pd.Series:
    """The cells of a column: numbers if all that are not missing are numbers, else text with None for missing ones."""
    numbers = None if is_text else _to_numbers(cells, missing, decimal)
    if numbers is not None:
        return numbers
    return pd.Series([None if cell in missing else cell for cell in cells], dtype=TEXT)


def _to_numbers(cells: list[str], missing: set[str], decimal: str) -> pd.Series | None:
    """The cells as int64, Int64 or float64; None if they are not plain numbers, or would lose digits or signs.

    Blanks around a number are ignored.
    """
    if all(cell in missing for cell in cells):
        return pd.Series(np.full(len(cells), np.nan))
    stripped = [cell.strip() for cell in cells]
    missing = missing | NOT_A_NUMBER
    distinct = set(stripped) - missing
    if not distinct or any(ZERO_PADDED.match(cell) for cell in distinct):
        return None
    whole = {cell for cell in distinct if INTEGER.fullmatch(cell)}
    size = max((abs(int(cell)) if len(cell) < 25 else INT64 for cell in whole), default=0)
    if whole == distinct:
        if size >= INT64:
            return None
        empty = np.array([cell in missing for cell in stripped], dtype=bool)
        values = pd.Series([0 if e else int(c) for c, e in zip(stripped, empty, strict=True)], dtype="int64")
        return values.astype("Int64").mask(empty) if empty.any() else values
    if decimal == ",":
        if any("." in cell for cell in distinct):
            return None
        stripped = [cell if cell in missing else cell.replace(",", ".") for cell in stripped]
        distinct = {cell.replace(",", ".") for cell in distinct}
    if size <= EXACT and all(NUMBER.fullmatch(cell) for cell in distinct):
        return pd.Series([np.nan if cell in missing else float(cell) for cell in stripped])
    return None


def render(table: pd.DataFrame, dialect: Dialect, missing: str = "") -> str:
    """The table as text with separators; `missing` is the text of a missing cell."""
    return table.to_csv(index=False, na_rep=missing, sep=dialect.sep, decimal=dialect.decimal, lineterminator="\n")


def fill(text: str, table: pd.DataFrame, filled: pd.DataFrame, dialect: Dialect) -> str:
    """The text of a table with its missing cells replaced by those of `filled`; every other character stays.

    `table` is what `parse` made of the text: a cell is missing where it is NaN there. Columns that only `filled` has
    come last.
    """
    missing = table.isna().to_numpy()
    more = [
        [field for cells in (pd.Series([name]), filled[name]) for field in _fields(cells, cells.notna(), dialect)]
        for name in filled
        if name not in table
    ]
    new_cells = [_fields(filled[name], table[name].isna(), dialect) for name in table.columns]
    out, row = [], -1  # row −1 is the header
    for parts in records(text, dialect.sep):
        is_blank = not "".join(parts[:-1])
        if not is_blank and row >= 0:
            for column in np.flatnonzero(missing[row]):
                if new_cells[column][row] is None:
                    continue
                old = parts[2 * column]
                lead = " " if dialect.spaces and column and (not old or old.startswith(" ")) else ""
                parts[2 * column] = lead + new_cells[column][row]
        row += not is_blank
        if not is_blank:
            parts[-1:-1] = [part for cells in more for part in (dialect.sep, cells[row] or "")]
        out.append("".join(parts))
    return "".join(out)


def _fields(values: pd.Series, wanted: pd.Series, dialect: Dialect) -> list[str | None]:
    """The cells that are wanted and known, as fields of the file; None elsewhere."""
    is_number = pd.api.types.is_float_dtype(values.dtype)
    fields: list[str | None] = []
    for value, is_wanted in zip(values, wanted & values.notna(), strict=True):
        buffer = io.StringIO()
        if is_wanted:
            cell = str(value).replace(".", dialect.decimal) if is_number else value
            csv.writer(buffer, delimiter=dialect.sep, lineterminator="").writerow([cell])
        fields.append(buffer.getvalue() if is_wanted else None)
    return fields
