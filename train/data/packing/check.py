"""Verification of a packed data set: all checksums are compared and all samples decoded."""

from __future__ import annotations

import tarfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import track

from ..packed.readers import Shards
from ..packed.repair import Repair
from ..packed.shards import IMAGE, LABELS, TEXT, Manifest, members


def check(folder: Path, console: Console) -> Manifest:
    """Compare checksums and indices of all shards, and shapes and values of all samples.

    Raises:
        ValueError: the first fault found, with its file and sample.
    """
    manifest = Manifest.load(folder)
    for split in manifest.splits:
        shards = Shards(manifest, split)
        repair = Repair(shards, manifest, 0.0, None)
        for k in track(range(len(shards.shards)), description=split, console=console):
            _check_index(shards, k)
            for sample in range(shards.counts[k]):
                reason = repair.problem(*shards.read(k, sample))
                if reason is not None:
                    raise ValueError(f"{shards.name(k, sample)}: {reason}")
    return manifest


def _check_index(shards: Shards, k: int) -> None:
    """Raise ValueError unless the index of shard k lists exactly the members of its tar."""
    index, path = shards.index(k), shards.path(k)
    with tarfile.open(path) as tar:
        found = [(m.offset_data, m.size, m.name) for m in members(tar, str(path))]
    listed = [index.member(i, extension) for i in range(len(index.lines)) for extension in (IMAGE, TEXT, LABELS)]
    if found != listed:
        raise ValueError(f"{shards.manifest.folder / shards.shards[k].index} does not match its shard {path.name}")


def describe(manifest: Manifest) -> list[str]:
    """Lines to print: the numbers of samples, and the settings of a config that match the data set."""
    skipped, cut = manifest.skipped.get("total", 0), manifest.text.get("cut", 0)
    counts = ", ".join(f"{manifest.samples(split):,} {split}" for split in manifest.splits)
    return [
        f"{manifest.folder}: {counts}; {skipped} skipped; {cut} captions truncated",
        "matching settings of a config:",
        *yaml.safe_dump(_config(manifest), sort_keys=False, allow_unicode=True, width=200).splitlines(),
    ]


def _config(manifest: Manifest) -> dict:
    """The part of a config that matches a data set."""
    image = {"channels": manifest.image["channels"], "size": manifest.image["size"]}
    if manifest.image["kind"] == "latents":
        image["latents"] = {"vae": manifest.image["vae"], "scale": manifest.image["scale"]}
    else:
        image["pixel_max"] = manifest.image["pixel_max"]
    text = {"length": manifest.text["length"]}
    if manifest.text["kind"] == "characters":
        text["alphabet"] = manifest.text["alphabet"]
    else:
        text["tokenizer"] = {key: manifest.text[key] for key in ("kind", "states", "pad", "start", "end")}
        text["tokenizer"]["path"] = str(manifest.folder / manifest.text["file"])
    return {
        "data": {"name": "packed", "path": str(manifest.folder)},
        "modalities": {"image": image, "text": text},
    }
