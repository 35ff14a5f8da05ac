"""A full look at a packed data set: every byte checked, every sample decoded."""

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
    """Checksums of all shards, index entries against the tar's own, shapes and values of all samples.

    Raises:
        ValueError: the first thing that is wrong, by file and sample.
    """
    manifest = Manifest.load(folder)
    for split in manifest.splits:
        shards = Shards(manifest, split)
        repair = Repair(shards, manifest, 0.0, None)
        for k in track(range(len(shards.shards)), description=split, console=console):
            _compare(shards, k)
            for sample in range(shards.counts[k]):
                if (reason := repair.problem(*shards.read(k, sample))) is not None:
                    raise ValueError(f"{shards.name(k, sample)}: {reason}")
    return manifest


def _compare(shards: Shards, k: int) -> None:
    """The index of a shard lists exactly the members of its tar."""
    index, path = shards.index(k), shards.path(k)
    with tarfile.open(path) as tar:
        found = [(m.offset_data, m.size, m.name) for m in members(tar, str(path))]
    listed = [index.member(i, extension) for i in range(len(index.lines)) for extension in (IMAGE, TEXT, LABELS)]
    if found != listed:
        raise ValueError(f"{shards.manifest.folder / shards.shards[k].index} does not match its shard {path.name}")


def describe(manifest: Manifest) -> list[str]:
    """Lines for the screen: counts, and what a config needs."""
    image, text = manifest.image, manifest.text
    counts = ", ".join(f"{manifest.samples(s):,} {s}" for s in manifest.splits)
    lines = [
        f"{manifest.folder}: {counts}; {manifest.skipped.get('total', 0)} skipped; {text.get('cut', 0)} captions cut"
    ]
    if image["kind"] == "latents":
        picture = {"latents": {"vae": image["vae"], "scale": image["scale"]}}
    else:
        picture = {"pixel_max": image["pixel_max"]}
    if text["kind"] == "characters":
        caption = {"alphabet": text["alphabet"]}
    else:
        tokens = {key: text[key] for key in ("kind", "states", "pad", "start", "end")}
        caption = {"tokenizer": {**tokens, "path": str(manifest.folder / text["file"])}}
    fits = {
        "data": {"name": "packed", "path": str(manifest.folder)},
        "modalities": {
            "image": {"channels": image["channels"], "size": image["size"], **picture},
            "text": {"length": text["length"], **caption},
        },
    }
    lines.append("what a config needs to say about it:")
    return lines + yaml.safe_dump(fits, sort_keys=False, allow_unicode=True, width=200).splitlines()
