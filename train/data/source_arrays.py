"""Data sets in .npz files: arrays with one entry for each example."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from ...configs.config import Data
from ...model.codecs.base import is_column
from .dataset import InMemory, Opened, by_split
from .fields import Modalities, as_values, find_fields, pick


def open_npz(path: Path, data: Data, modalities: Modalities) -> Opened:
    """An .npz with an array per modality; text may have several versions, (N, M).

    An optional array `split` of the strings train and test determines the split. Further arrays (N,) are annotations.
    """
    arrays = read_npz(path)
    split = arrays.pop("split", None)
    found = find_fields(arrays, modalities, data, path)
    lengths = {m: len(arrays[name]) for m, name in found.items() if arrays[name].ndim}
    n = next(iter(lengths.values()), len(next(iter(arrays.values()), ())))
    rows = {name: array for name, array in arrays.items() if name in found.values() or array.shape[:1] == (n,)}
    values, free = pick(rows, modalities, data, found, path)
    values = {m: as_values(array, modalities[m], f"{path}, {m}") for m, array in values.items()}
    try:
        whole = InMemory(values, {name: rows[name] for name in free if is_column(rows[name])})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return whole if split is None else by_split(whole, split.tolist(), path)


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
