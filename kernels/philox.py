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
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .backend import constant_in_graphs

MASK32 = 0xFFFFFFFF
PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_UNITS: dict[torch.device, tuple[Tensor, ...]] = {}  # see `unit`


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
        words: (B, 5) int64, keys with the columns of the seed and the sample alone; default: made when they are first
            used. In memory that a CUDA graph reads, they take the place of both.
    """

    seed: int
    samples: Tensor
    step: int | Tensor = 0
    uniforms: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    words: Tensor | None = None

    @classmethod
    def for_batch(cls, seed: int, n: int, start: int = 0, device: torch.device | str = "cpu") -> Rng:
        """The generator of samples start, …, start + n − 1."""
        return cls(seed, torch.arange(start, start + n, device=device))

    def at(self, step: int | Tensor) -> Rng:
        """The generator of the same samples at another step."""
        other = dataclasses.replace(self, step=step)
        if self.words is None and not torch.compiler.is_compiling():
            other.__dict__["batch_words"] = self._batch_words
        return other

    def with_words(self) -> Rng:
        """The same generator, whose `words` are made."""
        return dataclasses.replace(self, words=self._batch_words)

    def keys(self, modality: str, draw: Draw) -> Tensor:
        """(B, 5) int64 keys of one stream; see the layout above. One launch, after the first stream of a step."""
        word = modality_hash(modality) << 8 | int(draw) << 2
        return torch.add(self._made("step_words", self._make_step_words), unit(4, self.samples), alpha=word)

    @property
    def _batch_words(self) -> Tensor:
        """(B, 5): the columns of the seed and the sample, which all steps share; the others are 0."""
        return self._made("batch_words", self._make_batch_words) if self.words is None else self.words

    def _make_batch_words(self) -> Tensor:
        samples, low, high = self.samples, self.seed & MASK32, (self.seed >> 32) & MASK32
        words = torch.add(samples[:, None] * unit(2, samples), unit(0, samples), alpha=low)
        return torch.add(words, unit(1, samples), alpha=high)

    def _make_step_words(self) -> Tensor:
        """(B, 5): all columns but that of the stream."""
        if isinstance(self.step, Tensor):
            return torch.addcmul(self._batch_words, unit(3, self.samples), self.step)
        return torch.add(self._batch_words, unit(3, self.samples), alpha=self.step)

    def _made(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is made once; in compiled code, where it is fused with its uses, every time."""
        if torch.compiler.is_compiling():
            return make()
        if name not in self.__dict__:  # no field: `dataclasses.replace` with other samples begins anew
            self.__dict__[name] = make()
        return self.__dict__[name]


def unit(column: int, like: Tensor) -> Tensor:
    """(5,) int64: 1 in one column of the keys, on the device of `like`. Added with a factor, it writes a number of the
    host into the column without a copy to the device."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # fake tensors must not be kept
        return (torch.arange(5, device=like.device) == column).long()
    if like.device not in _UNITS:  # made on the host: what is made while a CUDA graph is captured has no values yet
        _UNITS[like.device] = torch.eye(5, dtype=torch.int64).to(like.device).unbind()
    return _UNITS[like.device][column]


@constant_in_graphs
def modality_hash(name: str) -> int:
    """24-bit hash of a name; independent of the process and of the order of the modalities."""
    return zlib.crc32(name.encode()) & 0xFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on int64 tensors that hold unsigned 32-bit words; broadcasts."""
    for _ in range(10):
        high0, low0 = wide_product(c0, PHILOX_M[0])
        high1, low1 = wide_product(c2, PHILOX_M[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_W[0]) & MASK32, (k1 + PHILOX_W[1]) & MASK32
    return c0, c1, c2, c3


def wide_product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32-bit word of word · factor.

    An int64 product wraps modulo 2⁶⁴ but keeps every bit of a 32×32-bit product. In compiled C++ signed overflow is
    undefined, so there the factor is multiplied by halves.
    """
    if not torch.compiler.is_compiling():
        product = word * factor
        return (product >> 32) & MASK32, product & MASK32
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & MASK32


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
