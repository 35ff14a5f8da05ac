"""The kind `label`: one class out of several, under masked diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from ..codecs.labels import CLASSES, LabelCodec
from ..streams import Tokens
from .base import DiscreteModality


class Label(DiscreteModality):
    """A class, such as a digit or the name of a group."""

    suffix: ClassVar[str] = ".txt"
    joined: ClassVar[bool] = True
    synonyms: ClassVar[tuple[str, ...]] = ("labels", "label", "class", "folder")
    file_suffixes: ClassVar[tuple[str, ...]] = (".txt", ".cls")

    classes: list[str] | None = Field(None, description="the classes; null: those of the training data")

    @model_validator(mode="after")
    def _distinct(self):
        if self.classes is not None and len(set(self.classes)) < max(len(self.classes), 1):
            raise ValueError("classes are distinct, and at least one")
        return self

    def build_codec(self, files):
        return LabelCodec.from_files(files) if CLASSES in files else LabelCodec(self.classes)

    def build_process(self, codec):
        return self.discrete(1, len(codec.classes))

    def build_stream(self, codec):
        return Tokens.of(self.stream, length=1, states=len(codec.classes))

    def read(self, text: str) -> str:
        return text

    def from_file(self, path: Path) -> str:
        return path.read_text(encoding="utf-8").strip()

    def render(self, value: Any) -> str:
        return str(value)

    def encode_mask(self, codec, masks):
        raise ValueError("a class is known or sampled as a whole: it has no mask")

    def read_mask(self, codec, path: str):
        return self.encode_mask(codec, [path])

    def features(self, codec, values) -> np.ndarray:
        return np.eye(len(codec.classes))[codec.encode(values)[:, 0].numpy()]

    def attributes(self, codec, values) -> dict[str, np.ndarray]:
        return {"": np.array([str(value) for value in values])}
