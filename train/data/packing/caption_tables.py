"""Images and captions in tables: Parquet and Arrow files, data sets of the Hugging Face hub, lists of captions."""

from __future__ import annotations

import bisect
import csv
import functools
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .sources import IndexedSource, RawSample, image_text, texts_of

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "sentence")
KEY_COLUMNS = ("__key__", "key", "file", "image", "filename", "file_name", "id")
HELD_OUT = ("test", "validation", "val")


class TableSource(IndexedSource):
    """Rows with an image (bytes, or a struct with bytes, as the `datasets` library stores them) and captions.

    Args:
        path: an Arrow or Parquet file, a folder of them (files or folders in it named test, validation or val are held
            out), a folder that `datasets` saved, or a hub id.
        image, caption: names of the columns; default the first usual one.
    """

    def __init__(self, path: Path | str, image: str | None = None, caption: str | None = None):
        self.name = str(path)
        self.parts = _parts(path)
        self.shuffled = all(part.random_access for _, part in self.parts)
        self.starts = np.cumsum([0, *(len(part) for _, part in self.parts)]).tolist()
        names = self.parts[0][1].columns
        self.image = _column(names, image, IMAGE_COLUMNS, self.name, "--image-column")
        self.caption = _column(names, caption, CAPTION_COLUMNS, self.name, "--caption-column")

    def __len__(self) -> int:
        return self.starts[-1]

    def splits(self) -> np.ndarray | None:
        splits = ["test" if split in HELD_OUT else "train" for split, _ in self.parts]
        if len(set(splits)) == 1:
            return None
        lengths = [len(part) for _, part in self.parts]
        return np.concatenate([np.full(n, split) for n, split in zip(lengths, splits, strict=True)])

    def sample(self, row: int, split: str) -> RawSample:
        k = bisect.bisect_right(self.starts, row) - 1
        part, i = self.parts[k][1], row - self.starts[k]
        values = part.row(i)
        image = _image(values.pop(self.image))
        captions = texts_of(values.pop(self.caption))
        labels = {name: value for name, value in values.items() if isinstance(value, (str, int, float, bool))}
        return RawSample(row, split, f"{part.name}:{i}", image_text(image, captions), labels)

    def captions(self) -> Iterator[str]:
        for _, part in self.parts:
            for value in part.column(self.caption):
                yield from texts_of(value)


class ArrowPart:
    """A memory-mapped Arrow file, stream or random-access format, read in any order."""

    random_access = True

    def __init__(self, path: Path):
        pyarrow = _pyarrow()
        self.name = path.name
        try:
            source = pyarrow.memory_map(str(path))
            try:
                self.table = pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                self.table = pyarrow.ipc.open_file(source).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Arrow file ({error})") from None
        self.columns = self.table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, i: int) -> dict[str, Any]:
        return self.table.slice(i, 1).to_pylist()[0]

    def column(self, name: str) -> Iterator[Any]:
        for chunk in self.table.column(name).iterchunks():
            yield from chunk.to_pylist()


class ParquetPart:
    """A Parquet file, read in order one row group at a time."""

    random_access = False

    def __init__(self, path: Path):
        pyarrow = _pyarrow()
        from pyarrow import parquet

        self.name = path.name
        try:
            self.file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error})") from None
        self.columns = self.file.schema_arrow.names
        groups = self.file.metadata.num_row_groups
        self.starts = np.cumsum([0, *(self.file.metadata.row_group(g).num_rows for g in range(groups))]).tolist()
        self.group = functools.lru_cache(maxsize=1)(self.file.read_row_group)

    def __len__(self) -> int:
        return self.starts[-1]

    def row(self, i: int) -> dict[str, Any]:
        g = bisect.bisect_right(self.starts, i) - 1
        return self.group(g).slice(i - self.starts[g], 1).to_pylist()[0]

    def column(self, name: str) -> Iterator[Any]:
        for batch in self.file.iter_batches(columns=[name]):
            yield from batch.column(0).to_pylist()


class HubPart:
    """One split of a data set of the `datasets` library; images stay encoded."""

    random_access = True

    def __init__(self, dataset: Any, name: str):
        import datasets

        image_columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        for column in image_columns:
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset, self.name, self.columns = dataset, name, dataset.column_names

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, i: int) -> dict[str, Any]:
        return dict(self.dataset[i])

    def column(self, name: str) -> Iterator[Any]:
        yield from (row[name] for row in self.dataset.select_columns([name]))


