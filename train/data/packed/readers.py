"""The arrays of chosen samples of packed shards, read by NVIDIA DALI or by the `webdataset` library.

Both readers get the same plan (the shard and sample at each place of each batch) and yield the same arrays in that
order. A sample that cannot be read is None in its batch.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import Manifest
from .shards import LABELS, Index, extension, index_text, read_npy

MAX_CACHED_INDICES = 256
Sample = dict[str, np.ndarray | None]  # {name: array as stored}; None: it cannot be read
Arrays = dict[str, np.ndarray | list]  # {name: arrays of several samples}


@dataclasses.dataclass
class Batch:
    """The arrays of one batch as stored.

    Each entry is one array where all samples have the same shape, otherwise a list, with None for samples that cannot
    be read. shards, samples (n,): the location of each sample.
    """

    arrays: Arrays
    shards: np.ndarray
    samples: np.ndarray


class Shards:
    """The shards of a split, each opened and checked at its first use; only the manifest's modalities are read.

    Args:
        checksums: also compare the SHA-256 of the shards; under torchrun the ranks divide the shards among them.
    """

    def __init__(self, manifest: Manifest, split: str, checksums: bool = True):
        if split not in manifest.splits:
            raise ValueError(f"{manifest.folder} has no split {split!r}; it has: {', '.join(manifest.splits)}")
        self.manifest, self.split, self.shards = manifest, split, manifest.splits[split]
        self.checksums, self.checked = checksums, set()
        self.indices: collections.OrderedDict[int, Index] = collections.OrderedDict()
        self.lock = threading.Lock()

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of samples of each shard."""
        return tuple(shard.samples for shard in self.shards)

    def index(self, k: int) -> Index:
        """The index of shard k.

        Raises:
            ValueError: the shard is not what was packed.
        """
        with self.lock:
            if k not in self.indices:
                self.indices[k] = self.manifest.open(self.shards[k], self._needs_checksum(k))
                self.checked.add(k)
                if len(self.indices) > MAX_CACHED_INDICES:
                    self.indices.popitem(last=False)
            return self.indices[k]

    def _needs_checksum(self, k: int) -> bool:
        on_this_rank = k % int(os.environ.get("WORLD_SIZE", 1)) == int(os.environ.get("RANK", 0))
        return self.checksums and on_this_rank and k not in self.checked

    def path(self, k: int) -> Path:
        return self.manifest.folder / self.shards[k].file

    def name(self, k: int, sample: int) -> str:
        """The shard and key of a sample, for messages."""
        return f"{self.path(k)}: {self.index(k).member(sample, LABELS)[2].removesuffix('.' + LABELS)}"

    def member(self, k: int, sample: int, ending: str) -> bytes:
        """The bytes of one member of one sample."""
        offset, size, _ = self.index(k).member(sample, ending)
        with open(self.path(k), "rb") as file:
            file.seek(offset)
            return file.read(size)

    def read(self, k: int, sample: int) -> Sample:
        """The arrays of one sample."""
        return {name: decode(self.member(k, sample, extension(name))) for name in self.manifest.names}


def decode(data: bytes | None) -> np.ndarray | None:
    """The array of an .npy file's bytes, or None if it cannot be read."""
    try:
        return None if data is None else read_npy(data)
    except ValueError:
        return None


def choose(loader: str) -> str:
    """The name of the reader for `auto`, `dali` or `webdataset`.

    Raises:
        ValueError: unknown, or not installed.
    """
    available = {"dali": installed("nvidia.dali"), "webdataset": installed("webdataset")}
    if loader == "auto":
        loader = "dali" if available["dali"] else "webdataset"
    if loader not in available:
        raise ValueError(f"loader {loader!r}; choose one of: auto, dali, webdataset")
    if not available[loader]:
        raise ValueError(f"the loader {loader} is not installed: pip install anystate[pairs]")
    return loader


