"""The packing of the jobs of one rank: samples are read, encoded and written, and unusable ones are counted."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ....model.codecs.characters import CharCodec
from ....model.codecs.subwords import TokenizerCodec
from ....model.storage import atomic_write
from ..packed.repair import max_bad_samples
from ..packed.shards import Shard, ShardWriter
from .progress import progress_bar
from .sources import Job, RawSample, RawSource
from .stores import LatentStore, Moments, PixelStore, encode_captions, fit

STATE = ".pack"  # folder of the plan and of the records of finished jobs
SKIPPED = "skipped.jsonl"
BATCH = 64  # samples encoded at a time

Store = PixelStore | LatentStore


class Packer:
    """Packs jobs of a source, one after the other."""

    def __init__(self, source: RawSource, out: Path, store: Store, codec: CharCodec | TokenizerCodec):
        self.source, self.out, self.store, self.codec = source, out, store, codec

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
            for batch, images in _decoded(self.source.read(job), self.store):
                self._pack_batch(batch, images, shards, skipped)
                progress.advance(task, len(batch))
        except BaseException:
            shards.discard()
            raise
        return {**shards.close(), "skipped": skipped.of_job}

    def _pack_batch(
        self, batch: list[RawSample], images: list[Future], shards: JobShards, skipped: SkipCounter
    ) -> None:
        captions = [[c.strip() for c in raw.captions if c and c.strip()] for raw in batch]
        encoded = encode_captions(self.codec, captions)
        good: list[tuple[RawSample, np.ndarray, np.ndarray, list[str]]] = []
        for raw, texts, tokens, image in zip(batch, captions, encoded, images, strict=True):
            try:
                if not texts:
                    raise ValueError("caption is missing or empty")
                if isinstance(tokens, ValueError):
                    raise tokens
                good.append((raw, image.result(), tokens.ids, texts))
            except ValueError as error:
                skipped.add(raw, str(error))
                continue
            shards.truncated += tokens.truncated
            shards.captions += len(texts)
        stored = self.store([pixels for _, pixels, _, _ in good], shards.moments) if good else ()
        for (raw, _, tokens, texts), image in zip(good, stored, strict=True):
            shards.add(raw, image, tokens, texts)
        skipped.seen += len(batch)


class JobShards:
    """The shards that a job writes, one per split, and their statistics."""

    def __init__(self, out: Path, job: Job):
        self.out, self.job = out, job
        self.writers: dict[str, ShardWriter] = {}
        self.moments, self.truncated, self.captions = Moments(), 0, 0

    def add(self, raw: RawSample, image: np.ndarray, tokens: np.ndarray, texts: list[str]) -> None:
        if raw.split not in self.writers:
            self.writers[raw.split] = ShardWriter(self.out, f"{raw.split}/{self.job.number:05d}.tar")
        labels = {"captions": texts, "source": raw.where, **raw.labels}
        self.writers[raw.split].add(f"{raw.number:09d}", image, tokens, labels)

    def discard(self) -> None:
        for writer in self.writers.values():
            writer.discard()

    def close(self) -> dict:
        """Finish the shards; returns their descriptions and statistics for the record of the job."""
        shards = {split: dataclasses.asdict(writer.close()) for split, writer in self.writers.items()}
        return {"shards": shards, "moments": self.moments.dump(), "cut": self.truncated, "captions": self.captions}


def _decoded(samples: Iterator[RawSample], store: Store) -> Iterator[tuple[list[RawSample], list[Future]]]:
    """Batches of samples with their images, which threads decode and crop while the previous batch is encoded."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    with ThreadPoolExecutor(threads) as pool:
        previous = None
        while batch := list(islice(samples, BATCH)):
            images = [pool.submit(_decode, raw, store) for raw in batch]
            if previous:
                yield previous
            previous = batch, images
        if previous:
            yield previous


def _decode(raw: RawSample, store: Store) -> np.ndarray:
    return fit(raw.pixels(store.channels), store.image_size)


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
