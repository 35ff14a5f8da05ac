"""Pictures and captions in tables: Parquet and Arrow files, data sets of the Hugging Face hub, lists of captions."""

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

from .sources import Raw, Rows, texts_of

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "sentence")
KEY_COLUMNS = ("__key__", "key", "file", "image", "filename", "file_name", "id")
HELD_OUT = ("test", "validation", "val")


class Table(Rows):
    """Rows with a picture (bytes, or a struct with bytes, as the `datasets` library stores them) and captions.

    Args:
        path: an Arrow or Parquet file, a folder of them (its files or folders named test, validation or val are held
            out), a folder that `datasets` saved, or a hub id.
        image, caption: names of the columns; default the first usual one.
    """

    def __init__(self, path: Path | str, image: str | None = None, caption: str | None = None):
        self.name = str(path)
        self.parts = _parts(path)
        self.shuffled = all(part.any_order for _, part in self.parts)
        self.starts = np.cumsum([0, *(len(part) for _, part in self.parts)]).tolist()
        names = self.parts[0][1].columns
        self.image = _column(names, image, IMAGE_COLUMNS, self.name, "--image-column")
        self.caption = _column(names, caption, CAPTION_COLUMNS, self.name, "--caption-column")

    def __len__(self) -> int:
        return self.starts[-1]

    def splits(self) -> np.ndarray | None:
        words = ["test" if split in HELD_OUT else "train" for split, _ in self.parts]
        if len(set(words)) == 1:
            return None
        return np.concatenate([np.full(len(p), w) for w, (_, p) in zip(words, self.parts, strict=True)])

    def row(self, row: int, split: str) -> Raw:
        k = bisect.bisect_right(self.starts, row) - 1
        part = self.parts[k][1]
        values = part.row(row - self.starts[k])
        image = values.pop(self.image)
        captions = texts_of(values.pop(self.caption))
        labels = {name: value for name, value in values.items() if isinstance(value, (str, int, float, bool))}
        return Raw(row, split, f"{part.name}:{row - self.starts[k]}", _picture(image), captions, labels)

    def captions(self) -> Iterator[str]:
        for _, part in self.parts:
            for value in part.column(self.caption):
                yield from texts_of(value)


class ArrowPart:
    """An Arrow file (stream or random access), mapped into memory: read in any order."""

    any_order = True

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

    any_order = False

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
    """One split of a data set of the `datasets` library; pictures stay undecoded."""

    any_order = True

    def __init__(self, dataset, name: str):
        import datasets

        pictures = [c for c, f in dataset.features.items() if isinstance(f, datasets.Image)]
        for column in pictures:
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset, self.name, self.columns = dataset, name, dataset.column_names

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, i: int) -> dict[str, Any]:
        return dict(self.dataset[i])

    def column(self, name: str) -> Iterator[Any]:
        yield from (row[name] for row in self.dataset.select_columns([name]))


def _parts(path: Path | str) -> list[tuple[str, Any]]:
    """(split, part) of everything at a path."""
    path = Path(path)
    if path.is_file():
        return [("train", _file_part(path))]
    if not path.is_dir():
        return _from_hub(str(path))
    files = sorted(p for p in path.rglob("*") if p.suffix in (".arrow", ".parquet"))
    parts = [(_split_of(file.relative_to(path)), _file_part(file)) for file in files]
    if not parts:
        raise ValueError(f"{path} holds no .arrow or .parquet files")
    return sorted(parts, key=lambda part: part[0] in HELD_OUT)


def _file_part(path: Path) -> ArrowPart | ParquetPart:
    return ArrowPart(path) if path.suffix == ".arrow" else ParquetPart(path)


def _split_of(path: Path) -> str:
    """The split a relative path tells by a folder's name or the first word of its file name."""
    words = [*path.parts[:-1], re.split(r"[-_.]", path.name)[0]]
    return next((w for w in words if w in HELD_OUT), "train")


