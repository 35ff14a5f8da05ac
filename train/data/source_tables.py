"""Data sets in tables: CSV, Parquet, Arrow, Excel, JSON and JSON Lines, one file or one of each split.

A cell that names an existing file, relative to the table, stands for the content of the file. Several rows of one file,
such as an image with five captions, are one example with versions, unless a modality takes whole rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...configs.config import Data
from ...model.codecs.base import is_column
from .dataset import InMemory, Opened, by_split, is_table, split_named
from .fields import Modalities, as_values, find_fields, is_missing, pick

if TYPE_CHECKING:
    import pandas as pd

PLAIN = (".csv", ".csv.gz", ".csv.zip", ".csv.bz2", ".csv.xz", ".tsv", ".tsv.gz", ".jsonl", ".ndjson")
BINARY = (".parquet", ".pq", ".arrow", ".feather", ".xlsx")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as in the ImageFolder of Hugging Face
CAPTIONS = "captions.json"
FILE_COLUMNS = ("file_name", "filename", "file", "path")


def is_table_file(path: Path, suffixes: Sequence[str] = (*PLAIN, *BINARY, ".json")) -> bool:
    """Whether a file is a table, by the ending of its name."""
    return path.name.lower().endswith(tuple(suffixes)) and path.is_file()


def tables_in(folder: Path) -> list[Path]:
    """The tables of a folder: metadata.jsonl or .csv, captions.json, Parquet or Arrow files at any depth, else CSV.

    Raises:
        ValueError: several CSV or JSON Lines files that are not named after splits.
    """
    files = sorted(path for path in folder.rglob("*") if is_table_file(path))
    if metadata := [path for path in files if path.name in METADATA]:
        return metadata
    if folder / CAPTIONS in files:
        return [folder / CAPTIONS]
    if binary := [path for path in files if is_table_file(path, BINARY)]:
        return binary
    plain = [path for path in files if is_table_file(path, PLAIN)]
    named = [path for path in plain if _split_of_table(path, folder)]
    plain = named or [path for path in plain if path.parent == folder]
    if len(plain) > 1 and not named:
        names = ", ".join(path.name for path in plain)
        raise ValueError(f"{folder} holds several tables ({names}): leave one, or name them train and test")
    return plain


def open_tables(files: Sequence[Path], root: Path, data: Data, modalities: Modalities) -> Opened:
    """The data set in tables with the same columns.

    A column `split` determines the split; else names of files and folders below `root` do, if they say train and test.

    Raises:
        ValueError: unreadable files, different columns, a missing one, or a cell that a modality cannot read.
    """
    import pandas as pd

    where = files[0] if len(files) == 1 else root
    parts, found = _read_all(files, data, modalities, where)
    rows = pd.concat(parts, ignore_index=True)
    tables = [file for file, part in zip(files, parts, strict=True) for _ in range(len(part))]
    key, repeatable = None, set()
    for m, name in found.items():
        endings = modalities[m].file_suffixes
        cells = [_as_path(cell, file.parent, endings) for cell, file in zip(rows[name], tables, strict=True)]
        if any(isinstance(cell, Path) for cell in cells):  # then the others name files that are not there
            cells = [_as_path(cell, file.parent, endings, True) for cell, file in zip(cells, tables, strict=True)]
            _require_inside(cells, root)
            rows[name], key = pd.Series(cells, dtype=object), key or name
            repeatable |= {name} if str(name).lower() in (*FILE_COLUMNS, *modalities[m].synonyms) else set()
    if "split" in rows and "split" not in found.values():
        splits = rows.pop("split").tolist()
    else:
        splits = _splits_of(tables, rows[key] if key else tables, root)
    values, free = pick(dict(rows.items()), modalities, data, found, where)
    if key in repeatable and not any(map(is_table, values.values())):
        rows, splits = _merge(rows, key, splits, where)
        values, free = pick(dict(rows.items()), modalities, data, found, where)
    values = {m: as_values(column, modalities[m], f"{where}, {m}") for m, column in values.items()}
    labels = {str(name): rows[name].to_numpy() for name in free if is_column(rows[name])}
    return by_split(InMemory(values, labels), splits, where)


def _read_all(
    files: Sequence[Path], data: Data, modalities: Modalities, where: Path
) -> tuple[list[pd.DataFrame], dict[str, str]]:
    """The rows of every file, and {modality: its column}; columns of modalities stay as they are written in a CSV."""
    from pandas.api.types import is_numeric_dtype

    reading = _reading(modalities)
    parts = [_read_rows(file, reading) for file in files]
    for file, part in zip(files, parts, strict=True):
        if set(part) != set(parts[0]):
            raise ValueError(f"{file} has the columns {', '.join(map(str, part))}; "
                             f"{files[0]} has {', '.join(map(str, parts[0]))}")  # fmt: skip
    found = find_fields(parts[0], modalities, data, where)
    for m, modality in modalities.items():
        free = [name for name in parts[0] if str(name).lower() in FILE_COLUMNS and name not in found.values()]
        if m not in found and free and _are_files(parts[0][free[0]], modality.file_suffixes):
            found[m] = free[0]
    numeric = {name: {is_numeric_dtype(part[name]) for part in parts} for name in parts[0]}
    wrong = {name for name, kinds in numeric.items() if len(kinds) > 1 or (True in kinds and name in found.values())}
    if wrong and not any(is_table_file(file, (*BINARY, ".json", ".jsonl")) for file in files):
        parts = [_read_rows(file, reading, wrong) for file in files]
    return parts, found


def _reading(modalities: Modalities) -> dict[str, Any]:
    """How the modalities want text files to be read, together."""
    settings = [modality.csv_settings() for modality in modalities.values()]
    missing = sorted({text for own in settings for text in own.pop("missing")})
    as_text = {name for own in settings for name in own.pop("text_columns")}
    return {"missing": missing, "text_columns": as_text} | {k: v for own in settings for k, v in own.items()}


def _read_rows(file: Path, reading: dict[str, Any], as_text: Collection[str] = ()) -> pd.DataFrame:
    """The rows of a table; a .json file may also be {file: caption or captions}.

    Raises:
        ValueError: an unreadable file; names it and the line.
    """
    from ...model.codecs.table import formats
    from ...model.codecs.table.files import read_table

    content = None
    if is_table_file(file, (".json",)):
        content = formats.parse_json(file.read_bytes().decode("utf-8-sig", "replace"), str(file), lines=False)
    if isinstance(content, dict):
        captions = [{"file": name, "captions": captions} for name, captions in content.items()]
        rows = formats.from_records(captions, str(file))
    else:
        rows = read_table(file, **{**reading, "text_columns": {*reading["text_columns"], *as_text}})
    if not len(rows):
        raise ValueError(f"{file}: the table has no rows")
    return rows.rename(columns=lambda name: re.sub("(?<=.)_file_name$", "", name) if isinstance(name, str) else name)


def _are_files(cells: Any, suffixes: Sequence[str]) -> bool:
    """Whether the first cell that is not missing has one of the endings."""
    first = next((cell for cell in cells if not is_missing(cell)), "")
    return str(first).lower().endswith(tuple(suffixes))


def _as_path(cell: Any, folder: Path, suffixes: Sequence[str], missing: bool = False) -> Any:
    """The file that a cell names, or the cell itself. missing: also a file that is not there."""
    is_name = isinstance(cell, str) and cell.lower().endswith(tuple(suffixes))
    return folder / cell if is_name and (missing or (folder / cell).is_file()) else cell


def _require_inside(cells: Sequence[Any], root: Path) -> None:
    """Raise ValueError for a file outside the folder: who made the table does not choose what else is read."""
    here = os.path.abspath(root)
    for cell in cells:
        if isinstance(cell, Path) and not Path(os.path.abspath(cell)).is_relative_to(here):
            raise ValueError(f"{root}: refused, {str(cell)!r} leads out of the folder")


def _split_of_table(file: Path, root: Path) -> str:
    """The split that the folders of a table, or the first part of its name, say."""
    place = file.relative_to(root)
    return split_named([*place.parts[:-1], re.split(r"[-_.]", place.name)[0]])


def _splits_of(tables: Sequence[Path], paths: Any, root: Path) -> list[str]:
    """The split of every row by its table, or else by the folder of its file; none where all rows have the same."""
    splits = []
    for table, path in zip(tables, paths, strict=True):
        parts = path.relative_to(root).parts if isinstance(path, Path) and path.is_relative_to(root) else ()
        splits.append(_split_of_table(table, root) or split_named(parts[:-1]))
    return splits if len(set(splits)) > 1 else [""] * len(splits)


def _merge(rows: pd.DataFrame, key: str, splits: Sequence[Any], where: Path) -> tuple[pd.DataFrame, list[Any]]:
    """One row for each file in the column `key`; what differs between its rows becomes a list."""
    import pandas as pd

    groups: dict[Any, list[int]] = {}
    for i, cell in enumerate(rows[key]):
        groups.setdefault(cell if isinstance(cell, Path) else i, []).append(i)
    if len(groups) == len(rows):
        return rows, list(splits)
    for file, group in groups.items():
        if len({splits[i] for i in group}) > 1:
            raise ValueError(f"{where}: {file} has rows in several splits")
    own = list(groups.values())
    columns = {name: [_versions([cells[i] for i in group]) for group in own] for name, cells in rows.items()}
    return pd.DataFrame(columns), [splits[group[0]] for group in own]


def _versions(cells: Sequence[Any]) -> Any:
    """The distinct cells, as a list if there are several."""
    every = [part for cell in cells for part in (cell if isinstance(cell, list) else [cell]) if not is_missing(part)]
    distinct = list({part if isinstance(part, str | int | float | Path) else id(part): part for part in every}.values())
    return distinct if len(distinct) > 1 else distinct[0] if distinct else None
