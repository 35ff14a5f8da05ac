"""The interface of codecs: between raw values of a modality and the tensors that are diffused."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self

Parts = dict[str, Tensor]  # the tensors of a modality, {part: tensor}; the part of a modality with one process is ""
Stored = dict[str, np.ndarray]  # the arrays that packed data keeps of a modality, {part: array}


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """What packed data keeps of one value.

    Args:
        shape, dtype: of its array.
        states: number of tokens, or of those of each column; None: numbers.
        gaps: NaN is allowed, and marks an element without a value.
    """

    shape: tuple[int, ...]
    dtype: str
    states: int | list[int] | None = None
    gaps: bool = False

    def problem(self, name: str, x: np.ndarray, leading: int) -> str | None:
        """What is wrong with an array of values called `name`, which has `leading` axes before those of a value."""
        tokens = self.states is not None
        right_type = x.dtype.kind in "iu" if tokens else x.dtype == self.dtype
        if x.ndim != leading + len(self.shape) or x.shape[leading:] != self.shape or not right_type:
            axes = ", ".join([*["n"] * leading, *map(str, self.shape)])
            return f"its {name} has shape {x.shape} {x.dtype}, the data set declares ({axes}) {self.dtype}"
        if tokens and (bad := x[(x < 0) | (x >= np.asarray(self.states))]).size:
            return f"token {bad[0]} is beyond the vocabulary of {self.states} of its {name}"
        finite = tokens or x.dtype.kind != "f" or _all_finite(x) or (self.gaps and not np.isinf(x).any())
        return None if finite else f"its {name} is not finite"


class Codec(abc.ABC):
    """Raw values ↔ tensors. What must be learned from training data is learned by `fit` and kept in `files`.

    The methods from `ready` on serve packed data, which keeps the arrays of `store`: by default what `encode` gives.

    Attributes:
        draws: `restore` draws random numbers.
        mirrored: mirroring the last axis of an encoded value gives another value of the data.
    """

    draws: ClassVar[bool] = False
    mirrored: ClassVar[bool] = False

    @property
    def is_fitted(self) -> bool:
        """Whether everything that `fit` learns is known."""
        return True

    def fit(self, values: Sequence, seed: int = 0) -> None:  # noqa: B027
        """Learn from the values of the training data, say a vocabulary or statistics; by default nothing."""

    @abc.abstractmethod
    def encode(self, values: Sequence) -> Tensor | Parts:
        """The tensor (N, …) of N raw values; {part: tensor} for a modality with several processes.

        Raises:
            ValueError: a value that has no code.
        """

    @abc.abstractmethod
    def decode(self, x: Any) -> Any:
        """N raw values, in a sequence, an array or a DataFrame, of what `encode` returns."""

    def decode_samples(self, x: Any, seed: int, start: int) -> Sequence:
        """`decode` of samples start, … of a seed, for codecs that draw random numbers or number the values."""
        return self.decode(x)

    def files(self) -> dict[str, bytes]:
        """{name: content} of what checkpoints keep so that the codec can be built again."""
        return {}

    def ready(self, device: torch.device | str | None = None) -> Self:
        """The codec after loading what it needs, say an autoencoder onto a device.

        Raises:
            ValueError: that is not to be had.
        """
        return self

    def prepare(self, value: Any) -> Any:
        """A raw value as `store` takes it: read from its file, cropped, truncated. Called by several threads."""
        return value

    def count_truncated(self, values: Sequence) -> int:
        """How many of these raw values `prepare` and `store` shorten."""
        return 0

    def store(self, values: Sequence, seed: int = 0) -> Stored:
        """{part: (N, …)} of N prepared values: by default as encoded, tokens as int32.

        seed: of random numbers, if there are any.
        """
        return as_stored(as_parts(self.encode(values)))

    def restore(self, stored: Stored, seeds: list[int] | None = None) -> Parts:
        """{part: (N, …)} new tensors as they are diffused, of N stored values.

        seeds: of the random numbers of each value, for a codec that `draws`; None: the mean over them.
        """
        types = {part: torch.float32 if x.dtype.kind == "f" else torch.int64 for part, x in stored.items()}
        return {part: torch.from_numpy(x).to(types[part], copy=True) for part, x in stored.items()}

    def specs(self, diffused: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        """{part: what `store` returns of a value}, given float32 numbers and int32 tokens as they are diffused."""
        return dict(diffused)

    def settings(self) -> dict[str, Any]:
        """What two codecs must agree on, besides `files`, so that one restores what the other stored; for JSON."""
        return {}


class NotFitted(ValueError):
    """A codec was asked before it was fitted."""


class NoFile(ValueError):
    """A file that a codec needs is not to be had."""


def require_fitted(codec: Codec, name: str = "") -> None:
    """Raise `NotFitted`, naming the modality where it is known, unless a codec is fitted."""
    if not codec.is_fitted:
        which = f"{name}: its codec" if name else "the codec"
        raise NotFitted(f"{which} is not fitted yet: train first (fit learns it from the data), or load a checkpoint")


def read_json(files: Mapping[str, bytes], name: str) -> Any:
    """The content of a JSON file of a codec.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(files[name])
    except ValueError:
        raise ValueError(f"{name} is truncated or damaged") from None


def as_parts(x: Tensor | Parts) -> Parts:
    """{part: tensor} of what `Codec.encode` returns."""
    return x if isinstance(x, dict) else {"": x}


def as_stored(x: Parts) -> Stored:
    """Encoded values as packed data keeps them by default."""
    return {part: (v if v.is_floating_point() else v.to(torch.int32)).numpy() for part, v in x.items()}


def _all_finite(x: np.ndarray) -> bool:
    """Whether all values are finite; in half precision: whether no exponent is all ones, which is faster to tell."""
    if x.dtype != np.float16:
        return bool(np.isfinite(x).all())
    return not ((x.view(np.uint16) & 0x7C00) == 0x7C00).any()


def is_column(values: Any) -> bool:
    """Whether N values are a number, a text or a date each, and no arrays, lists, mappings or bytes."""
    if isinstance(values, np.ndarray):
        return values.ndim == 1
    first = next((value for value in values if value is not None), None)
    return not isinstance(first, np.ndarray | list | tuple | Mapping | bytes | Path)
