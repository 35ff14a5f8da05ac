"""Counter-based random numbers: Philox-4x32-10 and the keys that address them.

Every random number of anystate is a pure function of (seed, sample index, modality, step, draw,
element), so a sample does not depend on the batch it was made in, and a kernel draws the same numbers
as its PyTorch twin.

Layout. An operation receives `keys`, an int64 tensor (B, 5) of unsigned 32-bit words, one row per sample:

    keys[:, 0:2]  the Philox key     seed, low and high word
    keys[:, 2]    counter word 1     sample index
    keys[:, 3]    counter word 2     step
    keys[:, 4]    counter word 3     modality hash (24 bits) | draw (6 bits) | sub-draw (2 bits)

Counter word 0 is the element: element e of a sample is word e % 4 of the block with counter e // 4.
The two lowest bits of word 3 are left free for an operation that needs several streams of its own.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import dataclasses
import enum
import zlib

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


class Draw(enum.IntEnum):
    """What a random number is for; one stream each."""

    TIME = 0
    NOISE = 1
    PRIOR = 2
    STEP = 3
    GUIDANCE = 4
    GIVEN = 5
    DATA = 6
    HOLD = 7


@dataclasses.dataclass(frozen=True)
class Rng:
    """Addresses random numbers for a batch: `rng.keys("image", Draw.NOISE)` is what a kernel takes.

    Args:
        seed: any integer; the lowest 64 bits count.
        samples: (B,) int64, the global index of each sample, below 2**32.
        step: the training or sampling step; an int, or a 0-d int64 tensor that a CUDA graph may update.
    """

    seed: int
    samples: Tensor
    step: int | Tensor = 0

    @classmethod
    def for_batch(cls, seed: int, n: int, start: int = 0, device: torch.device | str = "cpu") -> Rng:
        """The generator of samples start, …, start + n − 1."""
        return cls(seed, torch.arange(start, start + n, device=device))

    def at(self, step: int | Tensor) -> Rng:
        return dataclasses.replace(self, step=step)

    def keys(self, modality: str, draw: Draw) -> Tensor:
        """(B, 5) int64 keys of one stream, see the module's layout."""
        keys = self.samples.new_empty(len(self.samples), 5)
        keys[:, 0] = self.seed & MASK32
        keys[:, 1] = (self.seed >> 32) & MASK32
        keys[:, 2] = self.samples
        keys[:, 3] = self.step
        keys[:, 4] = modality_hash(modality) << 8 | int(draw) << 2
        return keys


@torch.compiler.assume_constant_result
def modality_hash(name: str) -> int:
    """24 bits of a name, the same in every process and whatever the order of the modalities."""
    return zlib.crc32(name.encode()) & 0xFFFFFF
