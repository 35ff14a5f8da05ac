"""Images ↔ float tensors of scaled pixel values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .vae import check_size, read_image


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """Images with values in [0, pixel_max] ↔ float32 (N, channels, size, size) in [−1, 1]."""

    channels: int
    size: int
    pixel_max: float = 255.0

    def encode(self, images: np.ndarray) -> Tensor:
        """Scaled pixel values of images (N, size, size) or (N, size, size, channels) of any real dtype.

        Raises:
            ValueError: another size or number of channels, or values outside the range.
        """
        images = np.asarray(images)
        if images.ndim == 3:
            images = images[..., None]
        expected = (self.size, self.size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"expected images of height, width, channels {expected}, got {tuple(images.shape[1:])}")
        if images.size and not (images.min() >= 0 and images.max() <= self.pixel_max):
            raise ValueError(f"pixel values must lie in [0, {self.pixel_max:g}]")
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        return x * (2.0 / self.pixel_max) - 1.0

    def decode(self, x: Tensor) -> np.ndarray:
        """uint8 (N, S, S, C) in 0 … 255 from (N, C, S, S); values outside [−1, 1] are clipped."""
        x = ((x.float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        return x.permute(0, 2, 3, 1).numpy()

    def read(self, path: str | Path) -> Tensor:
        """(1, C, S, S) from an image file of exactly this size.

        Raises:
            ValueError: not a readable image, or another size.
        """
        pixels = read_image(path, self.channels)
        check_size(path, pixels, self.size)
        return self.encode(pixels[None].astype(np.float32) * (self.pixel_max / 255.0))

    def read_mask(self, path: str | Path) -> Tensor:
        """(1, 1, S, S) bool from a black and white image of exactly this size, True where it is white."""
        pixels = read_image(path, 1)
        check_size(path, pixels, self.size)
        return torch.from_numpy(pixels[..., 0] > 127)[None, None]
