"""What `anystate data pack` reads: pictures with captions from an .npz or a folder; see also `tables` and `links`.

A source cuts its samples into jobs, each of which becomes a shard per split, and reads one job at a time.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ....model.codecs.vae import read_picture
from ..pairs import extras, read_npz

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Raw:
    """A sample before encoding.

    Args:
        number: unique over the source; becomes the key.
        split: train or test.
        where: its origin, for messages and the log.
        picture: uint8 (H, W, C), or the path or bytes of a picture file, or None if it is missing.
        captions: none is a fault of the sample.
        labels: kept beside it as JSON.
    """

    number: int
    split: str
    where: str
    picture: np.ndarray | Path | bytes | None
    captions: list[str]
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)

    def pixels(self, channels: int) -> np.ndarray:
        """uint8 (H, W, channels).

        Raises:
            ValueError: missing, broken, or with another number of channels.
        """
        if self.picture is None:
            raise ValueError("picture is missing")
        if isinstance(self.picture, np.ndarray):
            pixels = self.picture[..., None] if self.picture.ndim == 2 else self.picture
            if pixels.ndim != 3 or pixels.shape[2] != channels:
                raise ValueError(f"picture has shape {self.picture.shape}, not (height, width, {channels})")
            return pixels
        source = io.BytesIO(self.picture) if isinstance(self.picture, bytes) else self.picture
        try:
            return read_picture(source, channels)
        except ValueError:
            raise ValueError("picture is broken") from None


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece of work: name is unique and stays the same from run to run; rows are what the source makes of it."""

    number: int
    name: str
    samples: int | None  # None: known only when it is read
    rows: Any = None


class Source:
    """Where samples come from.

    `note` is where a source tells what it is doing; the packer shows it.
    """

    name: str
    work: Path  # folder for what is needed only while packing, set by `prepare`
    note: Callable[[str], None] = staticmethod(lambda text: None)

    def jobs(self, shard_size: int, test_share: float, seed: int) -> list[Job]:
        raise NotImplementedError

    def prepare(self, work: Path, main: bool) -> None:
        """Called before anything is read, on the main rank first and alone."""
        self.work = work

    def read(self, job: Job) -> Iterator[Raw]:
        raise NotImplementedError

    def ahead(self, jobs: list[Job]) -> None:
        """These jobs come after the one that is read now; a source may begin to fetch what they need."""

    def done(self, job: Job) -> None:
        """A job is packed; what was kept for it may go."""

    def close(self) -> None:
        """Packing ends, well or not."""

    def captions(self) -> Iterator[str]:
        """Every caption, to build the vocabulary from."""
        raise NotImplementedError


