"""Images ↔ float tensors of scaled pixel values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base import ArraySpec, Codec, Parts, Stored
from .vae import check_size, prepare_image, read_image, stack_masks

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class PixelCodec(Codec):
    """Images with values in [0, pixel_max] ↔ float32 (N, channels, size, size) in [−1, 1]."""

    mirrored: ClassVar[bool] = True

    channels: int
    size: int
    pixel_max: float = 255.0

    def encode(self, values: np.ndarray | Sequence) -> Tensor:
        """Scaled pixel values of images (N, size, size) or (N, size, size, channels) of any real dtype.

        Pillow images and paths of image files also work; their values are scaled to pixel_max.

        Raises:
            ValueError: another size or number of channels, or values outside the range or of another one.
        """
        images = self._checked(values)
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        return x * (2.0 / self.pixel_max) - 1.0

    def _checked(self, values: np.ndarray | Sequence) -> np.ndarray:
        """Images as one array (N, size, size, channels)."""
        images = values if isinstance(values, np.ndarray) else self._stack(values)
        if images.ndim == 3:
            images = images[..., None]
        expected = (self.size, self.size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"expected images of height, width, channels {expected}, got {tuple(images.shape[1:])}")
        if images.size and not (images.min() >= 0 and images.max() <= self.pixel_max):
            raise ValueError(f"pixel values must lie in [0, {self.pixel_max:g}]")
        if images.dtype.kind == "f" and images.size and images.max() <= 1.0 < self.pixel_max:
            steps = images, images * (255.0 / self.pixel_max)  # whole numbers in dark images, here or in 8 bits
            if min(np.abs(s - np.round(s)).max() for s in steps) > 1e-3:
                raise ValueError(f"pixel values lie in [0, 1], not in [0, {self.pixel_max:g}]: set pixel_max: 1")
        return images

    def _stack(self, values: Sequence) -> np.ndarray:
        arrays = []
        for value in values:
            if not isinstance(value, np.ndarray):
                value = read_image(value, self.channels).astype(np.float32) * (self.pixel_max / 255.0)
            arrays.append(value[..., None] if value.ndim == 2 else value)
        if len({a.shape for a in arrays}) > 1:
            other = next(a.shape for a in arrays if a.shape != arrays[0].shape)
            raise ValueError(f"images differ in shape: {arrays[0].shape} and {other}")
        return np.stack(arrays) if arrays else np.zeros((0, self.size, self.size, self.channels))

    def decode(self, x: Tensor) -> np.ndarray:
        """uint8 (N, S, S, C) in 0 … 255 from (N, C, S, S); values outside [−1, 1] are clipped."""
        x = ((x.float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        return x.permute(0, 2, 3, 1).numpy()

    @property
    def _levels(self) -> float:
        """The stored value of the brightest pixel: pixel_max if that is a whole number that a byte holds, else 255."""
        return self.pixel_max if self.pixel_max in range(2, 256) else 255.0

    def prepare(self, value: Any) -> np.ndarray:
        """(S, S, C), cropped to its centre."""
        pixels = prepare_image(value, self.channels, self.size)
        is_raw = isinstance(value, np.ndarray) or self.pixel_max == 255.0
        return pixels if is_raw else pixels.astype(np.float32) * (self.pixel_max / 255.0)

    def store(self, values: Sequence[np.ndarray], seed: int = 0) -> Stored:
        """uint8 (N, S, S, C): the pixel values, or, where pixel_max is not a whole number above 1, 256 levels of them.

        Raises:
            ValueError: as `encode`, and for values that are not whole numbers.
        """
        images = self._checked(values)
        if images.dtype == np.uint8 and self._levels == self.pixel_max:
            return {"": images}
        whole = np.rint(images * (self._levels / self.pixel_max)).astype(np.uint8)
        if self._levels == self.pixel_max and not np.array_equal(whole, images):
            raise ValueError(f"pixel values must be whole numbers from 0 to {self.pixel_max:g} to be packed")
        return {"": whole}

    def restore(self, stored: Stored, seeds: list[int] | None = None) -> Parts:
        x = torch.from_numpy(stored[""]).permute(0, 3, 1, 2)
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        return {"": x.mul_(2.0 / self._levels).sub_(1.0)}

    def specs(self, diffused: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        return {"": ArraySpec((self.size, self.size, self.channels), "uint8")}

    def settings(self) -> dict[str, Any]:
        return {"kind": "pixels", "channels": self.channels, "size": self.size, "pixel_max": self.pixel_max}

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
        return self.encode_mask([pixels[..., 0] > 127])

    def encode_mask(self, masks: Sequence) -> Tensor:
        """(N, 1, S, S) bool of N masks (S, S).

        Raises:
            ValueError: a mask of another size.
        """
        return stack_masks(masks, self.size)[:, None]


def to_pil(image: Any) -> Image.Image:
    """A decoded image, uint8 (S, S, C), as a Pillow image."""
    if isinstance(image, Image.Image):
        return image
    pixels = np.asarray(image)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
