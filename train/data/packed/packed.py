"""Batches of a packed data set, prefetched in the background; each is a function of (seed, step, rows, size) alone."""

from __future__ import annotations

import atexit
import collections
import json
import os
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .... import kernels
from ....configs.config import Config, Image, Text
from ....configs.locate import locate, not_found
from ....kernels import Draw, Rng
from ....kernels.philox import MASK32
from ....kernels.reference import words_to_index
from ....model.codecs.characters import CharCodec
from ....model.codecs.subwords import TokenizerCodec, open_tokenizer
from ..epochs import shard_rows
from ..pairs import Pairs
from .prefetch import Batches, Prefetcher
from .readers import READERS, Batch, Shards, choose
from .repair import Repair
from .shards import LABELS, Manifest

MAX_PLAN_SAMPLES = 1 << 16  # samples of one plan, for which one reader is made
MAX_PLAN_SHARDS = 96
MAX_PREFETCHERS = 8  # parts of a batch that are prefetched at the same time, for example by gradient accumulation


class Packed:
    """One split of a packed data set, with the interface of `Pairs`.

    Batch `step` of `size` holds positions step·size … of an endless stream that is reshuffled each epoch (see
    `epochs.shard_rows`). The random choices of a sample (its latent, its caption, whether it is mirrored) are keyed by
    (seed, position), so batches do not depend on the loader, on the number of ranks or on where a run was resumed.
    Consecutive steps with the same rows are prefetched; any other access starts a new reader.

    Args:
        names: names of the image and the text modality.
        loader: dali, webdataset, or auto: DALI where it is installed.
        flip: mirror half of the images; not for latents.
        bad_share: reading stops with an error when a larger share of the samples is unreadable; one is always allowed
            unless it is 0.
        log: file that gets one JSON line per unreadable sample.
        checksums: compare each shard's SHA-256 when it is first opened.

    Raises:
        ValueError: not a packed data set, no such split, or the loader is not installed.
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
            raise ValueError("data.flip: latents of a mirrored image are not mirrored latents; flip works on pixels")
        self.shards = Shards(self.manifest, split, checksums)
        self.counts = self.shards.counts
        if not len(self):
            raise ValueError(f"{folder}: its split {split!r} is empty")
        self.repair = Repair(self.shards, self.manifest, bad_share, log)
        self.prefetchers: collections.OrderedDict[tuple, Prefetcher] = collections.OrderedDict()
        _OPEN.add(self)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def bad(self) -> list[dict]:
        """The unreadable samples found so far, with the reasons."""
        return list(self.repair.bad.values())

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size`: float32 (n, C, S, S) and int64 (n, L).

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

    def pairs(self, limit: int | None = None) -> Pairs:
        """The first `limit` samples in memory, in the order of the shards, without unusable ones.

        Latents are their means. `texts` holds all captions of each sample, `meta` its labels, `source` among them.
        """
        locations = [(k, i) for k, count in enumerate(self.counts) for i in range(count)][:limit]
        images, tokens, labels = [], [], []
        for k, i in locations:
            image, text = self.shards.read(k, i)
            if not self.repair.is_usable(k, i, image, text):
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
        """The batch of tensors from stored arrays: caption drawn, image scaled and, with `flip`, mirrored."""
        images, tokens = self.repair(batch)
        keys = Rng(seed, torch.from_numpy(position & MASK32)).keys("data", Draw.DATA)
        keys[:, 3] = torch.from_numpy(position >> 32)
        words = kernels.reference.random_words(keys, 2)
        x = self._scaled(images, noise_seeds(seed, position))
        if self.flip:
            mirrored = words[:, 1] >= 2**31
            x[mirrored] = x[mirrored].flip(-1)
        image, text = self.names
        finished = {image: x, text: torch.from_numpy(_choose_caption(tokens, words[:, 0]))}
        if torch.cuda.is_available():  # pinned memory lets the copy to the GPU run asynchronously
            finished = {name: value.pin_memory() for name, value in finished.items()}
        return finished

    def _scaled(self, images: np.ndarray, seeds: list[int] | None) -> Tensor:
        """Stored images as diffused: pixels in [−1, 1]; latents scale·(mean + std·ε), with ε = 0 without seeds."""
        about = self.manifest.image
        if about["kind"] == "pixels":
            x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            return x.mul_(2.0 / about["pixel_max"]).sub_(1.0)
        mean, std = torch.from_numpy(images).unflatten(1, (2, -1)).unbind(1)
        if seeds is None:
            return mean.float() * about["scale"]
        return torch.addcmul(mean.float(), noise(seeds, mean.shape[1:]), std.float()).mul_(about["scale"])


def _choose_caption(tokens: np.ndarray | list[np.ndarray], words: Tensor) -> np.ndarray:
    """int64 (n, L): one caption of each sample's (M, L), chosen by a random 32-bit word per sample."""
    if isinstance(tokens, np.ndarray):
        choice = words_to_index(words, tokens.shape[1]).numpy()
        return tokens[np.arange(len(tokens)), choice].astype(np.int64)
    chosen = [t[int(words_to_index(word, len(t)))] for t, word in zip(tokens, words, strict=True)]
    return np.asarray(chosen, np.int64)


