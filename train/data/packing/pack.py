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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ....configs.config import Config
from ....model.build import build_codecs, codec_files, part_names
from ....model.storage import atomic_write
from ..packed.manifest import Manifest, PackedModality
from ..packed.match import stored_specs
from ..packed.shards import Shard
from .image_text import Settings, minimal_config, plan_image_text
from .job_shards import Moments
from .packer import SKIPPED, STATE, Packer, Store, read_record
from .sources import Job, RawSource

FORMAT = 2  # of the plan and the records


def pack(
    source: RawSource,
    out: Path,
    settings: Settings,
    bad_share: float = 0.01,
    console: Console | None = None,
    device: torch.device | str | None = None,
    config: Config | None = None,
) -> Manifest:
    """Pack a source into the folder `out` and return its manifest.

    Args:
        config: its modalities are packed, and their codecs are fitted on the training part first; None: images with
            captions, as the settings say.

    Raises:
        ValueError: the folder has other content, the settings differ from those it was begun with, or more than
            `bad_share` of the samples are unusable (listed in DATASET/skipped.jsonl).
    """
    console = console or Console(quiet=True)
    with _ranks() as (rank, world, barrier), contextlib.closing(source):
        device = device or _own_gpu(world)
        jobs = source.jobs(settings.shard_size, settings.test_share, settings.seed)
        if rank == 0:
            _begin(source, jobs, out, settings, device, config)
        barrier()
        if rank > 0:
            source.prepare(out / STATE, main=False)
        stores = _stores(json.loads((out / STATE / "plan.json").read_text())["modalities"], out, device)
        packer = Packer(source, out, stores)
        packer.run(jobs[rank::world], bad_share, console, f"rank {rank} of {world}" if world > 1 else "", rank > 0)
        barrier()
        if rank == 0:
            _finish(source, jobs, out, stores, settings)
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


def _own_gpu(world: int) -> str | None:
    """The GPU of this rank among several; None: the default."""
    if world == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def _begin(
    source: RawSource,
    jobs: list[Job],
    out: Path,
    settings: Settings,
    device: torch.device | str | None,
    config: Config | None,
) -> None:
    """Write the plan and the files of the codecs, or check that an existing plan has the same settings."""
    path = out / STATE / "plan.json"
    listed = [[job.name, job.samples] for job in jobs if job.samples is not None]  # links may be left out later
    codecs = {} if config is None else build_codecs(config)
    requested = {"format": FORMAT, **dataclasses.asdict(settings), "source": source.name, "jobs": listed}
    requested["modalities"] = {m: codec.settings() for m, codec in codecs.items()}
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
    if config is None:
        plan = plan_image_text(settings, source, jobs, out, device)
    else:
        plan = plan_config(config)
        source.fit(codecs, config.seed)
        for name, content in codec_files(codecs).items():
            atomic_write(out / name, content)
    atomic_write(path, json.dumps({"asked": requested, "modalities": plan}))


def plan_config(config: Config) -> dict[str, dict[str, Any]]:
    """{modality: what is packed of it}.

    section: of a config. settings: those of them to be shown; versions, raw: see `PackedModality`. required: whether
    samples that lack it are left out.
    """
    common = {"settings": {}, "versions": True, "required": False}
    sections = {m: section.model_dump(mode="json") for m, section in config.modalities.items()}
    return {m: {"section": section, "raw": m, **common} for m, section in sections.items()}


def _stores(plan: dict[str, dict[str, Any]], out: Path, device: torch.device | str | None) -> dict[str, Store]:
    """How each modality of a plan is stored, with the codecs' files in the folder `out`."""
    sections = {m: entry["section"] for m, entry in plan.items()}
    config = minimal_config(sections, str(out / STATE / "plan.json"))
    codecs = {m: codec.ready(device) for m, codec in build_codecs(config, out).items()}
    names, specs, stores = part_names(config, codecs), stored_specs(config, codecs), {}
    taken = [name.lower() for parts in names.values() for name in parts.values()]  # as webdataset reads them
    if twice := [name for name in taken if taken.count(name) > 1]:
        raise ValueError(f"two modalities are named {twice[0]}, but for capital letters: rename one")
    for m, codec in codecs.items():
        shown = {key: plan[m][key] for key in ("versions", "raw", "settings")}
        files = {name: f"{m}.{name}" for name in codec.files()}
        about = PackedModality(names[m], specs[m], codec.settings(), files=files, **shown)
        stores[m] = Store(codec, about, plan[m]["required"])
    return stores


def _check_same(requested: dict, begun: dict, out: Path) -> None:
    """Raise ValueError at the first setting that differs from those a data set was begun with."""
    for key, value in requested.items():
        if begun.get(key) != value:
            difference = "another list of samples" if key == "jobs" else f"{key} = {begun.get(key)!r}, not {value!r}"
            raise ValueError(f"{out} was begun with {difference}; choose another --out or delete it")


def _finish(source: RawSource, jobs: list[Job], out: Path, stores: dict[str, Store], settings: Settings) -> None:
    """Merge the records of all jobs into dataset.yaml and skipped.jsonl."""
    records = [read_record(out, job) for job in jobs]
    splits, skipped = {}, []
    for record in records:
        skipped += record["skipped"]
        for split, shard in record["shards"].items():
            splits.setdefault(split, []).append(Shard(**shard))
    if not splits:
        raise ValueError(f"{source.name}: not one usable sample")
    for leftover in out.rglob("*.partial"):  # of runs that were killed
        leftover.unlink()
    atomic_write(out / SKIPPED, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
    reasons = {"total": len(skipped), **Counter(entry["reason"] for entry in skipped)}
    modalities = {m: _with_statistics(m, store.about, records) for m, store in stores.items()}
    about = {"name": source.name, "seed": settings.seed, "test_share": settings.test_share}
    manifest = Manifest(out, modalities, splits, reasons, about)
    for m, packed in modalities.items():
        if "train" in splits and packed.absent.get("train") == manifest.samples("train"):
            raise ValueError(f"{source.name}: no usable training sample has the modality {m}")
    manifest.save()


def _with_statistics(m: str, about: PackedModality, records: list[dict]) -> PackedModality:
    """What is packed of a modality, with counts and statistics from the records of all jobs."""
    counts, absent, statistics = Counter(), Counter(), {}
    for record in records:
        counts.update(record["counts"].get(m, {}))
        absent.update({split: n[m] for split, n in record["absent"].items() if m in n})
        for name in set(about.names.values()) & set(record["moments"]):
            statistics.setdefault(name, Moments()).merge(record["moments"][name])
    summary = {name: moments.summary() for name, moments in statistics.items()}
    found = {**counts, **({"statistics": summary} if summary else {})}
    return dataclasses.replace(about, absent=dict(absent), about=found)