def installed(module: str) -> bool:
    """Whether a module (also a submodule such as nvidia.dali) is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def read_dali(shards: Shards, plan_shards: np.ndarray, plan_samples: np.ndarray, threads: int) -> Iterator[Batch]:
    """Batches of a plan, two arrays (batches, n), read by DALI.

    DALI takes the order from index files written for the plan, one per run of consecutive samples of the same shard.
    It stops at a sample that it cannot decode: that batch is then read sample by sample, and a new pipeline starts
    after it.
    """
    start, names = 0, shards.manifest.names
    while start < len(plan_shards):
        with tempfile.TemporaryDirectory(prefix="anystate-index-") as folder:  # read only while the pipeline is built
            pipe = _pipeline(shards, plan_shards[start:], plan_samples[start:], Path(folder), threads)
        while start < len(plan_shards):
            where = plan_shards[start], plan_samples[start]
            try:
                arrays = pipe.run()
            except RuntimeError:
                yield _one_by_one(shards, *where)
                start += 1
                break
            yield Batch(dict(zip(names, map(_arrays, arrays), strict=True)), *where)
            start += 1
        del pipe


def _runs(flat_shards: np.ndarray) -> list[np.ndarray]:
    """The positions of each run of consecutive samples of the same shard."""
    return np.split(np.arange(len(flat_shards)), np.flatnonzero(np.diff(flat_shards)) + 1)


def _pipeline(shards: Shards, plan_shards: np.ndarray, plan_samples: np.ndarray, folder: Path, threads: int):
    """A DALI pipeline for a plan; `folder` takes its index files."""
    from nvidia.dali import fn, pipeline_def

    flat_shards, flat_samples = plan_shards.ravel(), plan_samples.ravel()
    endings = [extension(name) for name in shards.manifest.names]
    paths, indices = [], []
    for run in _runs(flat_shards):
        k = int(flat_shards[run[0]])
        lines = shards.index(k).lines
        path = folder / f"{len(paths)}.idx"
        path.write_text(index_text([lines[i] for i in flat_samples[run].tolist()]))
        paths.append(str(shards.path(k)))
        indices.append(str(path))

    @pipeline_def(batch_size=plan_shards.shape[1], num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def reading():
        files = fn.readers.webdataset(paths=paths, index_paths=indices, ext=endings, missing_component_behavior="error")
        return tuple(fn.decoders.numpy(file) for file in (files if len(endings) > 1 else [files]))

    pipe = reading()
    pipe.build()
    return pipe


def _arrays(tensors: Any) -> np.ndarray | list[np.ndarray]:
    """A DALI batch as one array, or as a list where shapes differ; valid until the pipeline runs again."""
    if tensors.is_dense_tensor():
        return np.asarray(tensors.as_tensor())
    return [np.asarray(tensors.at(i)) for i in range(len(tensors))]


def _one_by_one(shards: Shards, plan_shards: np.ndarray, plan_samples: np.ndarray) -> Batch:
    samples = [shards.read(k, i) for k, i in zip(plan_shards.tolist(), plan_samples.tolist(), strict=True)]
    return Batch(_columns(samples, shards.manifest.names), plan_shards, plan_samples)


def _columns(samples: list[Sample], names: list[str]) -> Arrays:
    return {name: [sample[name] for sample in samples] for name in names}


def read_webdataset(shards: Shards, plan_shards: np.ndarray, plan_samples: np.ndarray, threads: int) -> Iterator[Batch]:
    """Batches of a plan, two arrays (batches, n), read by `webdataset`.

    Each run of consecutive samples of the same shard takes one pass through its tar.
    """
    flat_shards, flat_samples = plan_shards.ravel(), plan_samples.ravel()
    n = plan_shards.shape[1]
    waiting: list[Sample] = []
    done = 0
    for run in _runs(flat_shards):
        waiting += _read_pass(shards, int(flat_shards[run[0]]), flat_samples[run])
        while len(waiting) >= n:
            yield Batch(_columns(waiting[:n], shards.manifest.names), plan_shards[done], plan_samples[done])
            del waiting[:n]
            done += 1


def _read_pass(shards: Shards, k: int, wanted: np.ndarray) -> list[Sample]:
    """The samples `wanted` of shard k, in that order, by one pass through the tar."""
    import webdataset

    shards.index(k)  # opens and checks the shard
    needed, names = set(wanted.tolist()), shards.manifest.names
    found, unread = {}, dict.fromkeys(names)
    reader = webdataset.WebDataset(
        str(shards.path(k)), shardshuffle=False, nodesplitter=_no_split, workersplitter=_no_split, empty_check=False
    )
    for i, sample in enumerate(reader):
        if i in needed:
            found[i] = {name: decode(sample.get(extension(name).lower())) for name in names}  # as webdataset names them
    return [found.get(i, unread) for i in wanted.tolist()]


def _no_split(urls: Iterator) -> Iterator:
    """All urls for every rank and worker: the plan divides samples, not shards, among ranks."""
    return urls


READERS = {"dali": read_dali, "webdataset": read_webdataset}
