"""Between raw data and a native state space: pictures ↔ tensors, captions ↔ tokens.

A codec of pictures has `encode`, `decode` and `read(path)`, a codec of captions `encode`, `decode` and `states`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .latents import LatentCodec, read_picture
from .tokenizer import TokenizerCodec

__all__ = ["PAD", "CharCodec", "LatentCodec", "PixelCodec", "TokenizerCodec"]
PAD = 0


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """Pictures with values in [0, pixel_max] ↔ float32 (N, channels, size, size) in [−1, 1]."""

    channels: int
    size: int
    pixel_max: float = 255.0

    def encode(self, pictures: np.ndarray) -> Tensor:
        """(N, size, size) or (N, size, size, channels) of any real dtype → tensor.

        Raises:
            ValueError: another size or number of channels, or values outside the range.
        """
        pictures = np.asarray(pictures)
        if pictures.ndim == 3:
            pictures = pictures[..., None]
        want = (self.size, self.size, self.channels)
        if pictures.shape[1:] != want:
            raise ValueError(f"expected pictures of height, width, channels {want}, got {tuple(pictures.shape[1:])}")
        if pictures.size and not (pictures.min() >= 0 and pictures.max() <= self.pixel_max):
            raise ValueError(f"pixel values must lie in [0, {self.pixel_max:g}]")
        x = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float()
        return x * (2.0 / self.pixel_max) - 1.0

    def decode(self, x: Tensor) -> np.ndarray:
        """(N, C, S, S) → uint8 (N, S, S, C) in 0 … 255, clipped."""
        x = ((x.float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        return x.permute(0, 2, 3, 1).numpy()

    def read(self, path: str | Path) -> Tensor:
        """(1, C, S, S) from a picture file of exactly this size.

        Raises:
            ValueError: not a readable picture, or another size.
        """
        pixels = read_picture(path, self.channels)
        if pixels.shape[:2] != (self.size, self.size):
            height, width = pixels.shape[:2]
            raise ValueError(f"{path}: the model takes {self.size}x{self.size} pictures, this one is {width}x{height}")
        return self.encode(pixels[None].astype(np.float32) * (self.pixel_max / 255.0))


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
