"""Data sets: map-style, `len` and `[i] → {modality: raw value}`.

An example may lack a modality (None also means that), or have several versions of it, as a list: one is drawn every
time. Annotations of the examples that are no modality (`labels`) serve evaluations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

TRAIN, HELD_OUT = ("train",), ("test", "validation", "val")  # names of splits


@runtime_checkable
class Dataset(Protocol):
    """What training needs of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A data set of columns.

    Args:
        values: {modality: N values}: an array, a list (None: absent; a list: versions) or a DataFrame.
        labels: {name: (N,) annotations}.
    """

    values: Mapping[str, Any]
    labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        lengths = {m: len(values) for m, values in self.values.items()}
        if not lengths:
            raise ValueError("a data set needs at least one modality")
        lengths |= {name: len(values) for name, values in self.labels.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"modalities differ in length: {', '.join(f'{n} of {m}' for m, n in lengths.items())}")

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {m: value for m, values in self.values.items() if (value := take(values, i)) is not None}

    def subset(self, rows: np.ndarray) -> InMemory:
        """The examples with these numbers."""
        return InMemory(
            {m: take_all(values, rows) for m, values in self.values.items()},
            {name: np.asarray(values)[rows] for name, values in self.labels.items()},
        )


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of a data set."""

    dataset: Dataset
    rows: np.ndarray

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """Annotations of the examples, if the data set has some."""
        return {name: np.asarray(values)[self.rows] for name, values in labels_of(self.dataset).items()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self.dataset[int(self.rows[i])]


def labels_of(dataset: Dataset) -> Mapping[str, np.ndarray]:
    """The annotations of the examples, if the data set has some."""
    labels = getattr(dataset, "labels", None)
    return labels if isinstance(labels, Mapping) else {}


def is_table(values: Any) -> bool:
    """Whether values are rows of a DataFrame."""
    return hasattr(values, "iloc") and values.ndim == 2


def take(values: Any, i: int) -> Any:
    """Value number i."""
    return values.iloc[[i]].to_dict(orient="records")[0] if is_table(values) else values[i]


def take_all(values: Any, rows: np.ndarray) -> Any:
    """The values with these numbers, in a container of the same type."""
    if is_table(values):
        return values.iloc[rows].reset_index(drop=True)
    return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows.tolist()]


def subset(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """The examples with these numbers."""
    return dataset.subset(rows) if isinstance(dataset, InMemory) else Subset(dataset, rows)


Opened = Dataset | tuple[Dataset, Dataset]  # one data set, or its training and held-out part


def split_named(names: Sequence[str]) -> str:
    """The first of the names that is one of a split, else ""."""
    return next((name for name in names if name in (*TRAIN, *HELD_OUT)), "")


def by_split(whole: Dataset, splits: Sequence[Any], where: object) -> Opened:
    """Training and held-out part by the name of the split of each example; the whole if there are no names.

    Raises:
        ValueError: unknown names, examples without one, or an empty part.
    """
    names = [name if isinstance(name, str) else "" for name in splits]
    if not any(names):
        return whole
    for i, name in enumerate(names):
        if name not in (*TRAIN, *HELD_OUT):
            raise ValueError(f"{where}: split {name!r} of example {i}; it must be train, test or validation")
    is_held_out = np.isin(names, HELD_OUT)
    train, test = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    if not len(train) or not len(test):
        raise ValueError(f"{where}: {len(train)} training and {len(test)} held-out examples; both need at least one")
    return subset(whole, train), subset(whole, test)


def split_at_random(dataset: Dataset, test_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out examples."""
    train, test = split_rows(len(dataset), test_share, seed)
    return subset(dataset, train), subset(dataset, test)


def split_rows(n: int, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled row numbers of the training and of the held-out part."""
    order = np.random.default_rng(seed).permutation(n)
    cut = round(n * (1.0 - test_share))
    return order[:cut], order[cut:]


def columns(dataset: Dataset, names: Sequence[str]) -> dict[str, Any]:
    """{modality: all its values, None where it is absent}; every example is read once."""
    if isinstance(dataset, InMemory):
        return {m: dataset.values.get(m, [None] * len(dataset)) for m in names}
    rows = list(_rows(dataset))
    return {m: [row.get(m) for row in rows] for m in names}


def _rows(dataset: Dataset) -> Iterator[Mapping[str, Any]]:
    for i in range(len(dataset)):
        row = dataset[i]
        if not isinstance(row, Mapping):
            raise ValueError(f"example {i} of the data set is a {type(row).__name__}, not a mapping of modalities")
        yield row
