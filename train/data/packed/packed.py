"""Batches of a packed data set, prefetched in the background; each is a function of (seed, step, rows, size) alone."""

from __future__ import annotations

import atexit
import collections
import dataclasses
import json
import os
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .... import kernels
from ....configs.config import Config
from ....configs.locate import locate, not_found
from ....kernels import Draw, Rng
from ....kernels.philox import MASK32
from ....kernels.reference import words_to_index
from ....model.build import Codecs, Names, part_names
from ....model.codecs.base import Codec, Stored
from ..dataset import InMemory
from ..epochs import shard_rows
from ..examples import Examples, gap_stream, presence, spread
from .manifest import Manifest, PackedModality
from .match import match
from .prefetch import Batches, Prefetcher
from .readers import READERS, Arrays, Batch, Sample, Shards, choose
from .repair import Repair
from .shards import LABELS

MAX_PLAN_SAMPLES = 1 << 16  # samples of one plan, for which one reader is made
MAX_PLAN_SHARDS = 96
MAX_PREFETCHERS = 8  # parts of a batch that are prefetched at the same time, for example by gradient accumulation


class Packed:
    """One split of a packed data set, with the batches of `Examples`.

    Batch `step` of `size` holds positions step·size … of an endless stream that is reshuffled each epoch (see
    `epochs.shard_rows`). The random choices of a sample (its latent, its versions, whether it is mirrored) are keyed by
    (seed, position), so batches do not depend on the loader, on the number of ranks or on where a run was resumed.
    Consecutive steps with the same rows are prefetched; any other access starts a new reader.

    Args:
        source: the folder, or its description with the modalities that are wanted.
        codecs: {modality: the codec that restores it}.
        names: {modality: {part: name of its process}}; default as in the data set.
        loader: dali, webdataset, or auto: DALI where it is installed.
        flip: mirror half of the samples, in all modalities that can be mirrored; not latents.
        bad_share: reading stops with an error when a larger share of the samples is unreadable; one is always allowed
            unless it is 0.
        log: file that gets one JSON line per unreadable sample.
        checksums: compare each shard's SHA-256 when it is first opened.

    Raises:
        ValueError: not a packed data set, no such split, or the loader is not installed.
    """

    def __init__(
        self,
        source: Manifest | Path | str,
        codecs: Mapping[str, Codec],
        split: str = "train",
        names: Names | None = None,
        loader: str = "auto",
        flip: bool = False,
        bad_share: float = 0.01,
        log: Path | None = None,
        checksums: bool = True,
    ):
        self.manifest = source if isinstance(source, Manifest) else Manifest.load(source)
        self.codecs, self.loader, self.flip = codecs, choose(loader), flip
        self.names = names or {m: about.names for m, about in self.manifest.modalities.items()}
        if flip and not any(codecs[m].mirrored for m in self.manifest.modalities):
            raise ValueError("data.flip: latents of a mirrored image are not mirrored latents; flip works on pixels")
        self.shards = Shards(self.manifest, split, checksums)
        self.counts = self.shards.counts
        if not len(self):
            raise ValueError(f"{self.manifest.folder}: its split {split!r} is empty")
        self.repair = Repair(self.shards, bad_share, log)
        self.prefetchers: collections.OrderedDict[tuple, Prefetcher] = collections.OrderedDict()
        _OPEN.add(self)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def bad(self) -> list[dict]:
        """The unreadable samples found so far, with the reasons."""
        return list(self.repair.bad.values())

    @property
    def present_share(self) -> dict[str, float]:
        """{process: share of the samples that have it}, where samples lack one."""
        absent = {m: about.absent.get(self.shards.split, 0) for m, about in self.manifest.modalities.items()}
        return {k: 1.0 - n / len(self) for m, n in absent.items() if n for k in self.names[m].values()}

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size`, {process: (n, …)}: float32, or int64 tokens.

        A process that samples lack has a second entry, `presence(process)`, (n,) bool.

        Raises:
            ValueError: too many samples are unreadable, or a shard is truncated, changed or missing.
        """
        key = (seed, rows.start, rows.stop, size)
        prefetcher = self.prefetchers.get(key)
        if prefetcher is None or prefetcher.next_step != step:
            if prefetcher is not None:
                prefetcher.close()
            while len(self.prefetchers) >= MAX_PREFETCHERS:
                self.prefetchers.popitem(last=False)[1].close()
            prefetcher = Prefetcher(self._batches(seed, step, rows, size), step)
            self.prefetchers[key] = prefetcher
        self.prefetchers.move_to_end(key)
        return prefetcher.get()

    def examples(self, limit: int | None = None) -> Examples:
        """The first `limit` samples in memory, in the order of the shards, without unusable ones.

        Latents are their means. Annotations are those of the samples, `source` among them.

        Raises:
            ValueError: none has a modality.
        """
        samples, labels = self._read(limit)
        x, present, versions = {}, {}, {}
        for m, about in self.manifest.modalities.items():
            arrays = {part: [sample[name] for sample in samples] for part, name in about.names.items()}
            if not about.versions:
                arrays = {part: [value[None] for value in values] for part, values in arrays.items()}
            counts = torch.tensor([len(value) for value in next(iter(arrays.values()))])
            if not bool(counts.any()):
                raise ValueError(
                    f"{self.manifest.folder}: none of the {len(samples)} {self.shards.split} examples has {m}"
                )
            restored = self.codecs[m].restore({part: np.concatenate(values) for part, values in arrays.items()})
            for part, values in restored.items():
                x[self.names[m][part]] = spread(values, counts)
                if bool((counts == 0).any()):
                    present[self.names[m][part]] = counts > 0
            if int(counts.max()) > 1:
                versions[m] = counts.clamp(min=1)
        return Examples(x, self.names, present, versions, self._annotations(labels))

    def _read(self, limit: int | None) -> tuple[list[Sample], list[dict]]:
        """The arrays and the annotations of the usable ones of the first `limit` samples."""
        locations = [(k, i) for k, count in enumerate(self.counts) for i in range(count)][:limit]
        samples, labels = [], []
        for k, i in locations:
            sample = self.shards.read(k, i)
            if self.repair.is_usable(k, i, sample):
                samples.append(sample)
                labels.append(json.loads(self.shards.member(k, i, LABELS)))
        return samples, labels

    def _annotations(self, labels: list[dict]) -> InMemory:
        """The raw values that are stored with the samples, and the other annotations."""
        raw = {m: about.raw for m, about in self.manifest.modalities.items()}
        values = {m: [sample.get(field) for sample in labels] for m, field in raw.items()}
        fields = dict.fromkeys(field for sample in labels for field in sample if field not in raw.values())
        return InMemory(values, {field: np.array([sample.get(field, "") for sample in labels]) for field in fields})

    def close(self) -> None:
        """Stop prefetching."""
        while self.prefetchers:
            self.prefetchers.popitem()[1].close()

    def _batches(self, seed: int, step: int, rows: range, size: int) -> Batches:
        """Batches step, step + 1, …, an infinite iterator."""
        threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        while True:
            shards, samples = self._plan(seed, step, rows, size)
            shards, samples = self.repair.replace_known_bad(shards, samples)
            for batch in READERS[self.loader](self.shards, shards, samples, threads):
                position = step * size + np.arange(rows.start, rows.stop)
                yield self._finish(batch, seed, position)
                step += 1

    def _plan(self, seed: int, step: int, rows: range, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and samples, each (steps, n), of the next steps: one plan for a reader."""
        steps = max(1, min(MAX_PLAN_SAMPLES // len(rows), MAX_PLAN_SHARDS * max(self.counts) // size))
        positions = (step + np.arange(steps))[:, None] * size + np.arange(rows.start, rows.stop)
        shards, samples = shard_rows(self.counts, seed, positions.ravel())
        return shards.reshape(positions.shape), samples.reshape(positions.shape)

    def _finish(self, batch: Batch, seed: int, position: np.ndarray) -> dict[str, Tensor]:
        """The batch of tensors from stored arrays: a version of each drawn, restored and, with `flip`, mirrored."""
        arrays, finished = self.repair(batch), {}
        mirrored = _words("data", seed, position, 2)[:, 1] >= 2**31 if self.flip else None
        for m, about in self.manifest.modalities.items():
            stored = {part: arrays[name] for part, name in about.names.items()}
            if about.versions:
                words = _words(self._stream(m), seed, position, 1)[:, 0]
                stored, present = _choose_version(stored, about, words)
            values = self.codecs[m].restore(stored, self._seeds(m, seed, position))
            for part, x in values.items():
                name = self.names[m][part]
                if mirrored is not None and self.codecs[m].mirrored:
                    x[mirrored] = x[mirrored].flip(-1)
                if about.specs[part].gaps:
                    keys = _keys(gap_stream(name), seed, position)
                    x = torch.where(x.isnan(), kernels.normal(keys, x[0].numel()).view(x.shape), x)
                finished[name] = x
                if about.absent.get(self.shards.split):
                    finished[presence(name)] = present
        if torch.cuda.is_available():  # pinned memory lets the copy to the GPU run asynchronously
            finished = {name: value.pin_memory() for name, value in finished.items()}
        return finished

    def _stream(self, m: str) -> str:
        """The random stream that draws the versions of a modality: "data" for the first one with versions."""
        first = next(other for other, about in self.manifest.modalities.items() if about.versions)
        return "data" if m == first else f"data {m}"

    def _seeds(self, m: str, seed: int, position: np.ndarray) -> list[int] | None:
        """Seeds of the random numbers with which a modality is restored, if it needs any."""
        drawing = [other for other in self.manifest.modalities if self.codecs[other].draws]
        if m not in drawing:
            return None
        return noise_seeds(seed if m == drawing[0] else seed + zlib.crc32(m.encode()), position)


def _words(stream: str, seed: int, position: np.ndarray, n: int) -> Tensor:
    """(B, n) random 32-bit words of the samples at these positions."""
    return kernels.reference.random_words(_keys(stream, seed, position), n)


def _keys(stream: str, seed: int, position: np.ndarray) -> Tensor:
    keys = Rng(seed, torch.from_numpy(position & MASK32)).keys(stream, Draw.DATA)
    keys[:, 3] = torch.from_numpy(position >> 32)
    return keys


def _choose_version(stored: Arrays, about: PackedModality, words: Tensor) -> tuple[Stored, Tensor]:
    """One version of each sample, chosen by a random word: {part: (n, …)}, zeros where there is none; (n,) whether."""
    counts = torch.tensor([len(versions) for versions in next(iter(stored.values()))])
    choice, chosen = words_to_index(words, counts.clamp(min=1)).numpy(), {}
    for part, x in stored.items():
        if isinstance(x, np.ndarray) and x.shape[1]:
            chosen[part] = x[np.arange(len(x)), choice]
        else:
            none = np.zeros(about.specs[part].shape, about.specs[part].dtype)
            chosen[part] = np.stack([v[i] if len(v) else none for v, i in zip(x, choice, strict=True)])
    return chosen, counts > 0


def load_packed(config: Config, codecs: Codecs, log: Path | None = None) -> tuple[Packed, Examples]:
    """The training part and the held-out examples (the first `data.held_out`) of the packed data set of a config.

    Args:
        codecs: {modality: codec}; those that are not fitted are replaced by the ones that the data set was packed with.
        log: file for unusable samples.

    Raises:
        ValueError: no such data set, it has no held-out part, or it does not match the config.
    """
    data = config.data
    assert data is not None  # see `load.load_data`
    folder = locate(data.source)
    if folder is None:
        raise ValueError(not_found("packed data set", data.source))
    manifest = Manifest.load(folder)
    if "test" not in manifest.splits:
        raise ValueError(f"{folder} has no split 'test' for evaluation; pack it with --test-share")
    modalities = match(manifest, config, codecs)
    options = {"loader": data.loader, "flip": data.flip, "bad_share": data.bad_share, "log": log}
    manifest = dataclasses.replace(manifest, modalities=modalities)
    names = part_names(config, codecs)
    train, test = (Packed(manifest, codecs, split, names, **options) for split in ("train", "test"))
    return train, test.examples(data.held_out)


def noise_seeds(seed: int, positions: np.ndarray) -> list[int]:
    """32-bit seeds, distinct for 2³² consecutive positions.

    The finalizer of MurmurHash3, a permutation of the 32-bit words, applied to position + hash of the seed.
    """
    mask = np.uint64(MASK32)
    words = (positions.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 >> 16 & MASK32)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ words >> np.uint64(shift)) * np.uint64(factor) & mask
    return (words ^ words >> np.uint64(16)).tolist()


_OPEN: weakref.WeakSet[Packed] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop the reading threads before the interpreter exits: DALI crashes otherwise."""
    for packed in list(_OPEN):
        packed.close()