def load_packed(
    config: Config, names: tuple[str, str], codec: TokenizerCodec | CharCodec, log: Path | None = None
) -> tuple[Packed, Pairs]:
    """The training part and the held-out pairs (the first `data.held_out`) of the packed data set of a config.

    Args:
        codec: of the text modality.
        log: file for unusable samples.

    Raises:
        ValueError: no such data set, it has no held-out part, or it does not match the config.
    """
    data = config.data
    folder = locate(data.path or "")
    if data.path is None or folder is None:
        raise ValueError(not_found("packed data set", data.path or "data.path: null"))
    manifest = Manifest.load(folder)
    if "test" not in manifest.splits:
        raise ValueError(f"{folder} has no split 'test' for evaluation; pack it with --test-share")
    image, text = (config.modalities[name] for name in names)
    _check_match(manifest, manifest.image, _image_section(image), names[0])
    _check_match(manifest, manifest.text, _text_section(text), names[1])
    if text.tokenizer and codec.json() != open_tokenizer(manifest.folder / manifest.text["file"]).to_str():
        raise ValueError(f"{text.tokenizer.path} is not the tokenizer that {manifest.folder} was packed with")
    train = Packed(folder, "train", names, data.loader, data.flip, data.bad_share, log)
    test = Packed(folder, "test", names, data.loader, data.flip, data.bad_share, log)
    return train, test.pairs(data.held_out)


def _image_section(image: Image) -> dict:
    """The required entries of `dataset.yaml` for an image modality of a config."""
    section = {"kind": "latents" if image.latents else "pixels", "channels": image.channels, "size": image.size}
    if image.latents:
        section["scale"] = image.latents.scale
    else:
        section["pixel_max"] = image.pixel_max
    return section


def _text_section(text: Text) -> dict:
    """The required entries of `dataset.yaml` for a text modality of a config."""
    section = {"length": text.length, "states": text.states, "pad": text.pad}
    if text.tokenizer is None:
        section["alphabet"] = text.alphabet
    else:
        section.update(kind=text.tokenizer.kind, start=text.tokenizer.start, end=text.tokenizer.end)
    return section


def _check_match(manifest: Manifest, packed: dict, expected: dict, name: str) -> None:
    for key, value in expected.items():
        if packed.get(key) != value:
            raise ValueError(
                f"{manifest.folder} was packed with {key} = {packed.get(key)!r}, "
                f"the config has {value!r} for {name!r}; anystate data check {manifest.folder} prints matching settings"
            )


def noise_seeds(seed: int, positions: np.ndarray) -> list[int]:
    """32-bit seeds, distinct for 2³² consecutive positions.

    The finalizer of MurmurHash3, a permutation of the 32-bit words, applied to position + hash of the seed.
    """
    mask = np.uint64(MASK32)
    words = (positions.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 >> 16 & MASK32)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ words >> np.uint64(shift)) * np.uint64(factor) & mask
    return (words ^ words >> np.uint64(16)).tolist()


def noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """float32 standard normals (len(seeds), *shape); row i is a function of seeds[i] alone."""
    out, generator = torch.empty(len(seeds), *shape), torch.Generator()
    for row, seed in zip(out, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return out


_OPEN: weakref.WeakSet[Packed] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop the reading threads before the interpreter exits: DALI crashes otherwise."""
    for packed in list(_OPEN):
        packed.close()
