"""The interface of codecs: between raw values of a modality and the tensors that are diffused."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from torch import Tensor

Parts = dict[str, Tensor]  # the tensors of a modality, {part: tensor}; the part of a modality with one process is ""


class Codec(abc.ABC):
    """Raw values ↔ tensors. What must be learned from training data is learned by `fit` and kept in `files`."""

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
    def decode(self, x: Any) -> Sequence:
        """N raw values of what `encode` returns."""

    def files(self) -> dict[str, bytes]:
        """{name: content} of what checkpoints keep so that the codec can be built again."""
        return {}


class NotFitted(ValueError):
    """A codec was asked before it was fitted."""


def require_fitted(codec: Codec, name: str) -> None:
    """Raise `NotFitted`, naming the modality, unless a codec is fitted."""
    if not codec.is_fitted:
        raise NotFitted(
            f"{name}: its codec is not fitted yet: train first (fit learns it from the data), or load a checkpoint"
        )


def as_parts(x: Tensor | Parts) -> Parts:
    """{part: tensor} of what `Codec.encode` returns."""
    return x if isinstance(x, dict) else {"": x}