def _from_hub(name: str) -> list[tuple[str, HubPart]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name!r} is no file or folder here; to read it from the Hugging Face hub: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub and the library raise kinds of their own
        raise ValueError(f"{name!r} cannot be had from the hub: {' '.join(str(error).split())[:200]}") from None
    return [(split, HubPart(part, f"{name}:{split}")) for split, part in loaded.items()]


def _pyarrow():
    try:
        import pyarrow
    except ImportError:
        raise ValueError("Parquet and Arrow files need pyarrow: pip install anystate[pairs]") from None
    return pyarrow


def _column(names: list[str], asked: str | None, usual: tuple[str, ...], where: str, option: str) -> str:
    found = asked if asked in names else next((c for c in usual if c in names), None) if asked is None else None
    if found is None:
        raise ValueError(f"{where}: no column {asked or ' or '.join(usual)}; it has {', '.join(names)}; see {option}")
    return found


def _picture(value: Any) -> bytes | Path | None:
    if isinstance(value, dict):
        if value.get("bytes"):
            return bytes(value["bytes"])
        value = value.get("path")
    return Path(value) if isinstance(value, str) and value else bytes(value) if isinstance(value, bytes) else None


class CaptionIndex:
    """Captions by key, in an SQLite file: millions of them need no memory, and all ranks read the same file.

    A key is a file's name without folder and ending.
    """

    def __init__(self, path: Path):
        self.db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)

    @classmethod
    def build(cls, source: str, path: Path) -> CaptionIndex:
        """Read a .csv, .tsv, .json, .jsonl, Parquet or Arrow file or folder, or a hub id, into `path` once."""
        if not path.is_file():
            temporary = path.with_suffix(".partial")
            temporary.unlink(missing_ok=True)
            db = sqlite3.connect(temporary)
            db.execute("create table captions (key text, caption text)")
            db.executemany("insert into captions values (?, ?)", _keyed(source))
            db.execute("create index by_key on captions (key)")
            db.commit()
            db.close()
            temporary.replace(path)
        return cls(path)

    def __getitem__(self, key: str) -> list[str]:
        return [c for (c,) in self.db.execute("select caption from captions where key = ? order by rowid", (key,))]

    def __iter__(self) -> Iterator[str]:
        return (c for (c,) in self.db.execute("select caption from captions order by rowid"))


def _keyed(source: str) -> Iterator[tuple[str, str]]:
    """(key, caption) of a list of captions."""
    path = Path(source)
    if path.suffix in (".csv", ".tsv"):
        with open(path, newline="", encoding="utf-8") as stream:
            table = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            names = list(table.fieldnames or [])
            key, text = (
                _column(names, None, KEY_COLUMNS, source, "key"),
                _column(names, None, CAPTION_COLUMNS, source, "caption"),
            )
            for row in table:
                yield Path(row[key]).stem, row[text] or ""
        return
    if path.suffix in (".json", ".jsonl"):
        yield from _keyed_json(path)
        return
    for _, part in _parts(source):
        key = _column(part.columns, None, KEY_COLUMNS, source, "key")
        text = _column(part.columns, None, CAPTION_COLUMNS, source, "caption")
        for name, value in zip(part.column(key), part.column(text), strict=True):
            for caption in texts_of(value):
                yield Path(str(name)).stem, caption


def _keyed_json(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = path.read_text(encoding="utf-8")
        raw = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from None
    for entry in raw.items() if isinstance(raw, dict) else raw:
        if isinstance(entry, dict):
            key = next((entry[c] for c in KEY_COLUMNS if c in entry), None)
            value = next((entry[c] for c in CAPTION_COLUMNS if c in entry), None)
        else:
            key, value = entry if isinstance(entry, tuple) else (None, None)
        if key is None:
            raise ValueError(f"{path}: expected entries with a key and a caption, got {str(entry)[:80]!r}")
        for caption in texts_of(value):
            yield Path(str(key)).stem, caption
