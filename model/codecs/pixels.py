"""Images ↔ float tensors of scaled pixel values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .vae import read_picture


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
