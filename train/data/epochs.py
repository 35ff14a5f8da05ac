"""The order of the samples: a function of (seed, step) alone, so that a resumed run continues with the same data."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


def batch_rows(n: int, seed: int, step: int, rows: range, size: int) -> Tensor:
    """Indices, below n, of rows `rows` of batch number `step` of `size`.

    Sampling is without replacement within an epoch, and each epoch has a new order; a batch may span epochs.
    """
    order = torch.arange(rows.start, rows.stop) + step * size
    epochs = order // n
    index = torch.empty_like(order)
    for epoch in epochs.unique().tolist():
        in_epoch = epochs == epoch
        index[in_epoch] = _permutation(n, seed, epoch)[order[in_epoch] % n]
    return index


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


def shard_rows(counts: tuple[int, ...], seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard and sample within it for each position of an endless stream over shards of `counts` samples.

    Position p belongs to epoch p // n, n samples in all. Every epoch visits the shards in a new order and the samples
    of each shard in a new order; shards are read one after the other.
    """
    positions = np.asarray(positions)
    n = sum(counts)
    shards, samples = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
    epochs = positions // n
    for epoch in np.unique(epochs).tolist():
        order, starts = _shard_order(counts, seed, epoch)
        in_epoch = np.flatnonzero(epochs == epoch)
        slots = np.searchsorted(starts, positions[in_epoch] % n, "right") - 1
        for slot in np.unique(slots).tolist():
            in_shard = in_epoch[slots == slot]
            shard = int(order[slot])
            shards[in_shard] = shard
            offsets = positions[in_shard] % n - starts[slot]
            samples[in_shard] = _sample_order(counts[shard], seed, epoch, shard)[offsets]
    return shards, samples


@functools.lru_cache(maxsize=4)
def _shard_order(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of the shards in an epoch, and the position in the epoch at which each starts."""
    order = _generator(seed, epoch, 0).permutation(len(counts))
    return order, np.cumsum([0, *np.array(counts)[order][:-1]])


@functools.lru_cache(maxsize=8)
def _sample_order(n: int, seed: int, epoch: int, shard: int) -> np.ndarray:
    return _generator(seed, epoch, 1 + shard).permutation(n)


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, epoch, stream])
