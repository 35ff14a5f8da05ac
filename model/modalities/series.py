"""The kind `series`: C channels over T steps of time, under Gaussian diffusion."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw
from pydantic import Field

from ..codecs.arrays import ArrayCodec
from ..streams import Frames
from .base import GaussianModality

COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))


class Series(GaussianModality):
    """A series of C × T real numbers, every channel standardized over the training data."""

    suffix: ClassVar[str] = ".npy"

    channels: int = Field(1, gt=0, description="C")
    length: int = Field(gt=0, description="T, steps of time")
    standardize: bool = Field(True, description="channels to zero mean and unit variance over the training data")

    def build_codec(self, files):
        return ArrayCodec.from_files((self.channels, self.length), self.standardize, files)

    def build_process(self, codec):
        return self.gaussian(self.channels, self.length)

    def build_stream(self, codec):
        patch = self.stream.patch or (4 if self.length % 4 == 0 else 1)
        return Frames.of(self.stream, channels=self.channels, steps=self.length, patch=patch)

    def write(self, value: Any, path) -> None:
        np.save(path, np.asarray(value, dtype=np.float32))

    def as_raw(self, values):
        return [np.asarray(value, dtype=np.float32) for value in values]

    def render(self, value: Any) -> PILImage.Image:
        return plot_lines(value)

    def features(self, codec, values) -> np.ndarray:
        """Standardized as for the network."""
        return codec.encode(values).flatten(1).double().numpy()


def plot_lines(value: Any, size: int = 160) -> PILImage.Image:
    """A picture of a series (T,) or (C, T), one line per channel."""
    image = PILImage.new("RGB", (size, size), (255, 255, 255))
    draw, x = ImageDraw.Draw(image), np.atleast_2d(np.asarray(value, dtype=np.float64))
    low, high = float(x.min()), float(x.max())
    across = np.linspace(4, size - 5, x.shape[1])
    for k, channel in enumerate(x):
        down = size - 5 - (channel - low) / (high - low or 1.0) * (size - 9)
        draw.line(list(zip(across.tolist(), down.tolist(), strict=True)), COLOURS[k % len(COLOURS)], width=2)
    return image
