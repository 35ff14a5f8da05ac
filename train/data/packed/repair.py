"""Unusable samples of packed shards: found, counted, named in a log, and replaced."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import numpy as np

from .readers import Batch, Shards
from .shards import Manifest

LOG = logging.getLogger("anystate.data")


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
            and (not self.latents or _finite(images))
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


def _finite(values: np.ndarray) -> bool:
    """Whether fp16 values are all finite: no exponent is all ones."""
    return not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()


def _dense(arrays: np.ndarray | list) -> np.ndarray | list:
    """One array of arrays that all are there and have one shape and type; anything else as it is."""
    if isinstance(arrays, np.ndarray) or any(a is None for a in arrays):
        return arrays
    return np.stack(arrays) if len({(a.shape, a.dtype) for a in arrays}) == 1 else arrays


def allowed(share: float, samples: int) -> int:
    """How many bad samples a share allows: one at least, unless the share is 0."""
    return 0 if share == 0 else max(1, int(share * samples))
