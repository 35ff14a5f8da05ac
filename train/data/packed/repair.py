"""Unusable samples of packed shards: detected, counted, logged and replaced."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import numpy as np

from .readers import Arrays, Batch, Sample, Shards

LOG = logging.getLogger("anystate.data")


class Repair:
    """Detects samples that cannot be used, logs them, and replaces each by the next good sample of its shard.

    Safe to call from several reading threads.

    Args:
        share: the largest accepted share of unusable samples.
        log: file that gets one JSON line per unusable sample.
    """

    def __init__(self, shards: Shards, share: float, log: Path | None):
        self.shards, self.log, self.lock = shards, log, threading.Lock()
        self.modalities = list(shards.manifest.modalities.values())
        self.share, self.max_bad = share, max_bad_samples(share, sum(shards.counts))
        self.bad: dict[tuple[int, int], dict] = {}
        self.replacements: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, batch: Batch) -> Arrays:
        """{name: (n, …), or a list of n arrays that differ in shape} of a batch with all bad samples replaced."""
        arrays = {name: _stack_if_uniform(values) for name, values in batch.arrays.items()}
        if all(isinstance(x, np.ndarray) for x in arrays.values()) and self.problem(arrays, batch=True) is None:
            return arrays
        rows = [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)]
        for i, where in enumerate(zip(batch.shards.tolist(), batch.samples.tolist(), strict=True)):
            if (reason := self.problem(rows[i])) is not None:
                rows[i] = self._replace(*where, reason)
        return {name: _stack_if_uniform([row[name] for row in rows]) for name in arrays}

    def problem(self, arrays: Sample, batch: bool = False) -> str | None:
        """The fault of a sample, or of a batch of samples, or None."""
        reasons = (modality.problem(arrays, self.shards.split, batch) for modality in self.modalities)
        return next((reason for reason in reasons if reason is not None), None)

    def is_usable(self, k: int, i: int, sample: Sample) -> bool:
        """Whether a sample is good; a bad one is counted."""
        reason = self.problem(sample)
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

    def _replace(self, k: int, i: int, reason: str) -> Sample:
        """Count a bad sample and return the next good one of the same shard."""
        with self.lock:
            self._count(k, i, reason)
            total = self.shards.counts[k]
            for step in range(1, total):
                j = (i + step) % total
                sample = self.shards.read(k, j)
                reason = self.problem(sample)
                if reason is None:
                    self.replacements[k, i] = k, j
                    return sample
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


def _stack_if_uniform(arrays: np.ndarray | list) -> np.ndarray | list:
    """One array where no entry is None and all have the same shape and type; otherwise the input."""
    if isinstance(arrays, np.ndarray) or any(a is None for a in arrays):
        return arrays
    return np.stack(arrays) if len({(a.shape, a.dtype) for a in arrays}) == 1 else arrays


def max_bad_samples(share: float, samples: int) -> int:
    """The number of bad samples that a share allows: at least one, unless the share is 0."""
    return 0 if share == 0 else max(1, int(share * samples))
