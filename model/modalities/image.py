"""The kind `image`: pixels, or latents of an autoencoder, under Gaussian diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image as PILImage
from pydantic import Field
from torch import Tensor

from ...configs.config import Section
from ..codecs.pixels import PixelCodec, to_pil
from ..codecs.vae import LatentCodec, check_size, read_image
from ..streams import Patches
from .base import GaussianModality

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Latents(Section):
    """Images are diffused in the latent space of a variational autoencoder (`diffusers.AutoencoderKL`)."""

    vae: str = Field("stabilityai/sd-vae-ft-mse", description="local folder or Hugging Face id")
    scale: float = Field(0.18215, gt=0, description="factor that brings latents to about unit variance")


class Image(GaussianModality):
    """An image under Gaussian diffusion: pixel values scaled to [−1, 1], or latents."""

    suffix: ClassVar[str] = ".png"
    metrics: ClassVar[tuple[str, ...]] = ("elbo", "labels", "fid", "clip")
    synonyms: ClassVar[tuple[str, ...]] = ("images", "image", "img", "picture", "jpg", "jpeg", "png", "webp")
    file_suffixes: ClassVar[tuple[str, ...]] = (*IMAGE_SUFFIXES, ".npy")

    channels: int = Field(gt=0, description="of what is diffused: 4 for the usual latents")
    size: int = Field(gt=0, description="side of what is diffused: 32 for latents of images of 256 pixels")
    pixel_max: float = Field(255.0, gt=0, description="raw pixels lie in [0, pixel_max]")
    latents: Latents | None = Field(None, description="null: pixels")

    def build_codec(self, files):
        if self.latents:
            return LatentCodec(self.latents.vae, self.latents.scale, self.channels, self.size)
        return PixelCodec(self.channels, self.size, self.pixel_max)

    def build_process(self, codec):
        return self.gaussian(self.channels, self.size, self.size)

    def build_stream(self, codec):
        patch = self.stream.patch or 2
        return Patches.of(self.stream, channels=self.channels, size=self.size, patch=patch)

    def read(self, text: str) -> np.ndarray:
        if self.latents:
            return read_image(text, 3)
        pixels = read_image(text, self.channels)
        check_size(text, pixels, self.size)
        return pixels.astype(np.float32) * (self.pixel_max / 255.0)

    def from_file(self, path: Path) -> Path | np.ndarray:
        """An array, or the path itself: codecs read images a few at a time."""
        return super().read(str(path)) if path.suffix == ".npy" else path

    def write(self, value: Any, path: Path) -> None:
        to_pil(value).save(path)

    def as_raw(self, values):
        return [to_pil(value) for value in values]

    def render(self, value: Any) -> PILImage.Image:
        return to_pil(value)

    def read_mask(self, codec: PixelCodec | LatentCodec, path: str) -> Tensor:
        return codec.read_mask(path)

    def encode_mask(self, codec: PixelCodec | LatentCodec, masks) -> Tensor:
        return codec.encode_mask(masks)

    def features(self, codec, values) -> np.ndarray:
        images = np.stack([np.asarray(to_pil(value), dtype=np.float64) for value in values]) / 255.0
        while (side := images.shape[1] // 2 * 2) > 64:  # a classifier needs no more
            images = images[:, :side, :side]
            images = 0.25 * (images[:, ::2, ::2] + images[:, 1::2, ::2] + images[:, ::2, 1::2] + images[:, 1::2, 1::2])
        return images.reshape(len(images), -1)

    def grid_levels(self, codec) -> int | None:
        return None if self.latents else int(self.pixel_max) + 1
