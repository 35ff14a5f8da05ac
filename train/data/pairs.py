"""Pictures and captions in memory, cut into batches that are a function of (seed, step) alone."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ... import kernels
from ...configs.locate import locate, not_found
from ...kernels import Draw, Rng
from ...kernels.reference import words_to_index
from .epochs import batch_rows


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One split of an image-text data set.

    Args:
        images: (N, C, S, S) encoded pictures.
        captions: (N, M, L) encoded captions, M choices per picture; one is drawn each time.
        labels: (N,) int64 classes, where the data has them.
        names: modality names of the two.
        texts: the captions as text, N lists, where the data has them as such.
        meta: {name: (N,)} what else is known of each pair.
    """

    images: Tensor
    captions: Tensor
    labels: Tensor | None = None
    names: tuple[str, str] = ("image", "text")
    texts: list[list[str]] | None = None
    meta: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size` pairs, see `batch_rows`; captions are drawn anew."""
        index = batch_rows(len(self), seed, step, rows, size)
        keys = Rng(seed, torch.arange(rows.start, rows.stop), step).keys("data", Draw.DATA)
        choice = words_to_index(kernels.reference.random_words(keys, 1)[:, 0], self.captions.shape[1])
        image, text = self.names
        return {image: self.images[index], text: self.captions[index, choice]}


Encode = Callable[[np.ndarray], Tensor]


def split_rows(n: int, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled row numbers of the training and of the held-out part."""
    order = np.random.default_rng(seed).permutation(n)
    cut = round(n * (1.0 - test_share))
    return order[:cut], order[cut:]


def load_npz(path: str, encode_images: Encode, encode_captions, test_share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs of an .npz with arrays `images` (N, S, S[, C]) and `captions` (N,) of text.

    An array `split` with the words train and test, if there, decides; else `test_share` of the rows are held out.
    Further arrays of the same length go into `Pairs.meta`.

    Raises:
        ValueError: no such file, a missing array, arrays of different length.
    """
    file = locate(path)
    if file is None:
        raise ValueError(not_found("data file", path))
    arrays = read_npz(file)
    if missing := [name for name in ("images", "captions") if name not in arrays]:
        raise ValueError(f"{file}: no array {missing[0]!r}; it has {', '.join(arrays)}")
    images, captions, split = arrays["images"], arrays["captions"], arrays.get("split")
    if len(images) != len(captions):
        raise ValueError(f"{file}: {len(images)} images but {len(captions)} captions")
    if split is None:
        train, test = split_rows(len(images), test_share, seed)
    else:
        train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    if not len(train) or not len(test):
        raise ValueError(f"{file}: {len(train)} training and {len(test)} held-out pairs; both must be there")
    texts = [str(c) for c in captions]
    encoded = encode_images(images), encode_captions(texts)[:, None]
    further = extras(arrays)
    return tuple(
        Pairs(
            encoded[0][rows],
            encoded[1][rows],
            texts=[[texts[row]] for row in rows],
            meta={name: values[rows] for name, values in further.items()},
        )
        for rows in (train, test)
    )


def extras(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What an .npz holds beside images, captions and split: the arrays with one value per row."""
    n = len(arrays["images"])
    known = ("images", "captions", "split")
    return {name: a for name, a in arrays.items() if name not in known and a.shape == (n,)}


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz; never unpickles."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a readable .npz file of plain arrays ({error})") from None
