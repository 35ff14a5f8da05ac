"""Arrays of numbers ↔ tensors of about unit variance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Codec, read_json, require_fitted

STATISTICS = "statistics.json"


class ArrayCodec(Codec):
    """Arrays of one shape ↔ float32 (N, *shape), standardized by the mean and deviation of each row of the first axis.

    Args:
        shape: of one array; the rows of its first axis are channels or features.
        standardize: learn means and deviations from the training data; False keeps the values as they are.
    """

    def __init__(self, shape: tuple[int, ...], standardize: bool = True):
        self.shape, self.standardize = shape, standardize
        self.mean = self.std = None if standardize else 1.0
        if not standardize:
            self.mean = 0.0

    @classmethod
    def from_files(cls, shape: tuple[int, ...], standardize: bool, files: Mapping[str, bytes]) -> ArrayCodec:
        """Raises ValueError if the file is damaged."""
        codec = cls(shape, standardize)
        if STATISTICS in files:
            saved = read_json(files, STATISTICS)
            try:
                codec.mean, codec.std = (np.array(saved[name]).reshape(codec._rows) for name in ("mean", "std"))
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{STATISTICS} does not fit values of shape {shape}") from None
        return codec

    @property
    def _rows(self) -> tuple[int, ...]:
        return (self.shape[0], *[1] * (len(self.shape) - 1))

    @property
    def is_fitted(self) -> bool:
        return self.mean is not None

    def fit(self, values: Sequence, seed: int = 0) -> None:
        if self.mean is not None:
            return
        x = self._stack(values)
        over = (0, *range(2, x.ndim))
        deviation = x.std(over)
        self.mean = x.mean(over).reshape(self._rows)
        self.std = np.where(deviation > 0, deviation, 1.0).reshape(self._rows)

    def encode(self, values: Sequence) -> Tensor:
        require_fitted(self)
        return torch.from_numpy(((self._stack(values) - self.mean) / self.std).astype(np.float32))

    def decode(self, x: Tensor) -> np.ndarray:
        require_fitted(self)
        return x.double().cpu().numpy() * self.std + self.mean

    def files(self) -> dict[str, bytes]:
        if not isinstance(self.mean, np.ndarray):
            return {}
        saved = {"mean": self.mean.ravel().tolist(), "std": np.ravel(self.std).tolist()}
        return {STATISTICS: json.dumps(saved).encode()}

    def settings(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "standardize": self.standardize}

    def _stack(self, values: Sequence) -> np.ndarray:
        """float64 (N, *shape).

        Raises:
            ValueError: an array of another shape, or with values that are not finite.
        """
        arrays = [np.asarray(value, dtype=np.float64) for value in values]
        for i, array in enumerate(arrays):
            if array.size != np.prod(self.shape) or array.shape not in (self.shape, self.shape[1:]):
                raise ValueError(f"value {i} has shape {array.shape}, the model takes {self.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"value {i} holds numbers that are not finite")
        return np.stack(arrays).reshape(len(arrays), *self.shape) if arrays else np.zeros((0, *self.shape))
