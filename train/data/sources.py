"""Opens the data set that a config names: bundled, a file, a folder, a data set of the hub, or the user's function."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...configs.config import Data
from ...configs.kinds import import_object
from ...configs.locate import locate, not_found
from . import digits
from .dataset import Dataset, InMemory, subset

Opened = Dataset | tuple[Dataset, Dataset]  # one data set, or its training and held-out part
BUNDLED: dict[str, Callable[[], Dataset]] = {"digits": digits.load}


def open_source(data: Data, modalities: Sequence[str]) -> Opened:
    """The data set of a config's section, for these modalities.

    Raises:
        ValueError: there is none, or it lacks a modality.
    """
    if data.source in BUNDLED:
        return BUNDLED[data.source]()
    if ":" in data.source and locate(data.source) is None:
        return call_function(data)
    path = locate(data.source)
    if path is None:
        raise ValueError(not_found("data.source", data.source))
    fields = {m: data.fields.get(m, m) for m in modalities}
    if path.suffix == ".npz":
        return open_npz(path, fields)
    raise ValueError(f"data.source {data.source!r} is of no known kind")


def call_function(data: Data) -> Opened:
    """What the user's function returns: a data set, or a training and a held-out one.

    Raises:
        ValueError: it cannot be imported, fails, or returns something else.
    """
    function = import_object(data.source, "data.source")
    try:
        opened = function(**data.options)  # type: ignore[operator]
    except TypeError as error:
        raise ValueError(f"data.source {data.source!r}: {error}; data.options are its arguments") from None
    parts = opened if isinstance(opened, tuple) else (opened,)
    if len(parts) > 2 or not all(isinstance(part, Dataset) for part in parts):
        raise ValueError(
            f"data.source {data.source!r} returned a {type(opened).__name__}: return a data set (len and [i] → "
            "{modality: value}), or a training and a held-out one"
        )
    return opened


EARLIER_NAMES = {"image": "images", "text": "captions"}  # arrays of .npz files before fields could be named


def open_npz(path: Path, fields: dict[str, str]) -> Opened:
    """An .npz with an array per modality; text may have several versions, (N, M).

    An optional array `split` of the strings train and test determines the split. Further arrays (N,) are annotations.
    """
    arrays = read_npz(path)
    values, used = {}, set()
    for m, field in fields.items():
        name = field if field in arrays else EARLIER_NAMES.get(field, field)
        if name in arrays:
            values[m], n = as_values(arrays[name]), len(arrays[name])
            used.add(name)
    if missing := [field for m, field in fields.items() if m not in values]:
        raise ValueError(f"{path}: no array {missing[0]!r}; it has {', '.join(arrays)} (data.fields names others)")
    labels = {name: a for name, a in arrays.items() if name not in used and name != "split" and a.shape == (n,)}
    try:
        whole = InMemory(values, labels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return whole if "split" not in arrays else by_split(whole, arrays["split"], path)


def by_split(whole: Dataset, split: np.ndarray, where: object) -> tuple[Dataset, Dataset]:
    """Training and held-out part by an array of the strings train and test."""
    if unknown := sorted(set(split.tolist()) - {"train", "test"}):
        raise ValueError(f"{where}: split {unknown[0]!r}; it must be train or test")
    train, test = (np.flatnonzero(split == name) for name in ("train", "test"))
    if not len(train) or not len(test):
        raise ValueError(f"{where}: {len(train)} training and {len(test)} held-out examples; both need at least one")
    return subset(whole, train), subset(whole, test)


def as_values(array: np.ndarray) -> np.ndarray | list:
    """An array as the values of a modality: strings as a list, rows of strings as lists of versions."""
    return array.tolist() if array.dtype.kind in "US" else array


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
