"""The shards that a job of packing writes, with statistics of what is in them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..packed.shards import ShardWriter
from .sources import Job, RawSample


@dataclasses.dataclass
class Moments:
    """Running mean and standard deviation of each channel or feature of what is diffused; NaN is left out."""

    count: Any = 0.0
    total: Any = 0.0
    square: Any = 0.0

    def add(self, x: np.ndarray) -> None:
        """Add N values (N, C, …)."""
        x, known = x.astype(np.float64), np.isfinite(x)
        rest = (0, *range(2, x.ndim))
        self.count = self.count + known.sum(rest)
        self.total = self.total + np.where(known, x, 0.0).sum(rest)
        self.square = self.square + np.where(known, x**2, 0.0).sum(rest)

    def merge(self, other: dict[str, list[float]]) -> None:
        """Add the sums of another instance, as `dump` returns them."""
        for name, values in other.items():
            setattr(self, name, getattr(self, name) + np.array(values))

    def dump(self) -> dict[str, list[float]]:
        """The sums as JSON values."""
        return {name: np.asarray(values).tolist() for name, values in vars(self).items()}

    def summary(self) -> dict[str, list[float]]:
        """Mean and standard deviation, rounded to six digits."""
        count = np.maximum(self.count, 1)
        mean = self.total / count
        std = np.sqrt(np.maximum(self.square / count - mean**2, 0.0))
        return {"mean": mean.round(6).tolist(), "std": std.round(6).tolist()}


class JobShards:
    """The shards of a job, one per split.

    Attributes:
        moments: {name of a part: of its numbers}.
        counts: {modality: its values, and how many of them were truncated}.
    """

    def __init__(self, out: Path, job: Job):
        self.out, self.job = out, job
        self.writers: dict[str, ShardWriter] = {}
        self.moments: dict[str, Moments] = {}
        self.counts: dict[str, Counter[str]] = {}
        self.absent: dict[str, Counter[str]] = {}

    def add(self, raw: RawSample, arrays: dict[str, np.ndarray], absent: list[str], annotations: dict) -> None:
        """Append a sample; `absent` names the modalities that it lacks."""
        if raw.split not in self.writers:
            self.writers[raw.split] = ShardWriter(self.out, f"{raw.split}/{self.job.number:05d}.tar")
            self.absent[raw.split] = Counter()
        self.absent[raw.split].update(absent)
        labels = {name: value for name, value in raw.labels.items() if name not in annotations}
        self.writers[raw.split].add(f"{raw.number:09d}", arrays, {**annotations, "source": raw.where, **labels})

    def count(self, m: str, values: int, truncated: int) -> None:
        """Count values of a modality."""
        self.counts.setdefault(m, Counter()).update(values=values, truncated=truncated)

    def discard(self) -> None:
        for writer in self.writers.values():
            writer.discard()

    def close(self) -> dict:
        """Finish the shards; returns their descriptions and statistics for the record of the job."""
        return {
            "shards": {split: dataclasses.asdict(writer.close()) for split, writer in self.writers.items()},
            "moments": {name: moments.dump() for name, moments in self.moments.items()},
            "counts": self.counts,
            "absent": self.absent,
        }
