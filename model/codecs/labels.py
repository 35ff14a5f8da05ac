"""Classes ↔ tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Codec, read_json, require_fitted

CLASSES = "classes.json"


class LabelCodec(Codec):
    """Classes ↔ int64 (N, 1), the index of the class; numbers count as the class of their text.

    classes: None: `fit` takes those of the training data, in sorted order, numbers by value.
    """

    def __init__(self, classes: Sequence[str] | None = None):
        self.classes = None if classes is None else list(classes)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> LabelCodec:
        """Raises ValueError if the file is damaged."""
        classes = read_json(files, CLASSES)
        if not isinstance(classes, list):
            raise ValueError(f"{CLASSES} is truncated or damaged")
        return cls(classes)

    @property
    def is_fitted(self) -> bool:
        return self.classes is not None

    def fit(self, values: Sequence, seed: int = 0) -> None:
        if self.classes is None:
            self.classes = sorted({class_name(value) for value in values}, key=_by_value)

    def encode(self, values: Sequence) -> Tensor:
        require_fitted(self)
        index = {name: i for i, name in enumerate(self.classes or [])}
        names = [class_name(value) for value in values]
        if unknown := [name for name in names if name not in index]:
            shown = ", ".join(list(index)[:12]) + (", …" if len(index) > 12 else "")
            raise ValueError(f"{unknown[0]!r} is not a class; there are {shown}")
        return torch.tensor([[index[name]] for name in names], dtype=torch.int64).view(len(names), 1)

    def decode(self, x: Tensor) -> list[str]:
        require_fitted(self)
        names = [*(self.classes or []), "▯"]  # the mask, in states between the steps of a sampler
        return [names[i] for i in x[:, 0].tolist()]

    def files(self) -> dict[str, bytes]:
        return {CLASSES: json.dumps(self.classes, ensure_ascii=False).encode()}


def class_name(value: Any) -> str:
    """The name of a class: text as it is, whole numbers without a fraction."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _by_value(name: str) -> tuple:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
