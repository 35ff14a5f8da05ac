"""A folder of image files as an array that is read in batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageFolder:
    """`images[a:b]` is uint8 (b − a, H, W, C), read on access; files in the order of their paths.

    Args:
        folder: image files, also in subfolders.
        shape: (H, W, C) that all images are resized to; default: the shape of the first one in RGB, which all others
            must have.

    Raises:
        ValueError: fewer than 2 images; on reading, a file that is not an image or has another size.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int] | None = None):
        self.files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if len(self.files) < 2:
            raise ValueError(f"{folder}: found {len(self.files)} images, at least 2 are needed")
        self.resize = shape is not None
        self.shape = shape or (0, 0, 3)
        if shape is None:
            self.shape = self._read(self.files[0]).shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: slice) -> np.ndarray:
        return np.stack([self._read(file) for file in self.files[index]]).reshape(-1, *self.shape)

    def _read(self, file: Path) -> np.ndarray:
        from PIL import Image

        try:
            image = Image.open(file).convert({1: "L", 3: "RGB"}[self.shape[2]])
        except OSError:  # Pillow's error for anything that is not an image
            raise ValueError(f"{file} is not a readable image") from None
        height, width = self.shape[:2]
        if self.resize:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        elif (height, width) != (0, 0) and image.size != (width, height):
            raise ValueError(
                f"{file} is {image.width}×{image.height}, others are {width}×{height}: resize all with --size"
            )
        return np.asarray(image)
