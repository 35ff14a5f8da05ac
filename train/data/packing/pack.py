"""`anystate data pack`: from raw pairs to WebDataset shards, their DALI indices and one `dataset.yaml`.

The source is cut into jobs; a job writes its shards, then its record under `DATASET/.pack`. Under torchrun job j
belongs to rank j mod W. Run again, jobs with a sound record are left alone, so only what is missing is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ....model.storage import atomic_write
from ..packed.repair import allowed
from ..packed.shards import Manifest, Shard, ShardWriter
from .sources import Job, Raw, Source
from .stores import LatentStore, Moments, PixelStore, encode_captions, fit, text_codec, text_plan

STATE = ".pack"
SKIPPED = "skipped.jsonl"
CHUNK = 64  # samples encoded at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to make of a source; a data set keeps those it was begun with.

    Args:
        size: side of the pictures in pixels; None is the first picture's.
        channels: of the pictures.
        vae: autoencoder for latents, None for pixels; scale: factor on them.
        text: characters, bpe or clip; states: vocabulary of bpe; tokenizer: of clip; alphabet: None is taken from the
            captions.
        length: tokens per caption; None fits the longest.
        shard_size: samples per shard, where the source leaves the choice.
        test_share: held out where the source has no split.
    """

    size: int | None = None
    channels: int = 3
    vae: str | None = None
    scale: float = 0.18215
    text: str = "characters"
    states: int = 1024
    tokenizer: str = "openai/clip-vit-large-patch14"
    alphabet: str | None = None
    length: int | None = None
    shard_size: int = 4096
    test_share: float = 0.0
    seed: int = 0


def pack(
    source: Source, out: Path, settings: Settings, bad_share: float = 0.01, console: Console | None = None, device=None
) -> Manifest:
    """Pack a source into the folder `out`; returns what was written.

    Raises:
        ValueError: the folder holds something else, settings differ from those it was begun with, or more than
            `bad_share` of the samples are unusable (see DATASET/skipped.jsonl).
    """
    console = console or Console(quiet=True)
    with _ranks() as (rank, world, barrier), contextlib.closing(source):
        jobs = source.jobs(settings.shard_size, settings.test_share, settings.seed)
        if rank == 0:
            _begin(source, jobs, out, settings)
        barrier()
        if rank > 0:
            source.prepare(out / STATE, main=False)
        plan = json.loads((out / STATE / "plan.json").read_text())
        store = _store(plan["image"], device)
        codec = text_codec(plan["text"], out)
        mine = jobs[rank::world]
        todo = [job for job in mine if not _done(out, job)]
        known = None if any(job.samples is None for job in jobs) else sum(job.samples for job in mine)
        tally = Tally(out, bad_share, known, [_record(out, job) for job in mine if job not in todo])
        with _progress(console, rank) as progress:
            total = sum(job.samples for job in todo) if known is not None else None
            task = progress.add_task(
                f"packing, rank {rank} of {world}" if world > 1 else "packing", total=total, note=""
            )
            for n, job in enumerate(todo):
                place = f"{job.name} ({n + 1} of {len(todo)})"
                progress.update(task, note=place)
                source.note = lambda text, place=place: progress.update(task, note=f"{place} {text}")
                source.ahead(todo[n + 1 : n + 2])
                record = _run(job, source, out, store, codec, tally, lambda k: progress.advance(task, k))
                atomic_write(out / STATE / f"{job.name}.json", json.dumps(record))
                source.done(job)
                tally.close(record)
        barrier()
        if rank == 0:
            _finish(source, jobs, out, plan, store.about, settings)
        barrier()
    return Manifest.load(out)


