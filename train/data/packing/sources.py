"""Sources of `anystate data pack`: images with captions from an .npz or a folder.

Tables are in `caption_tables`, lists of links in `links`. A source divides its samples into jobs, each of which becomes
one shard per split, and reads one job at a time.
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

from ....model.codecs.vae import read_image
from ..pairs import check_pairs, extra_arrays, read_npz

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class RawSample:
    """A sample before encoding.

    Args:
        number: unique within the source; becomes the key.
        split: train or test.
        where: its location in the source, for messages and the log.
        image: uint8 (H, W, C), or the path or bytes of an image file, or None if it is missing.
        captions: a sample without captions is left out.
        labels: stored with the sample as JSON.
    """

    number: int
    split: str
    where: str
    image: np.ndarray | Path | bytes | None
    captions: list[str]
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)

    def pixels(self, channels: int) -> np.ndarray:
        """The image as uint8 (H, W, channels).

        Raises:
            ValueError: missing, broken, or with another number of channels.
        """
        if self.image is None:
            raise ValueError("image is missing")
        if isinstance(self.image, np.ndarray):
            pixels = self.image[..., None] if self.image.ndim == 2 else self.image
            if pixels.ndim != 3 or pixels.shape[2] != channels:
                raise ValueError(f"image has shape {self.image.shape}, not (height, width, {channels})")
            return pixels
        source = io.BytesIO(self.image) if isinstance(self.image, bytes) else self.image
        try:
            return read_image(source, channels)
        except ValueError:
            raise ValueError("image is broken") from None


@dataclasses.dataclass(frozen=True)
class Job:
    """The samples of one shard per split.

    Args:
        number: of the shard.
        name: unique, and the same in every run.
        samples: how many, or None if that is known only after reading them.
        rows: whatever the source needs to find the samples.
    """

    number: int
    name: str
    samples: int | None
    rows: Any = None


class RawSource:
    """A source of raw samples. `note` shows a short status text to the user; the packer sets it."""

    name: str
    work: Path  # folder for files needed only while packing, set by `prepare`
    note: Callable[[str], None] = staticmethod(lambda text: None)

    def jobs(self, shard_size: int, test_share: float, seed: int) -> list[Job]:
        """The jobs of the source; `test_share` applies where the source has no split of its own."""
        raise NotImplementedError

    def prepare(self, work: Path, main: bool) -> None:
        """Called once before anything is read: first on the main rank alone, then on the others."""
        self.work = work

    def read(self, job: Job) -> Iterator[RawSample]:
        """The samples of a job."""
        raise NotImplementedError

    def prefetch(self, jobs: list[Job]) -> None:
        """Announces the jobs to be read next; a source may start to download what they need."""

    def done(self, job: Job) -> None:
        """Called after a job is packed; its temporary files can be deleted."""

    def close(self) -> None:
        """Called when packing ends, also after an error."""

    def captions(self) -> Iterator[str]:
        """Every caption, for building the vocabulary."""
        raise NotImplementedError


class IndexedSource(RawSource):
    """A source of numbered samples.

    They are shuffled once, so that every shard is a random subset, unless the source can only be read in order.
    """

    shuffled = True

    def splits(self) -> np.ndarray | None:
        """(N,) strings train and test, or None if the source has no split."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, row: int, split: str) -> RawSample:
        """Sample number `row`."""
        raise NotImplementedError

    def jobs(self, shard_size: int, test_share: float, seed: int) -> list[Job]:
        n, split = len(self), self.splits()
        if split is None:
            split = random_split(n, test_share, seed)
        unknown = sorted(set(split.tolist()) - {"train", "test"})
        if unknown:
            raise ValueError(f"{self.name}: split {unknown[0]!r}; it must be train or test")
        order = np.random.default_rng(seed).permutation(n) if self.shuffled else np.arange(n)
        jobs = []
        for name in ("train", "test"):
            rows = order[split[order] == name]
            for k, part in enumerate(np.array_split(rows, max(1, -(-len(rows) // shard_size)))):
                if len(part):
                    jobs.append(Job(k, f"{name}/{k:05d}", len(part), (name, part)))
        return jobs

    def read(self, job: Job) -> Iterator[RawSample]:
        split, rows = job.rows
        for row in rows.tolist():
            yield self.sample(row, split)


def random_split(n: int, test_share: float, seed: int) -> np.ndarray:
    """(N,) strings: test for a random `test_share` of the rows, train for the others."""
    split = np.full(n, "train")
    n_test = round(n * test_share)
    split[np.random.default_rng([seed, 1]).permutation(n)[:n_test]] = "test"
    return split


class NpzSource(IndexedSource):
    """An .npz with arrays `images` (N, H, W[, C]) of integers from 0 to 255 and `captions` (N,) or (N, M).

    An optional array `split` (N,) holds the strings train and test; further arrays (N,) are kept as labels.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self.arrays = read_npz(path)
        check_pairs(self.arrays, path)
        self.arrays["images"] = _as_uint8(self.arrays["images"], path)
        self.labels = extra_arrays(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays["images"])

    def splits(self) -> np.ndarray | None:
        return self.arrays.get("split")

    def sample(self, row: int, split: str) -> RawSample:
        labels = {name: values[row].item() for name, values in self.labels.items()}
        where = f"{Path(self.name).name}:{row}"
        return RawSample(row, split, where, self.arrays["images"][row], self._texts(row), labels)

    def captions(self) -> Iterator[str]:
        for row in range(len(self)):
            yield from self._texts(row)

    def _texts(self, row: int) -> list[str]:
        return [str(c) for c in np.atleast_1d(self.arrays["captions"][row])]


def _as_uint8(images: np.ndarray, path: Path) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    converted = np.clip(images, 0, 255).astype(np.uint8)
    if not images.size or not np.array_equal(images, converted):
        raise ValueError(f"{path}: images of {images.dtype} must hold whole numbers from 0 to 255")
    return converted


class FolderSource(IndexedSource):
    """A folder of image files, at any depth, with captions in one of

    - `NAME.txt` beside each image, one caption per line;
    - `captions.json`: {file: caption or list}, or a list of {"file": …, "caption" or "captions": …, "split": …};
    - one .csv with a column file (or image, filename), a column caption (or text), one row per caption, and optionally
      a column split.

    Folders named train and test at the top level define the split.
    """

    def __init__(self, path: Path):
        self.name, self.folder = str(path), path
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        self.files = [str(p.relative_to(path)) for p in files]
        if not files:
            raise ValueError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        self.rows: dict[str, dict] = {}  # {file: {"captions": …, "split": …}}
        self._read_captions()
        if not any(row["captions"] for row in self.rows.values()):
            raise ValueError(f"{path}: no captions; give NAME.txt beside each image, captions.json or one .csv")
        without_image = [file for file in self.rows if file not in set(self.files)]
        self.files += without_image  # reading them fails, so that they are counted and named

    def __len__(self) -> int:
        return len(self.files)

    def splits(self) -> np.ndarray | None:
        splits = [self.rows.get(file, {}).get("split") or _top_folder(file) for file in self.files]
        if not any(splits):
            return None
        if not all(splits):
            raise ValueError(f"{self.name}: {self.files[splits.index(None)]} has no split, others have one")
        return np.array(splits)

    def sample(self, row: int, split: str) -> RawSample:
        file = self.files[row]
        return RawSample(row, split, file, self.folder / file, self.rows.get(file, {}).get("captions", []))

    def captions(self) -> Iterator[str]:
        for row in self.rows.values():
            yield from row["captions"]

    def _read_captions(self) -> None:
        tables = sorted(self.folder.glob("*.csv"))
        if (self.folder / "captions.json").is_file():
            self._read_json(self.folder / "captions.json")
        elif len(tables) > 1:
            names = ", ".join(table.name for table in tables)
            raise ValueError(f"{self.folder} holds several .csv files ({names}); leave one")
        elif tables:
            self._read_csv(tables[0])
        else:
            self._read_sidecars()

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
            sidecar = (self.folder / file).with_suffix(".txt")
            if sidecar.is_file():
                lines = sidecar.read_text(encoding="utf-8", errors="replace").splitlines()
                self._add(file, [line for line in lines if line.strip()], None, str(sidecar))


def _top_folder(file: str) -> str | None:
    """The top-level folder of a relative path if it is train or test."""
    top = Path(file).parts[0]
    return top if top in ("train", "test") else None


def texts_of(value: str | list | None) -> list[str]:
    """The captions of one sample from a field that holds one string or several."""
    if value is None:
        return []
    captions = [value] if isinstance(value, str) else value
    return [str(caption) for caption in captions if caption is not None]
