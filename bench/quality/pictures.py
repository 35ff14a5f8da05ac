"""A folder of picture files as an array that is read piece by piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...train.data.packing.sources import PICTURES


class Pictures:
    """`pictures[a:b]` is uint8 (b − a, S, S, C), read when asked for; files in the order of their paths.

    Args:
        folder: picture files, also in folders below.
        shape: (H, W, C) that all are brought to; default: that of the first one, in RGB, and all must have it.

    Raises:
        ValueError: fewer than 2 pictures; on reading, a file that is no picture or has another size.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int] | None = None):
        self.files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
        if len(self.files) < 2:
            raise ValueError(f"{folder}: {len(self.files)} pictures there, at least 2 are needed")
        self.resized = shape is not None
        self.shape = shape or (0, 0, 3)
        if shape is None:
            self.shape = self._read(self.files[0]).shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.stack([self._read(file) for file in self.files[rows]]).reshape(-1, *self.shape)

    def _read(self, file: Path) -> np.ndarray:
        from PIL import Image

        try:
            picture = Image.open(file).convert({1: "L", 3: "RGB"}[self.shape[2]])
        except OSError:  # what Pillow raises for anything that is no picture
            raise ValueError(f"{file} is no picture that can be read") from None
        size = self.shape[1::-1]
        if self.resized:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        elif 0 not in size and picture.size != size:
            width, height = picture.size
            others = f"others are {size[0]}×{size[1]}"
            raise ValueError(f"{file} is {width}×{height}, {others}: bring all to one with --size")
        return np.asarray(picture)
