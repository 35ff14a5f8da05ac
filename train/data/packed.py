"""Batches of a packed data set: each a function of (seed, step, rows, size) alone, read ahead in the background."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import json
import logging
import os
import queue
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, Rng
from ...kernels.philox import MASK32
from ...kernels.reference import words_to_index
from .epochs import shard_rows
from .pairs import Pairs
from .readers import READERS, Batch, Shards, choose
from .shards import LABELS, Manifest

HORIZON = 1 << 16  # samples a reader is planned for at a time
RUNS = 96  # and shards
AHEAD = 4  # batches made before they are asked for
STREAMS = 8  # parts of a batch that are read ahead side by side
LOG = logging.getLogger("anystate.data")


class Packed:
    """One split of a packed data set, with the interface of `Pairs`.

    Batch `step` of `size` holds positions step·size … of an endless stream that reshuffles each epoch (see
    `epochs.shard_rows`). What is random in a sample, its latent, which of its captions, whether it is mirrored, is
    keyed by (seed, position), so the batch is the same for every loader, number of ranks and point of resuming. Asking
    for consecutive steps with the same rows is quick, anything else starts reading anew.

    Args:
        names: modality names of picture and text.
        loader: dali, webdataset, or auto: DALI where it is installed.
        flip: mirror half of the pictures; not for latents.
        bad_share: when a larger share of the samples turns out unreadable, reading stops; one never stops it.
        log: file that gets one JSON line per unreadable sample.
        checksums: compare each shard's SHA-256 when it is first opened.

    Raises:
        ValueError: no packed data set there, no such split, or the loader is not installed.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str = "train",
        names: tuple[str, str] = ("image", "text"),
        loader: str = "auto",
        flip: bool = False,
        bad_share: float = 0.01,
        log: Path | None = None,
        checksums: bool = True,
    ):
        self.manifest = Manifest.load(folder)
        self.names, self.loader, self.flip = names, choose(loader), flip
        if flip and self.manifest.image["kind"] == "latents":
            raise ValueError("data.flip: latents of a mirrored picture are not mirrored latents; flip works on pixels")
        self.shards = Shards(self.manifest, split, checksums)
        self.counts = self.shards.counts
        if not len(self):
            raise ValueError(f"{folder}: its split {split!r} is empty")
        self.repair = Repair(self.shards, self.manifest, bad_share, log)
        self.streams: collections.OrderedDict[tuple, Stream] = collections.OrderedDict()
        _OPEN.add(self)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def bad(self) -> list[dict]:
        """The samples that could not be read so far, with the reason."""
        return list(self.repair.bad.values())

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size`: float32 (n, C, S, S) and int64 (n, L).

        Raises:
            ValueError: too many samples are unreadable, or a shard is cut off, changed or missing; names the file.
        """
        key = (seed, rows.start, rows.stop, size)
        stream = self.streams.get(key)
        if stream is None or stream.next != step:
            if stream is not None:
                stream.close()
            while len(self.streams) >= STREAMS:
                self.streams.popitem(last=False)[1].close()
            self.streams[key] = stream = Stream(lambda: self._batches(seed, step, rows, size), step)
        self.streams.move_to_end(key)
        return stream.get()

    def pairs(self, limit: int | None = None) -> Pairs:
        """The first `limit` samples in memory, in the order of the shards, unusable ones left out.

        Of latents the means. texts are all captions of a sample, meta its labels, `source` among them.
        """
        where = [(k, i) for k, count in enumerate(self.counts) for i in range(count)][:limit]
        images, tokens, labels = [], [], []
        for k, i in where:
            image, text = self.shards.read(k, i)
            if not self.repair.usable(k, i, image, text):
                continue
            images.append(image)
            tokens.append(text)
            labels.append(json.loads(self.shards.member(k, i, LABELS)))
        most = max(len(t) for t in tokens)
        captions = torch.from_numpy(np.stack([np.resize(t, (most, t.shape[1])) for t in tokens]).astype(np.int64))
        texts = [sample.pop("captions") for sample in labels]
        fields = dict.fromkeys(field for sample in labels for field in sample)
        meta = {field: np.array([sample.get(field, "") for sample in labels]) for field in fields}
        return Pairs(self._scaled(np.stack(images), None), captions, names=self.names, texts=texts, meta=meta)

    def close(self) -> None:
        """Stop reading ahead."""
        while self.streams:
            self.streams.popitem()[1].close()

    def _batches(self, seed: int, step: int, rows: range, size: int) -> Iterator[dict[str, Tensor]]:
        """Batches step, step + 1, … without end."""
        threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        while True:
            shards, samples = self._plan(seed, step, rows, size)
            shards, samples = self.repair.without_bad(shards, samples)
            for batch in READERS[self.loader](self.shards, shards, samples, threads):
                position = step * size + np.arange(rows.start, rows.stop)
                yield self._made(batch, seed, position)
                step += 1

    def _plan(self, seed: int, step: int, rows: range, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and samples (steps, n) of the next steps, as many as one reader is made for."""
        steps = max(1, HORIZON // max(1, len(rows)), 1)
        steps = max(1, min(steps, RUNS * max(self.counts) // size))
        positions = (step + np.arange(steps))[:, None] * size + np.arange(rows.start, rows.stop)
        found = shard_rows(self.counts, seed, positions.ravel())
        return tuple(part.reshape(positions.shape) for part in found)

    def _made(self, batch: Batch, seed: int, position: np.ndarray) -> dict[str, Tensor]:
        images, tokens = self.repair(batch)
        keys = Rng(seed, torch.from_numpy(position & MASK32)).keys("data", Draw.DATA)
        keys[:, 3] = torch.from_numpy(position >> 32)
        words = kernels.reference.random_words(keys, 2)
        if isinstance(tokens, np.ndarray):
            choice = words_to_index(words[:, 0], tokens.shape[1]).numpy()
            text = tokens[np.arange(len(tokens)), choice]
        else:
            text = [t[int(words_to_index(w, len(t)))] for t, w in zip(tokens, words[:, 0], strict=True)]
        x = self._scaled(images, [_noise_seed(seed, p) for p in position.tolist()])
        if self.flip:
            mirrored = words[:, 1] >= 2**31
            x[mirrored] = x[mirrored].flip(-1)
        image, caption = self.names
        return {image: x, caption: torch.from_numpy(np.asarray(text, np.int64))}

    def _scaled(self, images: np.ndarray, seeds: list[int] | None) -> Tensor:
        """Stored images as what is diffused: pixels in [−1, 1]; latents scale·(mean + std·ε), of no seeds ε = 0."""
        about = self.manifest.image
        if about["kind"] == "pixels":
            x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            return x.mul_(2.0 / about["pixel_max"]).sub_(1.0)
        mean, std = torch.from_numpy(images).unflatten(1, (2, -1)).unbind(1)
        if seeds is None:
            return mean.float() * about["scale"]
        return noise(seeds, mean.shape[1:]).mul_(std).add_(mean).mul_(about["scale"])


def _noise_seed(seed: int, position: int) -> int:
    """32 bits, a different one for each of 2³² consecutive positions: the finalizer of MurmurHash3, which permutes the
    32-bit words, of position + hash of the seed."""
    word = position + (seed * 0x9E3779B97F4A7C15 >> 16) & MASK32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ word >> shift) * factor & MASK32
    return word ^ word >> 16


def noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """float32 standard normals (len(seeds), *shape), row i a function of seeds[i] alone."""
    out, generator = torch.empty(len(seeds), *shape), torch.Generator()
    for row, seed in zip(out, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return out


class Repair:
    """Finds samples that cannot be used, counts and logs them, and puts the next good one of the shard in their place.

    Called from one or several reading threads.
    """

    def __init__(self, shards: Shards, manifest: Manifest, share: float, log: Path | None):
        image, text = manifest.image, manifest.text
        c, s = image["channels"], image["size"]
        self.latents = image["kind"] == "latents"
        self.shape, self.dtype = ((2 * c, s, s), np.float16) if self.latents else ((s, s, c), np.uint8)
        self.length, self.states = text["length"], text["states"]
        self.shards, self.log, self.lock = shards, log, threading.Lock()
        self.allowed = allowed(share, sum(shards.counts))
        self.share = share
        self.bad: dict[tuple[int, int], dict] = {}
        self.instead: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, batch: Batch) -> tuple[np.ndarray, np.ndarray | list[np.ndarray]]:
        """Images (n, …) and tokens ((n, M, L), or a list of (M, L)), every one of them good."""
        images, tokens = _dense(batch.images), _dense(batch.tokens)
        if isinstance(images, np.ndarray) and isinstance(tokens, np.ndarray) and self._good(images, tokens):
            return images, tokens
        images, tokens = list(images), list(tokens)
        for row, where in enumerate(zip(batch.shards.tolist(), batch.samples.tolist(), strict=True)):
            if (reason := self.problem(images[row], tokens[row])) is not None:
                images[row], tokens[row] = self._replace(*where, reason)
        return np.stack(images), _dense(tokens)

    def _good(self, images: np.ndarray, tokens: np.ndarray) -> bool:
        """Whether arrays (n, …) and (n, M, L) have the right shapes, types and values."""
        return (
            images.shape[1:] == self.shape
            and images.dtype == self.dtype
            and tokens.ndim == 3
            and tokens.shape[-1] == self.length
            and tokens.size > 0
            and tokens.dtype.kind in "iu"
            and tokens.min() >= 0
            and tokens.max() < self.states
            and (not self.latents or bool(np.isfinite(images.sum(dtype=np.float32))))
        )

    def problem(self, image: np.ndarray | None, tokens: np.ndarray | None) -> str | None:
        """What is wrong with a sample, or None."""
        if image is None or tokens is None:
            return f"its {'picture' if image is None else 'tokens'} cannot be read"
        if image.shape != self.shape or image.dtype != self.dtype:
            want = f"{self.shape} {np.dtype(self.dtype)}"
            return f"its picture has shape {image.shape} {image.dtype}, the data set says {want}"
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] != self.length or tokens.dtype.kind not in "iu":
            return f"its tokens have shape {tokens.shape} {tokens.dtype}, the data set says (captions, {self.length})"
        if tokens.min() < 0 or tokens.max() >= self.states:
            worst = tokens.max() if tokens.max() >= self.states else tokens.min()
            return f"token {worst} is beyond the vocabulary of {self.states}"
        return None if self._good(image[None], tokens[None]) else "its latents are not finite"

    def usable(self, k: int, i: int, image: np.ndarray | None, tokens: np.ndarray | None) -> bool:
        """Whether a sample is good; a bad one is counted."""
        reason = self.problem(image, tokens)
        if reason is not None:
            with self.lock:
                self._count(k, i, reason)
        return reason is None

    def without_bad(self, shards: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A plan with the samples known to be bad replaced beforehand."""
        shards, samples = shards.copy(), samples.copy()
        for (k, i), (other, j) in list(self.instead.items()):
            hit = (shards == k) & (samples == i)
            shards[hit], samples[hit] = other, j
        return shards, samples

    def _replace(self, k: int, i: int, reason: str) -> tuple[np.ndarray, np.ndarray]:
        """The next good sample of the same shard; the bad one is counted."""
        with self.lock:
            self._count(k, i, reason)
            total = self.shards.counts[k]
            for j in ((i + step) % total for step in range(1, total)):
                image, tokens = self.shards.read(k, j)
                if (reason := self.problem(image, tokens)) is None:
                    self.instead[k, i] = k, j
                    return image, tokens
                self._count(k, j, reason)
            raise ValueError(f"{self.shards.path(k)}: not one of its samples is usable ({reason})")

    def _count(self, k: int, i: int, reason: str) -> None:
        if (k, i) in self.bad:
            return
        name = self.shards.name(k, i)
        self.bad[k, i] = {"sample": name, "reason": reason}
        LOG.warning("skipped %s: %s", name, reason)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.bad[k, i], ensure_ascii=False) + "\n")
        if len(self.bad) > self.allowed:
            raise ValueError(
                f"{len(self.bad)} unusable samples, more than data.bad_share = {self.share:g} allows; "
                f"the last is {name}: {reason}"
            )


def _dense(arrays: np.ndarray | list) -> np.ndarray | list:
    """One array of arrays that all are there and have one shape and type; anything else as it is."""
    if isinstance(arrays, np.ndarray) or any(a is None for a in arrays):
        return arrays
    return np.stack(arrays) if len({(a.shape, a.dtype) for a in arrays}) == 1 else arrays


def allowed(share: float, samples: int) -> int:
    """How many bad samples a share allows: one at least, unless the share is 0."""
    return 0 if share == 0 else max(1, int(share * samples))


@dataclasses.dataclass
class _Failure:
    error: BaseException


class Stream:
    """Runs an iterator of batches in a thread, a few ahead of the reader."""

    def __init__(self, make, first: int):
        self.next = first
        self.ready: queue.Queue = queue.Queue(AHEAD)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(make,), daemon=True, name="anystate-data")
        self.thread.start()

    def get(self) -> dict[str, Tensor]:
        batch = self.ready.get()
        if isinstance(batch, _Failure):
            self.next = -1  # asked again, the stream starts anew
            raise batch.error
        self.next += 1
        return batch

    def close(self) -> None:
        self.stopped.set()
        while self.thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                self.ready.get(timeout=0.01)
            self.thread.join(0.01)

    def _run(self, make) -> None:
        batches = make()
        try:
            while not self.stopped.is_set():
                self.ready.put(next(batches))
        except BaseException as error:
            self.ready.put(_Failure(error))
        finally:
            batches.close()


_OPEN: weakref.WeakSet[Packed] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Reading threads end before the interpreter does: DALI does not survive it."""
    for packed in list(_OPEN):
        packed.close()
