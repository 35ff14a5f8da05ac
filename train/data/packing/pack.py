"""`anystate data pack`: from raw samples to WebDataset shards, their DALI indices and one `dataset.yaml`.

The source is divided into jobs; a job writes its shards, then its record under `DATASET/.pack`. Under torchrun, job j
belongs to rank j mod W. When packing is run again, jobs with a valid record are skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from ....configs.config import Latents
from ....model.storage import atomic_write
from ..packed.shards import Manifest, Shard
from .packer import SKIPPED, STATE, Packer, Store, read_record
from .sources import Job, RawSource
from .stores import LatentStore, Moments, PixelStore, text_codec, text_section


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of packing a source; the settings of a data set cannot be changed once its packing has begun.

    Args:
        size: side of the images in pixels; None: that of the first image.
        channels: of the images.
        vae: autoencoder of the latents; None: store pixels.
        scale: factor on the latents.
        text: characters, bpe or clip.
        states: vocabulary size of bpe.
        tokenizer: file, folder or hub id of the clip tokenizer.
        alphabet: None: the characters of the captions.
        length: tokens per caption; None: fits the longest.
        shard_size: samples per shard, unless the source determines it.
        test_share: held-out share where the source has no split.
        seed: of the order of the samples and of that split.
    """

    size: int | None = None
    channels: int = 3
    vae: str | None = None
    scale: float = Latents().scale
    text: str = "characters"
    states: int = 1024
    tokenizer: str | None = None
    alphabet: str | None = None
    length: int | None = None
    shard_size: int = 4096
    test_share: float = 0.0
    seed: int = 0


def pack(
    source: RawSource,
    out: Path,
    settings: Settings,
    bad_share: float = 0.01,
    console: Console | None = None,
    device: torch.device | str | None = None,
) -> Manifest:
    """Pack a source into the folder `out` and return its manifest.

    Raises:
        ValueError: the folder has other content, the settings differ from those it was begun with, or more than
            `bad_share` of the samples are unusable (listed in DATASET/skipped.jsonl).
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
        packer = Packer(source, out, store, text_codec(plan["text"], out))
        packer.run(jobs[rank::world], bad_share, console, f"rank {rank} of {world}" if world > 1 else "", rank > 0)
        barrier()
        if rank == 0:
            _finish(source, jobs, out, plan, store.about, settings)
        barrier()
    return Manifest.load(out)


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """(rank, world, barrier) under torchrun, otherwise (0, 1, no operation)."""
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


def _begin(source: RawSource, jobs: list[Job], out: Path, settings: Settings) -> None:
    """Write the plan (settings, vocabulary), or check that an existing plan has the same settings."""
    path = out / STATE / "plan.json"
    listed = [[job.name, job.samples] for job in jobs if job.samples is not None]  # links may be left out later
    requested = {**dataclasses.asdict(settings), "source": source.name, "jobs": listed}
    requested = json.loads(json.dumps(requested))
    if path.is_file():
        _check_same(requested, json.loads(path.read_text())["asked"], out)
        source.prepare(out / STATE, main=True)
        return
    if out.exists() and any(out.iterdir()) and not (out / STATE).is_dir():
        raise ValueError(f"{out} is not empty and not an unfinished data set; choose another --out")
    if not jobs:
        raise ValueError(f"{source.name}: there is nothing to pack")
    (out / STATE).mkdir(parents=True, exist_ok=True)
    source.prepare(out / STATE, main=True)
    image = {
        "size": settings.size or _first_size(source, jobs, settings.channels),
        "channels": settings.channels,
        "vae": settings.vae,
        "scale": settings.scale,
    }
    text = text_section(
        settings.text, source.captions, settings.length, settings.states, settings.tokenizer, settings.alphabet, out
    )
    atomic_write(path, json.dumps({"asked": requested, "image": image, "text": text}))


def _check_same(requested: dict, begun: dict, out: Path) -> None:
    """Raise ValueError at the first setting that differs from those a data set was begun with."""
    for key, value in requested.items():
        if begun.get(key) != value:
            difference = "another list of samples" if key == "jobs" else f"{key} = {begun.get(key)!r}, not {value!r}"
            raise ValueError(f"{out} was begun with {difference}; choose another --out or delete it")


def _first_size(source: RawSource, jobs: list[Job], channels: int) -> int:
    """The shorter side of the first readable image."""
    for raw in source.read(jobs[0]):
        try:
            return min(raw.pixels(channels).shape[:2])
        except ValueError:
            continue
    raise ValueError(f"{source.name}: no image can be read; give --size")


def _store(image: dict, device: torch.device | str | None) -> Store:
    if image["vae"] is None:
        return PixelStore(image["channels"], image["size"])
    return LatentStore(image["vae"], image["scale"], image["size"], device)


def _finish(source: RawSource, jobs: list[Job], out: Path, plan: dict, image: dict, settings: Settings) -> None:
    """Merge the records of all jobs into dataset.yaml and skipped.jsonl."""
    records = [read_record(out, job) for job in jobs]
    moments, splits, skipped = Moments(), {}, []
    for record in records:
        moments.merge(record["moments"])
        skipped += record["skipped"]
        for split, shard in record["shards"].items():
            splits.setdefault(split, []).append(Shard(**shard))
    if not splits:
        raise ValueError(f"{source.name}: not one usable sample")
    for leftover in out.rglob("*.partial"):  # of runs that were killed
        leftover.unlink()
    atomic_write(out / SKIPPED, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
    reasons = {"total": len(skipped)}
    for entry in skipped:
        reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
    image = {**image, **moments.summary()}
    text = {**plan["text"], "captions": sum(r["captions"] for r in records), "cut": sum(r["cut"] for r in records)}
    about = {"name": source.name, "seed": settings.seed, "test_share": settings.test_share}
    Manifest(out, image, text, splits, reasons, about).save()
