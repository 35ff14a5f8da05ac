"""Unusable samples of packed shards: detected, counted, logged and replaced."""

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
    """Detects samples that cannot be used, logs them, and replaces each by the next good sample of its shard.

    Safe to call from several reading threads.

    Args:
        share: the largest accepted share of unusable samples.
        log: file that gets one JSON line per unusable sample.
    """

    def __init__(self, shards: Shards, manifest: Manifest, share: float, log: Path | None):
        image, text = manifest.image, manifest.text
        c, s = image["channels"], image["size"]
        self.latents = image["kind"] == "latents"
        self.shape, self.dtype = ((2 * c, s, s), np.float16) if self.latents else ((s, s, c), np.uint8)
        self.length, self.states = text["length"], text["states"]
        self.shards, self.log, self.lock = shards, log, threading.Lock()
        self.share, self.max_bad = share, max_bad_samples(share, sum(shards.counts))
        self.bad: dict[tuple[int, int], dict] = {}
        self.replacements: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, batch: Batch) -> tuple[np.ndarray, np.ndarray | list[np.ndarray]]:
        """Images (n, …) and tokens ((n, M, L), or a list of (M, L)) of a batch with all bad samples replaced."""
        images, tokens = _stack_if_uniform(batch.images), _stack_if_uniform(batch.tokens)
        if isinstance(images, np.ndarray) and isinstance(tokens, np.ndarray) and self._all_good(images, tokens):
            return images, tokens
        images, tokens = list(images), list(tokens)
        for row, (k, i) in enumerate(zip(batch.shards.tolist(), batch.samples.tolist(), strict=True)):
            reason = self.problem(images[row], tokens[row])
            if reason is not None:
                images[row], tokens[row] = self._replace(k, i, reason)
        return np.stack(images), _stack_if_uniform(tokens)

    def _all_good(self, images: np.ndarray, tokens: np.ndarray) -> bool:
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
            and (not self.latents or _all_finite(images))
        )

    def problem(self, image: np.ndarray | None, tokens: np.ndarray | None) -> str | None:
        """The fault of a sample, or None."""
        if image is None or tokens is None:
            return f"its {'image' if image is None else 'tokens'} cannot be read"
        if image.shape != self.shape or image.dtype != self.dtype:
            expected = f"{self.shape} {np.dtype(self.dtype)}"
            return f"its image has shape {image.shape} {image.dtype}, the data set declares {expected}"
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] != self.length or tokens.dtype.kind not in "iu":
            return (
                f"its tokens have shape {tokens.shape} {tokens.dtype}, the data set declares (captions, {self.length})"
            )
        if tokens.min() < 0 or tokens.max() >= self.states:
            worst = tokens.max() if tokens.max() >= self.states else tokens.min()
            return f"token {worst} is beyond the vocabulary of {self.states}"
        return None if self._all_good(image[None], tokens[None]) else "its latents are not finite"

    def is_usable(self, k: int, i: int, image: np.ndarray | None, tokens: np.ndarray | None) -> bool:
        """Whether a sample is good; a bad one is counted."""
        reason = self.problem(image, tokens)
        if reason is not None:
            with self.lock:
                self._count(k, i, reason)
        return reason is None

    def replace_known_bad(self, shards: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A plan in which the samples already found to be bad are replaced."""
        shards, samples = shards.copy(), samples.copy()
        for (k, i), (other_k, other_i) in list(self.replacements.items()):
            hit = (shards == k) & (samples == i)
            shards[hit], samples[hit] = other_k, other_i
        return shards, samples

    def _replace(self, k: int, i: int, reason: str) -> tuple[np.ndarray, np.ndarray]:
        """Count a bad sample and return the next good one of the same shard."""
        with self.lock:
            self._count(k, i, reason)
            total = self.shards.counts[k]
            for step in range(1, total):
                j = (i + step) % total
                image, tokens = self.shards.read(k, j)
                reason = self.problem(image, tokens)
                if reason is None:
                    self.replacements[k, i] = k, j
                    return image, tokens
                self._count(k, j, reason)
            raise ValueError(f"{self.shards.path(k)}: none of its samples is usable ({reason})")

    def _count(self, k: int, i: int, reason: str) -> None:
        """Record a bad sample.

        Raises:
            ValueError: more bad samples than accepted.
        """
        if (k, i) in self.bad:
            return
        name = self.shards.name(k, i)
        self.bad[k, i] = {"sample": name, "reason": reason}
        LOG.warning("skipped %s: %s", name, reason)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.bad[k, i], ensure_ascii=False) + "\n")
        if len(self.bad) > self.max_bad:
            raise ValueError(
                f"{len(self.bad)} unusable samples, more than data.bad_share = {self.share:g} allows; "
                f"the last is {name}: {reason}"
            )


def _all_finite(values: np.ndarray) -> bool:
    """Whether all fp16 values are finite, that is, no exponent is all ones."""
    return not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()


def _stack_if_uniform(arrays: np.ndarray | list) -> np.ndarray | list:
    """One array where no entry is None and all have the same shape and type; otherwise the input."""
    if isinstance(arrays, np.ndarray) or any(a is None for a in arrays):
        return arrays
    return np.stack(arrays) if len({(a.shape, a.dtype) for a in arrays}) == 1 else arrays


def max_bad_samples(share: float, samples: int) -> int:
    """The number of bad samples that a share allows: at least one, unless the share is 0."""
    return 0 if share == 0 else max(1, int(share * samples))