def _parts(path: Path | str) -> list[tuple[str, Any]]:
    """(split, part) of each file at a path, or of each split of a hub data set."""
    path = Path(path)
    if path.is_file():
        return [("train", _file_part(path))]
    if not path.is_dir():
        return _from_hub(str(path))
    files = sorted(p for p in path.rglob("*") if p.suffix in (".arrow", ".parquet"))
    parts = [(_split_of(file.relative_to(path)), _file_part(file)) for file in files]
    if not parts:
        raise ValueError(f"{path} holds no .arrow or .parquet files")
    return sorted(parts, key=lambda part: part[0] in HELD_OUT)  # held-out files last


def _file_part(path: Path) -> ArrowPart | ParquetPart:
    return ArrowPart(path) if path.suffix == ".arrow" else ParquetPart(path)


def _split_of(path: Path) -> str:
    """The split named by a folder of a relative path or by the first part of its file name, else train."""
    names = [*path.parts[:-1], re.split(r"[-_.]", path.name)[0]]
    return next((name for name in names if name in HELD_OUT), "train")


def _from_hub(name: str) -> list[tuple[str, HubPart]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name!r} is not a file or folder; to read it from the Hugging Face hub: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub and the library raise their own exception types
        raise ValueError(f"{name!r} cannot be loaded from the hub: {' '.join(str(error).split())[:200]}") from None
    return [(split, HubPart(part, f"{name}:{split}")) for split, part in loaded.items()]


def _pyarrow() -> Any:
    """The module pyarrow; ValueError if it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError("Parquet and Arrow files need pyarrow: pip install anystate[pairs]") from None
    return pyarrow


def _column(names: list[str], requested: str | None, usual: tuple[str, ...], where: str, option: str) -> str:
    """The column `requested`, or the first of the usual names; `option` lets the user choose one."""
    candidates = usual if requested is None else (requested,)
    for name in candidates:
        if name in names:
            return name
    raise ValueError(f"{where}: no column {' or '.join(candidates)}; it has {', '.join(names)}; see {option}")


def _image(value: Any) -> bytes | Path | None:
    """The bytes or the path of an image from a cell of a table."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    return Path(value) if isinstance(value, str) and value else None


class CaptionIndex:
    """Captions by key in an SQLite file, which needs little memory and is shared by all ranks.

    A key is a file name without folder and suffix.
    """

    def __init__(self, path: Path):
        self.db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)

    @classmethod
    def build(cls, source: str, path: Path) -> CaptionIndex:
        """The index at `path`, built if it does not exist.

        source: a .csv, .tsv, .json, .jsonl, Parquet or Arrow file, a folder of the latter two, or a hub id.
        """
        if not path.is_file():
            temporary = path.with_suffix(".partial")
            temporary.unlink(missing_ok=True)
            db = sqlite3.connect(temporary)
            db.execute("create table captions (key text, caption text)")
            db.executemany("insert into captions values (?, ?)", _key_captions(source))
            db.execute("create index by_key on captions (key)")
            db.commit()
            db.close()
            temporary.replace(path)
        return cls(path)

    def __getitem__(self, key: str) -> list[str]:
        query = "select caption from captions where key = ? order by rowid"
        return [caption for (caption,) in self.db.execute(query, (key,))]

    def __iter__(self) -> Iterator[str]:
        for (caption,) in self.db.execute("select caption from captions order by rowid"):
            yield caption


def _key_captions(source: str) -> Iterator[tuple[str, str]]:
    """(key, caption) of every entry of a caption table."""
    path = Path(source)
    if path.suffix in (".csv", ".tsv"):
        yield from _key_captions_csv(path)
    elif path.suffix in (".json", ".jsonl"):
        yield from _key_captions_json(path)
    else:
        for _, part in _parts(source):
            key = _column(part.columns, None, KEY_COLUMNS, source, "key")
            text = _column(part.columns, None, CAPTION_COLUMNS, source, "caption")
            for name, value in zip(part.column(key), part.column(text), strict=True):
                for caption in texts_of(value):
                    yield Path(str(name)).stem, caption


def _key_captions_csv(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        table = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = list(table.fieldnames or [])
        key = _column(names, None, KEY_COLUMNS, str(path), "key")
        text = _column(names, None, CAPTION_COLUMNS, str(path), "caption")
        for row in table:
            yield Path(row[key]).stem, row[text] or ""


def _key_captions_json(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = path.read_text(encoding="utf-8")
        raw = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from None
    for entry in raw.items() if isinstance(raw, dict) else raw:
        key, value = None, None
        if isinstance(entry, dict):
            key = next((entry[c] for c in KEY_COLUMNS if c in entry), None)
            value = next((entry[c] for c in CAPTION_COLUMNS if c in entry), None)
        elif isinstance(entry, tuple):
            key, value = entry
        if key is None:
            raise ValueError(f"{path}: expected entries with a key and a caption, got {str(entry)[:80]!r}")
        for caption in texts_of(value):
            yield Path(str(key)).stem, caption
