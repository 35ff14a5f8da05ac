"""Samples per second of the packed loader and of the official way, single .npy files behind a PyTorch DataLoader.

Latents of 32×32×4 (mean and deviation stored) and 120 tokens, made up, on the same disk; every way gets the same cores
and is measured in turn, several rounds. Files are read once before, so all come from the file cache.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from ...train.data.packed.packed import Packed
from ...train.data.packed.shards import Manifest, ShardWriter
from .rows import Rows

CHANNELS, SIZE, TOKENS, STATES, SCALE = 4, 32, 120, 49408, 0.18215
SHARD = 4096  # samples per shard, the default of `data pack`


class Files(Dataset):
    """The official layout: images/0000/I.npy float32 (8, 32, 32), tokens/0000/I.npy int64 (120,), read one by one."""

    def __init__(self, folder: Path, samples: int):
        self.folder, self.samples = folder, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int):
        name = f"{i:08d}"[:4] + f"/{i}.npy"
        moments = torch.from_numpy(np.load(self.folder / "images" / name, mmap_mode="r").copy())
        mean, std = moments.chunk(2)
        tokens = torch.from_numpy(np.load(self.folder / "tokens" / name, mmap_mode="r").copy())
        return (mean + std * torch.randn_like(mean)) * SCALE, tokens


@dataclasses.dataclass
class Way:
    """One way of loading: start() gives its batches, and a function that ends it."""

    name: str
    start: Callable[[], tuple[Iterator, Callable[[], None]]]
    rates: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def run(
    samples: int, batch: int, batches: int, rounds: int, folder: Path | None, json: Path | None, console: Console
) -> list[Way]:
    """Measure every way and print the table.

    Args:
        samples: in the made-up data set. batches: of `batch` samples, measured per way and round after a warm-up.
        folder: on the disk to be measured; default the system's folder for temporary files.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="anystate-bench-") as made:
        root = Path(made)
        make(root, samples, console)
        ways = [
            Way("packed, DALI", lambda: packed(root, "dali", batch)),
            Way("packed, webdataset", lambda: packed(root, "webdataset", batch)),
            Way("files, 2 workers", lambda: official(root, samples, batch, 2)),
            Way("files, no workers", lambda: official(root, samples, batch, 0)),
        ]
        for _ in track(range(rounds), description="rounds", console=console):
            for way in ways:
                way.rates.append(rate(way, batch, batches))
    best = max(way.median for way in ways if way.name.startswith("files"))
    table = Table("way", "samples/s, median", "lowest", "highest", "times the best official")
    for way in ways:
        cells = [f"{value:,.0f}" for value in (way.median, min(way.rates), max(way.rates))]
        table.add_row(way.name, *cells, f"{way.median / best:.1f}")
    console.print(table)
    rows = Rows("cpu", json, write=lambda line: None)
    about = {"samples": samples, "batch": batch, "batches": batches}
    rates = {way.name: way.rates for way in ways}
    values = {"plain": best} | {way.name: way.median for way in ways}
    rows.add("latents and tokens from the disk", values, "samples/s", rates=rates, **about)
    return ways


def rate(way: Way, batch: int, batches: int) -> float:
    """Samples per second over some batches, after two to get going."""
    loaded, end = way.start()
    try:
        for _ in range(2):
            next(loaded)
        began = time.perf_counter()
        for _ in range(batches):
            next(loaded)
        return batch * batches / (time.perf_counter() - began)
    finally:
        end()


def packed(root: Path, loader: str, batch: int) -> tuple[Iterator, Callable[[], None]]:
    data = Packed(root, loader=loader, checksums=False)

    def batches():
        step = 0
        while True:
            yield data.batch(0, step, range(batch), batch)
            step += 1

    return batches(), data.close


def official(root: Path, samples: int, batch: int, workers: int) -> tuple[Iterator, Callable[[], None]]:
    loader = DataLoader(
        Files(root, samples), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )

    def batches():
        while True:
            yield from loader

    made = batches()
    return made, made.close


def make(root: Path, samples: int, console: Console) -> None:
    """The same made-up samples packed, and as single files."""
    rng = np.random.default_rng(0)
    shards, writer = [], None
    for i in track(range(samples), description="writing", console=console):
        if i % SHARD == 0:
            shards += [writer.close()] if writer else []
            writer = ShardWriter(root, f"train/{i // SHARD:05d}.tar")
        moments = rng.standard_normal((2 * CHANNELS, SIZE, SIZE), np.float32)
        tokens = rng.integers(0, STATES, TOKENS)
        writer.add(f"{i:09d}", moments.astype(np.float16), tokens[None].astype(np.int32), {"captions": ["made up"]})
        for kind, values in (("images", moments), ("tokens", tokens)):
            file = root / kind / f"{i:08d}"[:4] / f"{i}.npy"
            if i % 10_000 == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, values)
    image = {"kind": "latents", "channels": CHANNELS, "size": SIZE, "scale": SCALE, "vae": "made up"}
    text = {"kind": "clip", "length": TOKENS, "states": STATES, "pad": 0, "start": None, "end": None, "file": ""}
    Manifest(root, image, text, {"train": [*shards, writer.close()]}).save()