@contextlib.contextmanager
def _ranks():
    """(rank, world, barrier) under torchrun, else (0, 1, nothing)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1, lambda: None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # ranks may finish far apart
    try:
        yield rank, world, dist.barrier
    finally:
        dist.destroy_process_group()


def _begin(source: Source, jobs: list[Job], out: Path, settings: Settings) -> None:
    """Write the plan (settings, vocabulary), or check that the one there is the same."""
    path = out / STATE / "plan.json"
    listed = [[job.name, job.samples] for job in jobs if job.samples is not None]  # links may be left out later
    asked = json.loads(json.dumps({**dataclasses.asdict(settings), "source": source.name, "jobs": listed}))
    if path.is_file():
        begun = json.loads(path.read_text())["asked"]
        for key, value in asked.items():
            if begun.get(key) != value:
                was = "another list of samples" if key == "jobs" else f"{key} = {begun.get(key)!r}, not {value!r}"
                raise ValueError(f"{out} was begun with {was}; choose another --out or delete it")
        source.prepare(out / STATE, main=True)
        return
    if out.exists() and any(out.iterdir()) and not (out / STATE).is_dir():
        raise ValueError(f"{out} is not empty and not a data set that was begun here; choose another --out")
    if not jobs:
        raise ValueError(f"{source.name}: there is nothing to pack")
    (out / STATE).mkdir(parents=True, exist_ok=True)
    source.prepare(out / STATE, main=True)
    image = {"size": settings.size or _first_size(source, jobs, settings.channels), "channels": settings.channels}
    image |= {"vae": settings.vae, "scale": settings.scale}
    text = text_plan(
        settings.text, source.captions, settings.length, settings.states, settings.tokenizer, settings.alphabet, out
    )
    atomic_write(path, json.dumps({"asked": asked, "image": image, "text": text}))


def _first_size(source: Source, jobs: list[Job], channels: int) -> int:
    for raw in source.read(jobs[0]):
        try:
            return min(raw.pixels(channels).shape[:2])
        except ValueError:
            continue
    raise ValueError(f"{source.name}: no picture can be read; give --size")


def _store(image: dict, device) -> PixelStore | LatentStore:
    if image["vae"] is None:
        return PixelStore(image["channels"], image["size"])
    return LatentStore(image["vae"], image["scale"], image["size"], device)


def _run(job: Job, source: Source, out: Path, store, codec, tally: Tally, advance) -> dict:
    """Read, encode and write one job; returns its record."""
    writers: dict[str, ShardWriter] = {}
    moments, cut, captions = Moments(), 0, 0
    try:
        for chunk, pictures in _decoded(source.read(job), store):
            good: list[tuple[Raw, np.ndarray, np.ndarray, list[str]]] = []
            clean = [[c.strip() for c in raw.captions if c and c.strip()] for raw in chunk]
            encoded = encode_captions(codec, clean)
            for raw, texts, tokens, picture in zip(chunk, clean, encoded, pictures, strict=True):
                try:
                    if not texts:
                        raise ValueError("caption is missing or empty")
                    if isinstance(tokens, ValueError):
                        raise tokens
                    good.append((raw, picture.result(), tokens.ids, texts))
                except ValueError as error:
                    tally.skip(raw, str(error))
                    continue
                cut, captions = cut + tokens.cut, captions + len(texts)
            stored = store([pixels for _, pixels, _, _ in good], moments) if good else ()
            for (raw, _, tokens, texts), image in zip(good, stored, strict=True):
                if raw.split not in writers:
                    writers[raw.split] = ShardWriter(out, f"{raw.split}/{job.number:05d}.tar")
                labels = {"captions": texts, "source": raw.where, **raw.labels}
                writers[raw.split].add(f"{raw.number:09d}", image, tokens, labels)
            tally.seen += len(chunk)
            advance(len(chunk))
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    shards = {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()}
    return {"shards": shards, "moments": moments.dump(), "cut": cut, "captions": captions, "skipped": tally.of_job}


def _decoded(samples: Iterator[Raw], store) -> Iterator[tuple[list[Raw], list[Future]]]:
    """Chunks of samples with their pictures, which threads decode and crop while the chunk before is encoded."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    with ThreadPoolExecutor(threads) as pool:
        waiting = None
        while chunk := list(islice(samples, CHUNK)):
            pictures = [pool.submit(lambda raw: fit(raw.pixels(store.channels), store.picture), raw) for raw in chunk]
            if waiting:
                yield waiting
            waiting = chunk, pictures
        if waiting:
            yield waiting


class Tally:
    """Counts and names the samples that are left out; too many stop the run.

    known: samples this rank has in all, or None if that is not known beforehand.
    """

    def __init__(self, out: Path, share: float, known: int | None, records: list[dict]):
        self.out, self.share, self.known = out, share, known
        self.bad = sum(len(r["skipped"]) for r in records)
        self.seen = self.bad + sum(s["samples"] for r in records for s in r["shards"].values())
        self.of_job: list[dict] = []

    def skip(self, raw: Raw, reason: str) -> None:
        self.of_job.append({"sample": raw.where, "split": raw.split, "reason": reason})
        self.bad += 1
        if self.known is not None:
            self._judge(self.known)

    def close(self, record: dict) -> None:
        """A job is done."""
        if self.known is None:
            self._judge(self.seen)
        self.of_job = []

    def _judge(self, samples: int) -> None:
        if self.bad <= allowed(self.share, samples):
            return
        with open(self.out / SKIPPED, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.of_job)
        last = self.of_job[-1]
        raise ValueError(
            f"{self.bad} of {samples} samples cannot be used, more than --bad-share {self.share:g} allows; they are "
            f"named in {self.out / SKIPPED}; the last: {last['sample']}: {last['reason']}"
        )


def _record(out: Path, job: Job) -> dict:
    return json.loads((out / STATE / f"{job.name}.json").read_text())


def _done(out: Path, job: Job) -> bool:
    """Whether a job has a record and its shards are there."""
    if not (out / STATE / f"{job.name}.json").is_file():
        return False
    shards = [Shard(**s) for s in _record(out, job)["shards"].values()]
    return all(_size(out / s.file) == s.bytes and (out / s.index).is_file() for s in shards)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _finish(source: Source, jobs: list[Job], out: Path, plan: dict, image: dict, settings: Settings) -> None:
    """Merge the records of all jobs into dataset.yaml and skipped.jsonl."""
    records = [_record(out, job) for job in jobs]
    moments, splits, skipped = Moments(), {}, []
    for record in records:
        moments.merge(record["moments"])
        skipped += record["skipped"]
        for split, shard in record["shards"].items():
            splits.setdefault(split, []).append(Shard(**shard))
    if not splits:
        raise ValueError(f"{source.name}: not one usable sample")
    for left in out.rglob("*.partial"):  # of runs that were killed
        left.unlink()
    atomic_write(out / SKIPPED, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in skipped))
    reasons: dict[str, int] = {}
    for entry in skipped:
        reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
    text = {**plan["text"], "captions": sum(r["captions"] for r in records), "cut": sum(r["cut"] for r in records)}
    origin = {"name": source.name, "seed": settings.seed, "test_share": settings.test_share}
    Manifest(out, {**image, **moments.summary()}, text, splits, {"total": len(skipped), **reasons}, origin).save()


@contextlib.contextmanager
def _progress(console: Console, rank: int) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate()
    times = TextColumn("left"), TimeRemainingColumn(), TextColumn("passed"), TimeElapsedColumn()
    with Progress(*columns, *times, TextColumn("{task.fields[note]}"), console=console, disable=rank > 0) as progress:
        yield progress


class Rate(ProgressColumn):
    """Samples per second."""

    def render(self, task):
        return Text(f"{task.speed:,.0f} samples/s" if task.speed else "")
