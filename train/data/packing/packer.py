"""The packing of the jobs of one rank: samples are read, encoded and written, and unusable ones are counted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ....model.codecs.base import Codec
from ....model.storage import atomic_write
from ..packed.manifest import PackedModality
from ..packed.repair import max_bad_samples
from ..packed.shards import Shard
from .job_shards import JobShards, Moments
from .progress import progress_bar
from .sources import Job, RawSample, RawSource, plain

STATE = ".pack"  # folder of the plan and of the records of finished jobs
SKIPPED = "skipped.jsonl"
BATCH = 64  # samples encoded at a time

Prepared = dict[str, list]  # {modality: its values as `Codec.store` takes them}


@dataclasses.dataclass(frozen=True)
class Store:
    """How a modality is stored. required: a sample that lacks it is left out."""

    codec: Codec
    about: PackedModality
    required: bool

    def arrays(self, values: list, seed: int) -> dict[str, np.ndarray]:
        """{part: (n, …)} of n prepared values.

        Raises:
            ValueError: a value cannot be stored.
        """
        specs, names = self.about.specs, self.about.names
        if not values:
            return {part: np.zeros((0, *spec.shape), spec.dtype) for part, spec in specs.items()}
        stored = self.codec.store(values, seed)
        for part, spec in specs.items():
            if reason := spec.problem(names[part], stored[part], 1):
                raise ValueError(reason)
        return stored

    def add_moments(self, stored: dict[str, np.ndarray], moments: dict[str, Moments]) -> None:
        """Add the numbers among stored values, as they are diffused."""
        if all(spec.states is not None for spec in self.about.specs.values()) or not len(next(iter(stored.values()))):
            return
        for part, x in self.codec.restore(stored).items():
            if x.is_floating_point():
                moments.setdefault(self.about.names[part], Moments()).add(x.numpy())


class Packer:
    """Packs jobs of a source, one after the other."""

    def __init__(self, source: RawSource, out: Path, stores: dict[str, Store]):
        self.source, self.out, self.stores = source, out, stores

    def run(self, jobs: list[Job], bad_share: float, console: Console, label: str, quiet: bool) -> None:
        """Pack the jobs that are not done yet, and show the progress unless `quiet`."""
        todo = [job for job in jobs if not is_done(self.out, job)]
        records = [read_record(self.out, job) for job in jobs if job not in todo]
        sizes_known = all(job.samples is not None for job in jobs)
        skipped = SkipCounter(self.out, bad_share, sum(j.samples for j in jobs) if sizes_known else None, records)
        with progress_bar(console, quiet) as progress:
            total = sum(job.samples for job in todo) if sizes_known else None
            task = progress.add_task(f"packing, {label}" if label else "packing", total=total, note="")
            for n, job in enumerate(todo):
                place = f"{job.name} ({n + 1} of {len(todo)})"
                progress.update(task, note=place)
                self.source.note = lambda text, place=place: progress.update(task, note=f"{place} {text}")
                self.source.prefetch(todo[n + 1 : n + 2])
                record = self._pack_job(job, skipped, progress, task)
                atomic_write(self.out / STATE / f"{job.name}.json", json.dumps(record))
                self.source.done(job)
                skipped.end_job()

    def _pack_job(self, job: Job, skipped: SkipCounter, progress: Progress, task: int) -> dict:
        """Read, encode and write one job; returns its record."""
        shards = JobShards(self.out, job)
        try:
            for batch, prepared in _in_batches(self.source.read(job), self._prepare):
                self._pack_batch(batch, prepared, shards, skipped)
                progress.advance(task, len(batch))
        except BaseException:
            shards.discard()
            raise
        return {**shards.close(), "skipped": skipped.of_job}

    def _prepare(self, raw: RawSample) -> Prepared:
        """The values of a sample, read and cropped.

        Raises:
            ValueError: it cannot be used.
        """
        if raw.fault is not None:
            raise ValueError(raw.fault)
        prepared = {}
        for m, store in self.stores.items():
            values = raw.versions(m)
            if not values and store.required:
                raise ValueError(f"{m}: missing")
            with _naming(m):
                prepared[m] = [store.codec.prepare(value) for value in values]
        if not any(prepared.values()):
            raise ValueError("it has none of the modalities")
        return prepared

    def _pack_batch(
        self, batch: list[RawSample], futures: list[Future], shards: JobShards, skipped: SkipCounter
    ) -> None:
        samples: list[tuple[RawSample, Prepared]] = []
        for raw, future in zip(batch, futures, strict=True):
            try:
                samples.append((raw, future.result()))
            except ValueError as error:
                skipped.add(raw, str(error))
        samples, stored = self._store(samples, skipped)
        for m, store in self.stores.items():
            store.add_moments(stored[m], shards.moments)
            values = [value for raw, _ in samples for value in raw.versions(m)]
            shards.count(m, len(values), store.codec.count_truncated(values))
        starts = Counter()
        for raw, prepared in samples:
            arrays = {}
            for m, store in self.stores.items():
                n, start = len(prepared[m]), starts[m]
                here = slice(start, start + n) if store.about.versions else start
                arrays |= {name: stored[m][part][here] for part, name in store.about.names.items()}
                starts[m] += n
            shards.add(raw, arrays, [m for m in self.stores if not prepared[m]], self._annotations(raw))
        skipped.seen += len(batch)

    def _store(
        self, samples: list[tuple[RawSample, Prepared]], skipped: SkipCounter
    ) -> tuple[list[tuple[RawSample, Prepared]], dict[str, dict[str, np.ndarray]]]:
        """The samples that can be stored, and {modality: {part: the values of all of them}}."""
        try:
            return samples, self._arrays(samples)
        except ValueError:
            good = []
        for sample in samples:
            try:
                self._arrays([sample])
                good.append(sample)
            except ValueError as error:
                skipped.add(sample[0], str(error))
        return good, self._arrays(good)

    def _arrays(self, samples: list[tuple[RawSample, Prepared]]) -> dict[str, dict[str, np.ndarray]]:
        seed, stored = samples[0][0].number if samples else 0, {}
        for m, store in self.stores.items():
            with _naming(m):
                stored[m] = store.arrays([value for _, prepared in samples for value in prepared[m]], seed)
        return stored

    def _annotations(self, raw: RawSample) -> dict:
        """The raw values that are texts or numbers."""
        fields = {store.about.raw: plain(raw.values.get(m)) for m, store in self.stores.items() if store.about.raw}
        return {field: value for field, value in fields.items() if value is not None}


@contextlib.contextmanager
def _naming(m: str) -> Iterator[None]:
    """Errors about a value name the modality."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{m}: {error}") from None


