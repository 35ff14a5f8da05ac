"""Captions ↔ tokens, one token per character."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Codec

PAD = 0
MASKED = "▯"  # how a masked position of a partly noised caption is shown


@dataclasses.dataclass(frozen=True)
class CharCodec(Codec):
    """Captions ↔ int64 (N, length): one token per character of the alphabet, then pads (token 0)."""

    alphabet: str
    length: int

    @property
    def states(self) -> int:
        """Number of tokens, the pad included."""
        return len(self.alphabet) + 1

    def encode(self, values: Sequence[str]) -> Tensor:
        """Captions → tokens.

        Raises:
            ValueError: a caption is too long or has a character outside the alphabet.
        """
        return self._encode(values, {})

    def encode_masked(self, captions: Sequence[str]) -> Tensor:
        """Captions → tokens, where the sign ▯ becomes the mask token."""
        return self._encode(captions, {MASKED: self.states})

    def prepare(self, value: str) -> str:
        return value[: self.length]

    def count_truncated(self, values: Sequence[str]) -> int:
        return sum(len(caption) > self.length for caption in values)

    def settings(self) -> dict[str, Any]:
        vocabulary = {"states": self.states, "pad": PAD, "alphabet": self.alphabet}
        return {"kind": "characters", "length": self.length, **vocabulary}

    def _encode(self, captions: Sequence[str], special: dict[str, int]) -> Tensor:
        index = {character: i + 1 for i, character in enumerate(self.alphabet)} | special
        tokens = torch.full((len(captions), self.length), PAD, dtype=torch.int64)
        for row, caption in enumerate(captions):
            if len(caption) > self.length:
                raise ValueError(f"caption {caption!r} has {len(caption)} characters, the model takes {self.length}")
            unknown = sorted(set(caption) - set(index))
            if unknown:
                raise ValueError(f"caption {caption!r} has characters outside the vocabulary: {''.join(unknown)!r}")
            tokens[row, : len(caption)] = torch.tensor([index[c] for c in caption], dtype=torch.int64)
        return tokens

    def decode(self, x: Tensor) -> list[str]:
        """Tokens → captions; pads at the end are dropped, pads elsewhere are shown as "_", masked positions as ▯."""
        symbols = np.array(["_", *self.alphabet, MASKED])
        text = ["".join(symbols[row]) for row in x.cpu().numpy()]
        return [caption.rstrip("_") for caption in text]
