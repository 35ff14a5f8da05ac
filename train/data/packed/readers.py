"""The arrays of chosen samples of packed shards, read by NVIDIA DALI or by the `webdataset` library.

Both are given the same plan, which shard and sample stands where in which batch, and yield the same arrays in its
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

import numpy as np

from .shards import IMAGE, TEXT, Index, Manifest, index_text, read_npy

KEPT = 256  # indices in memory
Arrays = tuple[np.ndarray | None, np.ndarray | None]  # image as stored, tokens (M, L)


@dataclasses.dataclass
class Batch:
    """The images and tokens of one batch as stored: one array where all have one shape, else a list with None for
    samples that cannot be read. shards, samples (n,): where they come from."""

    images: np.ndarray | list
    tokens: np.ndarray | list
    shards: np.ndarray
    samples: np.ndarray


class Shards:
    """The shards of a split, opened and checked when first needed.

    checksums: also compare the SHA-256 of each shard; under torchrun every rank does so for its own part of them.
    """

    def __init__(self, manifest: Manifest, split: str, checksums: bool = True):
        if split not in manifest.splits:
            raise ValueError(f"{manifest.folder} has no split {split!r}; it has: {', '.join(manifest.splits)}")
        self.manifest, self.shards = manifest, manifest.splits[split]
        self.checksums, self.checked = checksums, set()
        self.indices: collections.OrderedDict[int, Index] = collections.OrderedDict()
        self.lock = threading.Lock()

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.shards)

    def index(self, k: int) -> Index:
        """The index of shard k; raises ValueError if the shard is not what was packed."""
        with self.lock:
            if k not in self.indices:
                mine = k % int(os.environ.get("WORLD_SIZE", 1)) == int(os.environ.get("RANK", 0))
                new = self.checksums and mine and k not in self.checked
                self.indices[k] = self.manifest.open(self.shards[k], new)
                self.checked.add(k)
                if len(self.indices) > KEPT:
                    self.indices.popitem(last=False)
            return self.indices[k]

    def path(self, k: int) -> Path:
        return self.manifest.folder / self.shards[k].file

    def name(self, k: int, sample: int) -> str:
        """Where a sample is, for messages."""
        return f"{self.path(k)}: {self.index(k).member(sample, IMAGE)[2].removesuffix('.' + IMAGE)}"

    def member(self, k: int, sample: int, extension: str) -> bytes:
        """The bytes of one member of one sample."""
        offset, size, _ = self.index(k).member(sample, extension)
        with open(self.path(k), "rb") as file:
            file.seek(offset)
            return file.read(size)

    def read(self, k: int, sample: int) -> Arrays:
        """One sample; None for what cannot be read."""
        return decode(self.member(k, sample, IMAGE)), decode(self.member(k, sample, TEXT))


def decode(data: bytes | None) -> np.ndarray | None:
    try:
        return None if data is None else read_npy(data)
    except ValueError:
        return None


def choose(loader: str) -> str:
    """The back end for `auto`, `dali` or `webdataset`.

    Raises:
        ValueError: it is not installed.
    """
    there = {"dali": installed("nvidia.dali"), "webdataset": installed("webdataset")}
    if loader == "auto":
        loader = "dali" if there["dali"] else "webdataset"
    if loader not in there:
        raise ValueError(f"loader {loader!r}; there are: auto, dali, webdataset")
    if not there[loader]:
        raise ValueError(f"the loader {loader} is not installed: pip install anystate[pairs]")
    return loader


def installed(module: str) -> bool:
    """Whether a package, or one inside another such as nvidia.dali, is there."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def read_dali(shards: Shards, plan_shards: np.ndarray, plan_samples: np.ndarray, threads: int) -> Iterator[Batch]:
    """Batches of a plan, two arrays (batches, n).

    The order is told to DALI by index files of its own, one per run of samples from the same shard, which list the
    samples in the order of the plan. DALI stops at a sample it cannot decode: that batch is then read one by one and
    DALI starts again behind it.
    """
    start = 0
    while start < len(plan_shards):
        with tempfile.TemporaryDirectory(prefix="anystate-index-") as folder:  # DALI reads it when it is built
            pipe = _pipeline(shards, plan_shards[start:], plan_samples[start:], Path(folder), threads)
        while start < len(plan_shards):
            where = plan_shards[start], plan_samples[start]
            try:
                images, tokens = pipe.run()
            except RuntimeError:
                yield _one_by_one(shards, *where)
                start += 1
                break
            yield Batch(_arrays(images), _arrays(tokens), *where)
            start += 1
        del pipe