class Rows(Source):
    """A source with numbered samples. They are shuffled once, so that every shard is a fair sample of the whole, unless
    the source can only be read in order."""

    shuffled = True

    def splits(self) -> np.ndarray | None:
        """(N,) words train and test, or None if the source does not say."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, row: int, split: str) -> Raw:
        raise NotImplementedError

    def jobs(self, shard_size: int, test_share: float, seed: int) -> list[Job]:
        n, split = len(self), self.splits()
        if split is None:
            split = random_split(n, test_share, seed)
        elif strange := sorted(set(split.tolist()) - {"train", "test"}):
            raise ValueError(f"{self.name}: split {strange[0]!r}; it must be train or test")
        order = np.random.default_rng(seed).permutation(n) if self.shuffled else np.arange(n)
        jobs = []
        for name in ("train", "test"):
            rows = order[split[order] == name]
            for k, part in enumerate(np.array_split(rows, max(1, -(-len(rows) // shard_size)))):
                if len(part):
                    jobs.append(Job(k, f"{name}/{k:05d}", len(part), (name, part)))
        return jobs

    def read(self, job: Job) -> Iterator[Raw]:
        split, rows = job.rows
        for row in rows.tolist():
            yield self.row(row, split)


def random_split(n: int, test_share: float, seed: int) -> np.ndarray:
    """(N,) words: a share of the rows, drawn by the seed, is test."""
    split = np.full(n, "train")
    held = round(n * test_share)
    split[np.random.default_rng([seed, 1]).permutation(n)[:held]] = "test"
    return split


class Npz(Rows):
    """Arrays images (N, H, W[, C]) of whole numbers up to 255, captions (N,) or (N, M), optionally split (N,) with the
    words train and test; further arrays (N,) are kept as labels."""

    def __init__(self, path: Path):
        self.name = str(path)
        self.arrays = read_npz(path)
        if missing := [name for name in ("images", "captions") if name not in self.arrays]:
            raise ValueError(f"{path}: no array {missing[0]!r}; it has {', '.join(self.arrays)}")
        images, captions = self.arrays["images"], self.arrays["captions"]
        if len(images) != len(captions):
            raise ValueError(f"{path}: {len(images)} images but {len(captions)} captions")
        if images.dtype != np.uint8:
            whole = images.size and np.array_equal(images, np.clip(images, 0, 255).astype(np.uint8))
            if not whole:
                raise ValueError(f"{path}: images of {images.dtype} must hold whole numbers from 0 to 255")
            self.arrays["images"] = images.astype(np.uint8)
        self.labels = extras(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays["images"])

    def splits(self) -> np.ndarray | None:
        return self.arrays.get("split")

    def row(self, row: int, split: str) -> Raw:
        labels = {name: values[row].item() for name, values in self.labels.items()}
        where = f"{Path(self.name).name}:{row}"
        return Raw(row, split, where, self.arrays["images"][row], self._texts(row), labels)

    def captions(self) -> Iterator[str]:
        for row in range(len(self)):
            yield from self._texts(row)

    def _texts(self, row: int) -> list[str]:
        return [str(c) for c in np.atleast_1d(self.arrays["captions"][row])]


class Folder(Rows):
    """Picture files, also in folders below, with captions in one of

    - `NAME.txt` beside each picture, one caption per line;
    - `captions.json`: {file: caption or list}, or a list of {"file": …, "caption" or "captions": …, "split": …};
    - one .csv with a column file (or image, filename) and a column caption (or text); one row per caption; split too.

    Folders named train and test at the top are taken for the split.
    """

    def __init__(self, path: Path):
        self.name, self.folder = str(path), path
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
        self.files = [str(p.relative_to(path)) for p in files]
        if not files:
            raise ValueError(f"{path} holds no pictures ({', '.join(PICTURES)})")
        tables = sorted(path.glob("*.csv"))
        self.rows: dict[str, dict] = {}
        if (path / "captions.json").is_file():
            self._read_json(path / "captions.json")
        elif tables:
            if len(tables) > 1:
                raise ValueError(f"{path} holds several .csv files ({', '.join(t.name for t in tables)}); leave one")
            self._read_csv(tables[0])
        else:
            self._read_sidecars()
        if not any(row["captions"] for row in self.rows.values()):
            raise ValueError(f"{path}: no captions; give NAME.txt beside each picture, captions.json or one .csv")
        lost = [file for file in self.rows if file not in set(self.files)]
        self.files += lost  # a caption without its picture: read fails, is counted and named

    def __len__(self) -> int:
        return len(self.files)

    def splits(self) -> np.ndarray | None:
        told = [self.rows.get(f, {}).get("split") or _top(f) for f in self.files]
        if not any(told):
            return None
        if not all(told):
            raise ValueError(f"{self.name}: {self.files[told.index(None)]} has no split, others have one")
        return np.array(told)

    def row(self, row: int, split: str) -> Raw:
        file = self.files[row]
        return Raw(row, split, file, self.folder / file, self.rows.get(file, {}).get("captions", []))

    def captions(self) -> Iterator[str]:
        for row in self.rows.values():
            yield from row["captions"]

    def _add(self, file: str, captions: list[str], split: str | None, where: str) -> None:
        if not isinstance(file, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise ValueError(f"{where}: expected a file name and captions as text, got {file!r}: {captions!r}")
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{where}: {file!r} leads out of the folder")
        row = self.rows.setdefault(str(Path(file)), {"captions": [], "split": split})
        row["captions"] += captions

    def _read_json(self, path: Path) -> None:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if isinstance(raw, dict):
            raw = [{"file": file, "captions": captions} for file, captions in raw.items()]
        for entry in raw:
            if not isinstance(entry, dict) or "file" not in entry:
                raise ValueError(f"{path}: expected entries with file and caption, got {entry!r}")
            captions = entry.get("captions", entry.get("caption", []))
            captions = [captions] if isinstance(captions, str) else captions or []
            self._add(entry["file"], captions, entry.get("split"), str(path))

    def _read_csv(self, path: Path) -> None:
        with open(path, newline="", encoding="utf-8") as stream:
            table = csv.DictReader(stream)
            names = table.fieldnames or []
            file = next((n for n in names if n in ("file", "image", "filename", "file_name")), None)
            text = next((n for n in names if n in ("caption", "text")), None)
            if file is None or text is None:
                raise ValueError(f"{path}: needs columns file and caption, it has: {', '.join(names) or 'none'}")
            for row in table:
                self._add(row[file], [row[text] or ""], row.get("split"), str(path))

    def _read_sidecars(self) -> None:
        for file in self.files:
            beside = (self.folder / file).with_suffix(".txt")
            if beside.is_file():
                lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
                self._add(file, [line for line in lines if line.strip()], None, str(beside))


def _top(file: str) -> str | None:
    top = Path(file).parts[0]
    return top if top in ("train", "test") else None


def texts_of(value: Any) -> list[str]:
    """Captions of one sample, however they are kept: one text, or several."""
    if value is None:
        return []
    return [str(c) for c in ([value] if isinstance(value, str) else value) if c is not None]
