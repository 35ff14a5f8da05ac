"""Captions ↔ tokens, one for each character."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PAD = 0


@dataclasses.dataclass(frozen=True)
class CharCodec:
    """Captions ↔ int64 (N, length): one token per character of the alphabet, pads (token 0) at the end."""

    alphabet: str
    length: int

    @property
    def states(self) -> int:
        return len(self.alphabet) + 1

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → tokens.

        Raises:
            ValueError: a caption is too long or holds a character outside the alphabet.
        """
        index = {character: i + 1 for i, character in enumerate(self.alphabet)}
        tokens = torch.full((len(captions), self.length), PAD, dtype=torch.int64)
        for row, caption in enumerate(captions):
            if len(caption) > self.length:
                raise ValueError(f"caption {caption!r} has {len(caption)} characters, the model takes {self.length}")
            if outside := sorted(set(caption) - set(index)):
                raise ValueError(f"caption {caption!r} has characters outside the vocabulary: {''.join(outside)!r}")
            tokens[row, : len(caption)] = torch.tensor([index[c] for c in caption], dtype=torch.int64)
        return tokens

    def decode(self, tokens: Tensor) -> list[str]:
        """Tokens → captions; pads at the end are dropped, pads elsewhere show as "_"."""
        symbols = np.array(["_", *self.alphabet, "▯"])  # ▯ is a masked position of a half-noised caption
        text = ["".join(symbols[row]) for row in tokens.cpu().numpy()]
        return [caption.rstrip("_") for caption in text]