def _in_batches(
    samples: Iterator[RawSample], prepare: Callable[[RawSample], Prepared]
) -> Iterator[tuple[list[RawSample], list[Future]]]:
    """Batches of samples, which threads prepare while the previous batch is encoded."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    with ThreadPoolExecutor(threads) as pool:
        previous = None
        while batch := list(islice(samples, BATCH)):
            prepared = [pool.submit(prepare, raw) for raw in batch]
            if previous:
                yield previous
            previous = batch, prepared
        if previous:
            yield previous


class SkipCounter:
    """Counts and lists the samples that are left out; too many end the run with an error.

    Args:
        share: the largest accepted share of unusable samples.
        total: samples of this rank, or None if that is not known beforehand.
        records: of the jobs that are already done.
    """

    def __init__(self, out: Path, share: float, total: int | None, records: list[dict]):
        self.out, self.share, self.total = out, share, total
        self.bad = sum(len(record["skipped"]) for record in records)
        self.seen = self.bad + sum(s["samples"] for record in records for s in record["shards"].values())
        self.of_job: list[dict] = []

    def add(self, raw: RawSample, reason: str) -> None:
        """Count an unusable sample of the current job."""
        self.of_job.append({"sample": raw.where, "split": raw.split, "reason": reason})
        self.bad += 1
        if self.total is not None:
            self._check(self.total)

    def end_job(self) -> None:
        """Start a new list for the next job."""
        if self.total is None:
            self._check(self.seen)
        self.of_job = []

    def _check(self, samples: int) -> None:
        if self.bad <= max_bad_samples(self.share, samples):
            return
        with open(self.out / SKIPPED, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.of_job)
        last = self.of_job[-1]
        raise ValueError(
            f"{self.bad} of {samples} samples cannot be used, more than --bad-share {self.share:g} allows; they are "
            f"listed in {self.out / SKIPPED}; the last: {last['sample']}: {last['reason']}"
        )


def read_record(out: Path, job: Job) -> dict:
    """The record that a finished job wrote about its shards."""
    return json.loads((out / STATE / f"{job.name}.json").read_text())


def is_done(out: Path, job: Job) -> bool:
    """Whether a job has a record and its shards exist."""
    if not (out / STATE / f"{job.name}.json").is_file():
        return False
    shards = [Shard(**s) for s in read_record(out, job)["shards"].values()]
    return all(_size(out / s.file) == s.bytes and (out / s.index).is_file() for s in shards)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