def _pipeline(shards: Shards, plan_shards: np.ndarray, plan_samples: np.ndarray, folder: Path, threads: int):
    from nvidia.dali import fn, pipeline_def

    flat_shards, flat_samples = plan_shards.ravel(), plan_samples.ravel()
    cuts = np.flatnonzero(np.diff(flat_shards)) + 1
    paths, indices = [], []
    for run in np.split(np.arange(len(flat_shards)), cuts):
        k = int(flat_shards[run[0]])
        lines = shards.index(k).lines
        path = folder / f"{len(paths)}.idx"
        path.write_text(index_text([lines[i] for i in flat_samples[run].tolist()]))
        paths.append(str(shards.path(k)))
        indices.append(str(path))

    @pipeline_def(batch_size=plan_shards.shape[1], num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def reading():
        images, tokens = fn.readers.webdataset(
            paths=paths, index_paths=indices, ext=[IMAGE, TEXT], missing_component_behavior="error"
        )
        return fn.decoders.numpy(images), fn.decoders.numpy(tokens)

    pipe = reading()
    pipe.build()
    return pipe


def _arrays(tensors) -> np.ndarray | list[np.ndarray]:
    """A batch of DALI as one array, or as a list where shapes differ; valid until the pipeline runs again."""
    if tensors.is_dense_tensor():
        return np.asarray(tensors.as_tensor())
    return [np.asarray(tensors.at(i)) for i in range(len(tensors))]


def _one_by_one(shards: Shards, plan_shards: np.ndarray, plan_samples: np.ndarray) -> Batch:
    read = [shards.read(k, i) for k, i in zip(plan_shards.tolist(), plan_samples.tolist(), strict=True)]
    return Batch([image for image, _ in read], [tokens for _, tokens in read], plan_shards, plan_samples)


def read_webdataset(shards: Shards, plan_shards: np.ndarray, plan_samples: np.ndarray, threads: int) -> Iterator[Batch]:
    """Batches of a plan, two arrays (batches, n). Each run of samples from one shard is one pass through its tar."""
    flat_shards, flat_samples = plan_shards.ravel(), plan_samples.ravel()
    n = plan_shards.shape[1]
    waiting: list[Arrays] = []
    done = 0
    for run in np.split(np.arange(len(flat_shards)), np.flatnonzero(np.diff(flat_shards)) + 1):
        waiting += _pass(shards, int(flat_shards[run[0]]), flat_samples[run])
        while len(waiting) >= n:
            images, tokens = zip(*waiting[:n], strict=True)
            del waiting[:n]
            yield Batch(list(images), list(tokens), plan_shards[done], plan_samples[done])
            done += 1


def _pass(shards: Shards, k: int, wanted: np.ndarray) -> list[Arrays]:
    """Samples `wanted` of a shard in that order."""
    import webdataset

    shards.index(k)
    needed, found = set(wanted.tolist()), {}
    reader = webdataset.WebDataset(
        str(shards.path(k)), shardshuffle=False, nodesplitter=_whole, workersplitter=_whole, empty_check=False
    )
    for i, sample in enumerate(reader):
        if i in needed:
            found[i] = decode(sample.get(IMAGE)), decode(sample.get(TEXT))
    return [found.get(i, (None, None)) for i in wanted.tolist()]


def _whole(urls):
    """Ranks and workers split the samples, not the shards: every one reads all urls it asks for."""
    return urls


READERS = {"dali": read_dali, "webdataset": read_webdataset}
