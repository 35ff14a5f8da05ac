"""Verification of a packed data set: all checksums are compared and all samples decoded."""

from __future__ import annotations

import tarfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import track

from ..packed.manifest import Manifest
from ..packed.readers import Shards
from ..packed.repair import Repair
from ..packed.shards import LABELS, extension, members


def check(folder: Path, console: Console) -> Manifest:
    """Compare checksums and indices of all shards, and shapes and values of all samples.

    Raises:
        ValueError: the first fault found, with its file and sample.
    """
    manifest = Manifest.load(folder)
    for split in manifest.splits:
        shards = Shards(manifest, split)
        repair = Repair(shards, 0.0, None)
        for k in track(range(len(shards.shards)), description=split, console=console):
            _check_index(shards, k)
            for sample in range(shards.counts[k]):
                reason = repair.problem(shards.read(k, sample))
                if reason is not None:
                    raise ValueError(f"{shards.name(k, sample)}: {reason}")
    return manifest


def _check_index(shards: Shards, k: int) -> None:
    """Raise ValueError unless the index of shard k lists exactly the members of its tar."""
    index, path = shards.index(k), shards.path(k)
    with tarfile.open(path) as tar:
        found = [(m.offset_data, m.size, m.name) for m in members(tar, str(path))]
    endings = [*map(extension, shards.manifest.names), LABELS]
    listed = [index.member(i, ending) for i in range(len(index.lines)) for ending in endings]
    if found != listed:
        raise ValueError(f"{shards.manifest.folder / shards.shards[k].index} does not match its shard {path.name}")


def describe(manifest: Manifest) -> list[str]:
    """Lines to print: the numbers of samples, what there is of each modality, and settings of a config that fit."""
    counts = ", ".join(f"{manifest.samples(split):,} {split}" for split in manifest.splits)
    lines = [f"{manifest.folder}: {counts}; {manifest.skipped.get('total', 0)} skipped"]
    for m, about in manifest.modalities.items():
        arrays = [f"{about.names[part]} {spec.dtype} {spec.shape}" for part, spec in about.specs.items()]
        notes = [f"{n:,} of {split} lack it" for split, n in about.absent.items()]
        truncated = about.about.get("truncated", 0)
        notes += [f"{truncated:,} truncated"] if truncated else []
        lines.append("; ".join([f"{m}: {', '.join(arrays)}", *notes]))
    settings = {m: about.settings for m, about in manifest.modalities.items() if about.settings}
    config = {"data": {"source": str(manifest.folder)}, **({"modalities": settings} if settings else {})}
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=200)
    text = text.replace("{folder}", str(manifest.folder))
    return [*lines, "matching settings of a config:", *text.splitlines()]
