"""Images and captions in memory, cut into batches that are a function of (seed, step) alone."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ... import kernels
from ...configs.locate import locate, not_found
from ...kernels import Draw, Rng
from ...kernels.reference import words_to_index
from .epochs import batch_rows

EncodeImages = Callable[[np.ndarray], Tensor]
EncodeCaptions = Callable[[Sequence[str]], Tensor]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One split of an image-text data set.

    Args:
        images: (N, C, S, S) encoded images.
        captions: (N, M, L) encoded captions, M choices per image; each batch draws one of them.
        labels: (N,) int64 classes, where the data set has them.
        names: names of the image and the text modality.
        texts: the captions as strings, N lists, where available.
        meta: {name: (N,)} further annotations of each pair.
    """

    images: Tensor
    captions: Tensor
    labels: Tensor | None = None
    names: tuple[str, str] = ("image", "text")
    texts: list[list[str]] | None = None
    meta: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: np.ndarray) -> Pairs:
        """The pairs with these row numbers."""
        return dataclasses.replace(
            self,
            images=self.images[rows],
            captions=self.captions[rows],
            labels=None if self.labels is None else self.labels[rows],
            texts=None if self.texts is None else [self.texts[row] for row in rows],
            meta=None if self.meta is None else {name: values[rows] for name, values in self.meta.items()},
        )

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size` pairs, see `batch_rows`; captions are chosen at random."""
        index = batch_rows(len(self), seed, step, rows, size)
        keys = Rng(seed, torch.arange(rows.start, rows.stop), step).keys("data", Draw.DATA)
        choice = words_to_index(kernels.reference.random_words(keys, 1)[:, 0], self.captions.shape[1])
        image, text = self.names
        return {image: self.images[index], text: self.captions[index, choice]}


def split_rows(n: int, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled row numbers of the training and of the held-out part."""
    order = np.random.default_rng(seed).permutation(n)
    cut = round(n * (1.0 - test_share))
    return order[:cut], order[cut:]


def load_npz(
    path: str, encode_images: EncodeImages, encode_captions: EncodeCaptions, test_share: float, seed: int
) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs of an .npz with arrays `images` (N, S, S[, C]) and `captions` (N,) of strings.

    An optional array `split` of the strings train and test determines the split; otherwise `test_share` of the rows
    are held out at random. Further arrays of length N go into `Pairs.meta`.

    Raises:
        ValueError: no such file, a missing array, or arrays of different lengths.
    """
    file = locate(path)
    if file is None:
        raise ValueError(not_found("data file", path))
    arrays = read_npz(file)
    check_pairs(arrays, file)
    train, test = _npz_split(arrays, test_share, seed)
    if not len(train) or not len(test):
        raise ValueError(f"{file}: {len(train)} training and {len(test)} held-out pairs; both parts need at least one")
    texts = [str(caption) for caption in arrays["captions"]]
    pairs = Pairs(
        encode_images(arrays["images"]),
        encode_captions(texts)[:, None],
        texts=[[text] for text in texts],
        meta=extra_arrays(arrays),
    )
    return pairs.subset(train), pairs.subset(test)


def _npz_split(arrays: dict[str, np.ndarray], test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    split = arrays.get("split")
    if split is None:
        return split_rows(len(arrays["images"]), test_share, seed)
    return np.flatnonzero(split == "train"), np.flatnonzero(split == "test")


def check_pairs(arrays: dict[str, np.ndarray], file: Path) -> None:
    """Raise ValueError unless an .npz has arrays `images` and `captions` of the same length."""
    missing = [name for name in ("images", "captions") if name not in arrays]
    if missing:
        raise ValueError(f"{file}: no array {missing[0]!r}; it has {', '.join(arrays)}")
    images, captions = arrays["images"], arrays["captions"]
    if len(images) != len(captions):
        raise ValueError(f"{file}: {len(images)} images but {len(captions)} captions")


def extra_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of an .npz with one value per row, apart from images, captions and split."""
    n = len(arrays["images"])
    standard = ("images", "captions", "split")
    return {name: a for name, a in arrays.items() if name not in standard and a.shape == (n,)}


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; pickled objects are refused.

    Raises:
        ValueError: not a readable .npz file of plain arrays.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a readable .npz file of plain arrays ({error})") from None
