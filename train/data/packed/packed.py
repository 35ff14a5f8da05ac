"""Batches of a packed data set: each a function of (seed, step, rows, size) alone, read ahead in the background."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import json
import os
import queue
import threading
import weakref
from collections.abc import Iterator
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
from ....model.codecs.subwords import open_tokenizer
from ..epochs import shard_rows
from ..pairs import Pairs
from .readers import READERS, Batch, Shards, choose
from .repair import Repair
from .shards import LABELS, Manifest

HORIZON = 1 << 16  # samples a reader is planned for at a time
RUNS = 96  # and shards
AHEAD = 4  # batches made before they are asked for
STREAMS = 8  # parts of a batch that are read ahead side by side


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
        steps = max(1, min(HORIZON // len(rows), RUNS * max(self.counts) // size))
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
        x = self._scaled(images, noise_seeds(seed, position))
        if self.flip:
            mirrored = words[:, 1] >= 2**31
            x[mirrored] = x[mirrored].flip(-1)
        image, caption = self.names
        made = {image: x, caption: torch.from_numpy(np.asarray(text, np.int64))}
        if torch.cuda.is_available():  # so that the copy to the GPU need not wait
            made = {name: value.pin_memory() for name, value in made.items()}
        return made

    def _scaled(self, images: np.ndarray, seeds: list[int] | None) -> Tensor:
        """Stored images as what is diffused: pixels in [−1, 1]; latents scale·(mean + std·ε), of no seeds ε = 0."""
        about = self.manifest.image
        if about["kind"] == "pixels":
            x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            return x.mul_(2.0 / about["pixel_max"]).sub_(1.0)
        mean, std = torch.from_numpy(images).unflatten(1, (2, -1)).unbind(1)
        if seeds is None:
            return mean.float() * about["scale"]
        return torch.addcmul(mean.float(), noise(seeds, mean.shape[1:]), std.float()).mul_(about["scale"])


def load_packed(config: Config, names: tuple[str, str], codec, log: Path | None = None) -> tuple[Packed, Pairs]:
    """Training part and held-out pairs (the first `data.held_out`) of the packed data set a config names.

    codec: of the text modality. log: file for unusable samples.

    Raises:
        ValueError: no such data set, it has no held-out part, or what it holds is not what the config says.
    """
    data, (image, text) = config.data, (config.modalities[name] for name in names)
    folder = locate(data.path or "")
    if data.path is None or folder is None:
        raise ValueError(not_found("packed data set", data.path or "data.path: null"))
    parts = {}
    if "test" not in Manifest.load(folder).splits:
        raise ValueError(f"{folder} has no split 'test' to judge by; pack it with --test-share")
    for split in ("train", "test"):
        parts[split] = Packed(folder, split, names, data.loader, data.flip, data.bad_share, log)
    manifest = parts["train"].manifest
    said = {"kind": "latents" if image.latents else "pixels", "channels": image.channels, "size": image.size}
    said |= {"scale": image.latents.scale} if image.latents else {"pixel_max": image.pixel_max}
    _agree(manifest, manifest.image, said, names[0])
    said = {"length": text.length, "states": text.states, "pad": text.pad}
    if text.tokenizer is None:
        said |= {"alphabet": text.alphabet}
    else:
        said |= {"kind": text.tokenizer.kind, "start": text.tokenizer.start, "end": text.tokenizer.end}
    _agree(manifest, manifest.text, said, names[1])
    if text.tokenizer and codec.json() != open_tokenizer(manifest.folder / manifest.text["file"]).to_str():
        raise ValueError(f"{text.tokenizer.path} is not the tokenizer that {manifest.folder} was packed with")
    return parts["train"], parts["test"].pairs(data.held_out)


def _agree(manifest: Manifest, packed: dict, said: dict, name: str) -> None:
    for key, value in said.items():
        if packed.get(key) != value:
            raise ValueError(
                f"{manifest.folder} was packed with {key} = {packed.get(key)!r}, "
                f"the config says {value!r} for {name!r}; anystate data check {manifest.folder} prints what fits"
            )


def noise_seeds(seed: int, positions: np.ndarray) -> list[int]:
    """32-bit seeds, a different one for each of 2³² consecutive positions: the finalizer of MurmurHash3, which permutes
    the 32-bit words, of position + hash of the seed."""
    mask = np.uint64(MASK32)
    words = (positions.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 >> 16 & MASK32)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ words >> np.uint64(shift)) * np.uint64(factor) & mask
    return (words ^ words >> np.uint64(16)).tolist()


def noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """float32 standard normals (len(seeds), *shape), row i a function of seeds[i] alone."""
    out, generator = torch.empty(len(seeds), *shape), torch.Generator()
    for row, seed in zip(out, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return out


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
