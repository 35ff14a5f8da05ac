"""Formats of table files, recognized by their content and their name: compression, Excel, Parquet, Arrow, JSON."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

TEXT_ENDINGS = {"csv": "csv", "tsv": "tsv", "tab": "tsv", "txt": "csv", "data": "csv"}
ENDINGS = {
    **TEXT_ENDINGS, "parquet": "parquet", "pq": "parquet", "feather": "arrow", "arrow": "arrow", "xlsx": "xlsx",
    "xlsm": "xlsx", "xls": "xls", "json": "json", "jsonl": "jsonl", "ndjson": "jsonl",
}  # fmt: skip
PACKINGS = {"gz": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ\0", "zip": b"PK\x03\x04"}
MAGIC = {
    b"PAR1": "parquet", b"ARROW1": "arrow", b"FEA1": "arrow", b"\xff\xff\xff\xff": "arrow",
    b"\xd0\xcf\x11\xe0": "xls",
}  # fmt: skip
REFUSED = {
    b"(\xb5/\xfd": "packed with Zstandard: unpack it first", b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first", b"SQLite format 3": "an SQLite database: export the table as CSV",
    b"\x89HDF": "an HDF5 file: save the table as Parquet or CSV", b"\x80\x04": "a pickle, which may run any code: save "
    "it as Parquet or CSV", b"\x80\x05": "a pickle, which may run any code: save it as Parquet or CSV",
    b"$FL2": "an SPSS file: save it as Parquet or CSV",
    b"RDX": "an R data file: write it with write.csv", b"X\n\0\0": "an R data file: write it with write.csv",
    b"Obj\x01": "an Avro file: save it as Parquet", b"ORC": "an ORC file: save it as Parquet",
    b"%PDF": "a PDF document, not a table", b"\x89PNG": "a picture, not a table",
    b"\xff\xd8\xff": "a picture, not a table",
}  # fmt: skip
NAMES = {
    "parquet": "a Parquet file", "arrow": "an Arrow file", "xlsx": "an Excel workbook", "xls": "an Excel 97 workbook",
    "json": "a JSON file", "jsonl": "a JSON file",
}  # fmt: skip
READABLE = ".csv, .tsv, .parquet, .feather, .xlsx, .json, .jsonl, also with .gz, .zip, .bz2 or .xz"


class UnreadableFormat(ValueError):
    """A file is not broken, but of a kind that is not read."""


def by_name(path: Path) -> tuple[str | None, str | None]:
    """(format, packing) that the ending of a name says, None where it says none; upper case is the same."""
    parts = path.name.lower().split(".")[1:]
    packing = parts.pop() if parts and parts[-1] in PACKINGS else None
    return ENDINGS.get(parts[-1] if parts else ""), packing


def load(path: Path) -> tuple[bytes, str, list[str]]:
    """(unpacked content, format, notes to the user) of a table file.

    Raises:
        ValueError: no such file, an unreadable one, or one of a format that cannot be read.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a table file in it")
    if not path.exists():
        raise ValueError(f"table {str(path)!r} not found")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: not a readable file ({error})") from None
    named, packing = by_name(path)
    inside = path
    while packed := _packing_of(data):
        data, member = _unpack(data, packed, path)
        inside = Path(member) if member else inside
        packing = None
    if packing is not None and data:
        raise ValueError(f"{path}: not a readable .{packing} file")
    named = by_name(inside)[0] or named
    found = _by_content(data, path)
    if found is None and named in ("parquet", "arrow", "xlsx", "xls"):
        raise ValueError(f"{path}: not a readable {NAMES[named].split(' ', 1)[1]} by its content")
    if found is None or {found, named} <= {"json", "jsonl"}:
        return data, named or found or "csv", []
    notes = [] if named in (found, None) else [f"{path} is {NAMES[found]} by its content, and read as one"]
    return data, found, notes


def _packing_of(data: bytes) -> str | None:
    found = next((packing for packing, magic in PACKINGS.items() if data.startswith(magic)), None)
    return None if found == "zip" and _is_excel(data) else found


def _is_excel(data: bytes) -> bool:
    return data.startswith(PACKINGS["zip"]) and b"xl/" in data and b"[Content_Types].xml" in data


def _by_content(data: bytes, path: Path) -> str | None:
    """The format of a content that is not text with separators; None for that.

    Raises:
        ValueError: a known format that is not read.
    """
    if _is_excel(data):
        return "xlsx"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path} is a web page, not a table: download the file itself, or save it as CSV")
    if start.startswith(b"<stata_dta>"):
        raise ValueError(f"{path} is a Stata file: save it as Parquet or CSV")
    if found := re.match(rb'(\[\s*)?\{\s*"', start):
        return "json" if found[1] else "jsonl"
    if start.isascii() and b"\0" not in start:  # a header that begins like one of the magic numbers
        return None
    for magic, what in REFUSED.items():
        if data.startswith(magic):
            raise ValueError(f"{path} is {what}")
    return next((name for magic, name in MAGIC.items() if data.startswith(magic)), None)


def _unpack(data: bytes, packing: str, path: Path) -> tuple[bytes, str | None]:
    """(content, name of the member of a zip archive)."""
    try:
        if packing == "zip":
            archive = zipfile.ZipFile(io.BytesIO(data))
            member = _only_member(archive, path)
            return archive.read(member), member
        return {"gz": gzip, "bz2": bz2, "xz": lzma}[packing].decompress(data), None
    except UnreadableFormat:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .{packing} file ({error})") from None


