"""Sources of `anystate data pack`: what it reads raw samples from.

Tables of captions are in `caption_tables`, lists of links in `links`. A source divides its samples into jobs, each of
which becomes one shard per split, and reads one job at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....model.build import Codecs
from ..dataset import Opened
from ..examples import fit_codecs

IMAGE, TEXT = "image", "text"  # names of the modalities of images with captions
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class RawSample:
    """A sample before encoding.

    Args:
        number: unique within the source; becomes the key.
        split: train or test.
        where: its location in the source, for messages and the log.
        values: {modality: its raw value, a list of versions, or None}.
        labels: stored with the sample as JSON.
        fault: why the sample cannot be read.
    """

    number: int
    split: str
    where: str
    values: Mapping[str, Any]
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)
    fault: str | None = None

    def versions(self, m: str) -> list:
        """The raw values of a modality, none if it is absent."""
        value = self.values.get(m)
        return value if isinstance(value, list) else [] if value is None else [value]


def image_text(image: np.ndarray | Path | bytes | None, captions: list[str]) -> dict[str, Any]:
    """The values of an image, an array (H, W, C) or a file, with its captions."""
    return {IMAGE: image, TEXT: [caption.strip() for caption in captions if caption and caption.strip()]}


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
        """Every caption, for building the vocabulary of images with captions."""
        raise NotImplementedError

    def fit(self, codecs: Codecs, seed: int) -> None:
        """Fit the codecs that are not fitted yet on the training part."""
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


class DatasetSource(IndexedSource):
    """A data set of any modalities: one, or a training and a held-out part."""

    def __init__(self, name: str, opened: Opened):
        self.name, self.parts = name, opened if isinstance(opened, tuple) else (opened,)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def splits(self) -> np.ndarray | None:
        return np.repeat(["train", "test"], list(map(len, self.parts))) if len(self.parts) == 2 else None

    def sample(self, row: int, split: str) -> RawSample:
        part, i = (self.parts[0], row) if row < len(self.parts[0]) else (self.parts[1], row - len(self.parts[0]))
        try:
            values = part[i]
        except (ValueError, OSError) as error:
            return RawSample(row, split, f"{self.name}:{row}", {}, fault=str(error))
        labels = {name: plain(column[i]) for name, column in getattr(part, "labels", {}).items()}
        return RawSample(row, split, self._where(row, values), values, labels)

    def fit(self, codecs: Codecs, seed: int) -> None:
        fit_codecs(self.parts[0], codecs, seed, self.name)

    def _where(self, row: int, values: Mapping[str, Any]) -> str:
        file = next((value for value in values.values() if isinstance(value, Path)), None)
        if file is None:
            return f"{Path(self.name).name}:{row}"
        return str(file.relative_to(self.name) if file.is_relative_to(self.name) else file)


class CaptionedImages(DatasetSource):
    """A data set of images with captions."""

    def sample(self, row: int, split: str) -> RawSample:
        raw = super().sample(row, split)
        return dataclasses.replace(raw, values=image_text(raw.values.get(IMAGE), raw.versions(TEXT)))

    def captions(self) -> Iterator[str]:
        for row in range(len(self)):
            yield from self.sample(row, "").values[TEXT]


def plain(value: Any) -> Any:
    """A text, a number, or a list of them as JSON holds it; None for anything else."""
    if isinstance(value, list):
        values = [plain(item) for item in value]
        return None if None in values else values
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str | int | float) else None


def texts_of(value: str | list | None) -> list[str]:
    """The captions of one sample from a field that holds one string or several."""
    if value is None:
        return []
    captions = [value] if isinstance(value, str) else value
    return [str(caption) for caption in captions if caption is not None]
