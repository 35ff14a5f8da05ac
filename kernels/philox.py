"""Counter-based random numbers: Philox-4x32-10 and the keys that address them.

Every random number of anystate is a function of (seed, sample index, modality, step, draw, element). A sample therefore
does not depend on its batch, and a kernel uses the same numbers as its PyTorch reference.

Layout. An operation receives `keys`, an int64 tensor (B, 5) of unsigned 32-bit words, one row per sample:

    keys[:, 0:2]  the Philox key     seed, low and high word
    keys[:, 2]    counter word 1     sample index
    keys[:, 3]    counter word 2     step
    keys[:, 4]    counter word 3     modality hash (24 bits) | draw (6 bits) | sub-draw (2 bits)

Counter word 0 is the element: element e of a sample is word e % 4 of the block with counter e // 4.
The two lowest bits of word 3 are the sub-draw, for operations that need up to four streams of their own.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import dataclasses
import enum
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)


class Draw(enum.IntEnum):
    """Purpose of a random number; each has its own stream. The values are part of the format of results."""

    TIME = 0
    NOISE = 1
    PRIOR = 2
    STEP = 3
    GUIDANCE = 4
    CONDITION = 5
    DATA = 6
    CONDITIONED = 7


@dataclasses.dataclass(frozen=True)
class Rng:
    """Addresses of the random numbers of a batch. Operations take `rng.keys("image", Draw.NOISE)`.

    Args:
        seed: any integer; its lowest 64 bits are used.
        samples: (B,) int64, the global index of each sample, below 2**32.
        step: the training or sampling step; an int, or a 0-d int64 tensor that a CUDA graph may update.
        uniforms: {modality: (B, …) float64 in (0, 1)}: quasi-random or stratified points, which sampling uses
            instead of independent random numbers where each element takes one number: the initial noise of a Gaussian
            modality and the tokens of first-hitting sampling.
    """

    seed: int
    samples: Tensor
    step: int | Tensor = 0
    uniforms: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def for_batch(cls, seed: int, n: int, start: int = 0, device: torch.device | str = "cpu") -> Rng:
        """The generator of samples start, …, start + n − 1."""
        return cls(seed, torch.arange(start, start + n, device=device))

    def at(self, step: int | Tensor) -> Rng:
        return dataclasses.replace(self, step=step)

    def keys(self, modality: str, draw: Draw) -> Tensor:
        """(B, 5) int64 keys of one stream; see the layout above."""
        keys = self.samples.new_empty(len(self.samples), 5)
        keys[:, 0] = self.seed & MASK32
        keys[:, 1] = (self.seed >> 32) & MASK32
        keys[:, 2] = self.samples
        keys[:, 3] = self.step
        keys[:, 4] = modality_hash(modality) << 8 | int(draw) << 2
        return keys


@torch.compiler.assume_constant_result
def modality_hash(name: str) -> int:
    """24-bit hash of a name; independent of the process and of the order of the modalities."""
    return zlib.crc32(name.encode()) & 0xFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on int64 tensors that hold unsigned 32-bit words; broadcasts.

    An int64 product wraps modulo 2⁶⁴ but keeps every bit of a 32×32-bit product, so its high word is obtained by a
    shift and a mask.
    """
    for _ in range(10):
        product0, product1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + PHILOX_W[0]) & MASK32, (k1 + PHILOX_W[1]) & MASK32
    return c0, c1, c2, c3


def random_words(keys: Tensor, n: int, sub: int = 0, start: Tensor | None = None) -> Tensor:
    """(B, n) int64 of uniform 32-bit words: elements 0 … n−1 of each row of keys (B, 5).

    `sub` (0 to 3) selects one of the four streams of a key. `start` (B,) is the first *block* of four elements of each
    row, by default 0.
    """
    blocks = torch.arange((n + 3) // 4, device=keys.device)
    k0, k1, c1, c2, c3 = keys[:, :, None].unbind(1)
    c0 = blocks[None] if start is None else start[:, None] + blocks
    words = torch.stack(philox(c0 & MASK32, c1, c2, c3 + sub, k0, k1), dim=-1)
    return words.flatten(1)[:, :n]