def _only_member(archive: zipfile.ZipFile, path: Path) -> str:
    """The name of the only file of an archive, apart from what systems add to it."""
    names = [
        name for name in archive.namelist()
        if not name.endswith("/") and not name.startswith("__MACOSX/") and not Path(name).name.startswith(".")
    ]  # fmt: skip
    if "mimetype" in names and b"opendocument" in archive.read("mimetype"):
        raise UnreadableFormat(f"{path} is an OpenDocument spreadsheet: save it as .xlsx or CSV")
    if len(names) != 1:
        what = f"{len(names)} files ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else "no file"
        raise UnreadableFormat(f"{path} holds {what}: an archive is read if it holds one table; unpack it")
    return names[0]


def pack(data: bytes, packing: str | None, name: str) -> bytes:
    """Content packed as a name's ending says; equal contents give equal bytes."""
    if packing == "gz":
        return gzip.compress(data, mtime=0)
    if packing == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo(name[: -len(".zip")]), data, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()
    return {"bz2": bz2.compress, "xz": lzma.compress}[packing](data) if packing else data


def require_library(kind: str, path: Path) -> None:
    """Raise ValueError, saying what to install, unless the library of a format is there."""
    import importlib.util

    library = {"parquet": "pyarrow", "arrow": "pyarrow", "xlsx": "openpyxl", "xls": "xlrd"}.get(kind)
    if library is not None and importlib.util.find_spec(library) is None:
        raise ValueError(f"{path}: {NAMES[kind].split(' ', 1)[1]}s need {library}: pip install anystate[table]")


def read_parquet(data: bytes, where: str) -> pd.DataFrame:
    import pyarrow

    try:
        return _index_as_columns(pd.read_parquet(io.BytesIO(data)))
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{where}: not a readable Parquet file ({_line(error)})") from None


def read_arrow(data: bytes, where: str) -> pd.DataFrame:
    """Arrow's stream and file formats (the latter is Feather), and Feather of version 1."""
    import pyarrow
    from pyarrow import feather

    try:
        if data.startswith(b"FEA1"):
            return _index_as_columns(feather.read_table(io.BytesIO(data)).to_pandas())
        is_file = data.startswith(b"ARROW1")
        reader = pyarrow.ipc.open_file(data) if is_file else pyarrow.ipc.open_stream(data)
        return _index_as_columns(reader.read_all().to_pandas())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{where}: not a readable Arrow file ({_line(error)})") from None


def _index_as_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the named levels of its index as its first columns; others only number the rows."""
    for level in reversed(range(table.index.nlevels)):
        name = table.index.names[level]
        if name is not None and name not in table.columns:
            table.insert(0, name, table.index.get_level_values(level))
    return table.reset_index(drop=True)


def read_excel(data: bytes, kind: str, where: str, missing: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The first sheet of a workbook, without empty rows and nameless empty columns, and notes to the user."""
    try:
        with pd.ExcelFile(io.BytesIO(data), engine="openpyxl" if kind == "xlsx" else "xlrd") as book:
            sheets = list(map(str, book.sheet_names))
            table = book.parse(book.sheet_names[0], dtype=object, keep_default_na=False, na_values=["", *missing])
    except Exception as error:  # the libraries raise whatever they stumble over
        raise ValueError(f"{where}: not a readable Excel workbook ({_line(error)})") from None
    nameless = [name for name in table if str(name).startswith("Unnamed: ") and table[name].isna().all()]
    table = table.drop(columns=nameless).dropna(how="all").reset_index(drop=True).infer_objects()
    if not len(table) or not len(table.columns):
        raise ValueError(f"{where}: the first sheet, {sheets[0]!r}, holds no rows below a header")
    more = f"{where}: the first of {len(sheets)} sheets, {sheets[0]!r}, is read"
    return table, [more] if len(sheets) > 1 else []


def parse_json(text: str, where: str, lines: bool) -> Any:
    """The content of a JSON text; of JSON Lines, also under the name .json, the list of its lines.

    Raises:
        ValueError: not JSON; names the line.
    """
    numbered = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    objects = len(numbered) > 1 and all(line.startswith("{") and line.endswith("}") for _, line in numbered)
    if not lines and not objects:
        return _json(text, where)
    records = []
    for n, line in numbered:
        records.append(_json(line, f"{where}, line {n}"))
        _require_object(records[-1], f"{where}, line {n}")
    return records


def _require_object(record: Any, where: str) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object {{field: value}}, got {str(record)[:80]}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def from_records(records: Any, where: str) -> pd.DataFrame:
    """A table of a list of objects {column: cell}; a column that an object lacks is missing there.

    Raises:
        ValueError: something else.
    """
    if not isinstance(records, list):
        raise ValueError(f"{where}: expected a list of objects {{field: value}}, got {str(records)[:80]}")
    for n, record in enumerate(records, 1):
        _require_object(record, f"{where}, record {n}")
    names = dict.fromkeys(name for record in records for name in record)
    return pd.DataFrame({name: _from_json([record.get(name) for record in records]) for name in names})


def _from_json(cells: list) -> pd.Series:
    """Whole numbers stay exact beside missing ones."""
    present = [cell for cell in cells if cell is not None]
    if len(present) < len(cells) and present and all(type(cell) is int and abs(cell) < 2**63 for cell in present):
        return pd.Series(pd.array(cells, dtype="Int64"))
    return pd.Series(cells)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
