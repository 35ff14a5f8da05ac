"""`anystate bench data`: samples per second of the packed loader and of the official layout, single .npy files.

The data are synthetic latents of 32×32×4 (mean and standard deviation stored) and 120 tokens, written to the same disk
in both layouts. All loaders get the same cores and alternate over several rounds. The files were just written, so all
are read from the file cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...configs.load import load_config
from ...model.build import Codecs, build_codecs, part_names
from ...train.data.packed.manifest import Manifest, PackedModality
from ...train.data.packed.match import stored_specs
from ...train.data.packed.packed import Packed
from ...train.data.packed.shards import ShardWriter
from .results import ResultLog

RECIPE = "text_image/stage3"  # whose latents and tokens are stored
SCALE = 0.18215  # of latents in the official code
SHARD = 4096  # samples per shard, the default of `data pack`
WARM_UP = 2  # batches


class NpyFiles(Dataset):
    """The official layout: images/0000/I.npy float32 (8, 32, 32), tokens/0000/I.npy int64 (120,), read one by one."""

    def __init__(self, folder: Path, samples: int):
        self.folder, self.samples = folder, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        name = f"{i:08d}"[:4] + f"/{i}.npy"
        moments = torch.from_numpy(np.load(self.folder / "images" / name, mmap_mode="r").copy())
        mean, std = moments.chunk(2)
        tokens = torch.from_numpy(np.load(self.folder / "tokens" / name, mmap_mode="r").copy())
        return (mean + std * torch.randn_like(mean)) * SCALE, tokens


@dataclasses.dataclass
class Loader:
    """A loader under test. open: a context manager of its endless batches. rates: samples per second of each round."""

    name: str
    open: Callable[[], AbstractContextManager[Iterator]]
    rates: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def run(
    samples: int, batch: int, batches: int, rounds: int, folder: Path | None, json: Path | None, console: Console
) -> list[Loader]:
    """Measure every loader and print a table.

    Args:
        samples: size of the synthetic data set. batches: of `batch` samples, per loader and round, after a warm-up.
        folder: on the disk to measure; default the system's folder for temporary files.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="anystate-bench-") as temporary:
        root = Path(temporary)
        write_data(root, samples, console)
        loaders = [
            Loader("packed, DALI", functools.partial(packed, root, "dali", batch)),
            Loader("packed, webdataset", functools.partial(packed, root, "webdataset", batch)),
            Loader("files, 2 workers", functools.partial(official, root, samples, batch, 2)),
            Loader("files, no workers", functools.partial(official, root, samples, batch, 0)),
        ]
        for _ in track(range(rounds), description="rounds", console=console):
            for loader in loaders:
                loader.rates.append(rate(loader, batch, batches))
    best = max(loader.median for loader in loaders if loader.name.startswith("files"))
    console.print(_table(loaders, best))
    log = ResultLog("cpu", json, write=lambda line: None)
    values = {"plain": best}
    for loader in loaders:
        values[loader.name] = loader.median
    rates = {loader.name: loader.rates for loader in loaders}
    about = {"rates": rates, "samples": samples, "batch": batch, "batches": batches}
    log.add("latents and tokens from the disk", values, "samples/s", **about)
    return loaders


def _table(loaders: list[Loader], best: float) -> Table:
    table = Table("loader", "samples/s, median", "lowest", "highest", "ratio to the best official")
    for loader in loaders:
        cells = [f"{value:,.0f}" for value in (loader.median, min(loader.rates), max(loader.rates))]
        table.add_row(loader.name, *cells, f"{loader.median / best:.1f}")
    return table


def rate(loader: Loader, batch: int, batches: int) -> float:
    """Samples per second over `batches` batches, after a warm-up."""
    with loader.open() as loaded:
        for _ in range(WARM_UP):
            next(loaded)
        began = time.perf_counter()
        for _ in range(batches):
            next(loaded)
        return batch * batches / (time.perf_counter() - began)


@contextlib.contextmanager
def packed(root: Path, backend: str, batch: int) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Batches of our packed shards; backend: dali or webdataset."""
    data = Packed(root, codecs_of_recipe(), loader=backend, checksums=False)
    try:
        yield _packed_batches(data, batch)
    finally:
        data.close()


def _packed_batches(data: Packed, batch: int) -> Iterator[dict[str, Tensor]]:
    step = 0
    while True:
        yield data.batch(0, step, range(batch), batch)
        step += 1


@contextlib.contextmanager
def official(root: Path, samples: int, batch: int, workers: int) -> Iterator[Iterator[list[Tensor]]]:
    """Batches of single files by a PyTorch DataLoader."""
    loader = DataLoader(
        NpyFiles(root, samples),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    batches = _endless(loader)
    try:
        yield batches
    finally:
        batches.close()


def _endless(loader: DataLoader) -> Generator[list[Tensor], None, None]:
    while True:
        yield from loader


def codecs_of_recipe() -> Codecs:
    """The codecs that restore what is stored; they need neither autoencoder nor tokenizer for that."""
    return build_codecs(load_config(RECIPE))


def packed_modalities() -> dict[str, PackedModality]:
    """What the shards hold: a latent, and a list of one caption, of every sample."""
    config, codecs = load_config(RECIPE), codecs_of_recipe()
    names, specs = part_names(config, codecs), stored_specs(config, codecs)
    tokens = {m: any(spec.states is not None for spec in own.values()) for m, own in specs.items()}
    return {m: PackedModality(names[m], specs[m], codec.settings(), tokens[m]) for m, codec in codecs.items()}


def write_data(root: Path, samples: int, console: Console) -> None:
    """Write the same synthetic samples as shards and as single files."""
    rng, modalities = np.random.default_rng(0), packed_modalities()
    shards, writer = [], None
    for i in track(range(samples), description="writing", console=console):
        if i % SHARD == 0:
            shards += [writer.close()] if writer else []
            writer = ShardWriter(root, f"train/{i // SHARD:05d}.tar")
        arrays = {}
        for about in modalities.values():
            ((part, spec),) = about.specs.items()
            if spec.states is None:
                values = rng.standard_normal(spec.shape, np.float32)
            else:
                values = rng.integers(0, spec.states, spec.shape)
            stored = values.astype(spec.dtype)
            arrays[about.names[part]] = stored[None] if about.versions else stored
            write_file(root, i, "images" if spec.states is None else "tokens", values)
        writer.add(f"{i:09d}", arrays, {})
    Manifest(root, modalities, {"train": [*shards, writer.close()]}).save()


def write_file(root: Path, i: int, kind: str, values: np.ndarray) -> None:
    """Write an array of sample i in the official layout."""
    file = root / kind / f"{i:08d}"[:4] / f"{i}.npy"
    if i % 10_000 == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, values)
