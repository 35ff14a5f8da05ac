"""The kind `vector`: a fixed number of real features under Gaussian diffusion."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from ..codecs.arrays import ArrayCodec
from ..streams import Features
from .base import GaussianModality


class Vector(GaussianModality):
    """A vector of real numbers, each standardized over the training data."""

    suffix: ClassVar[str] = ".csv"
    joined: ClassVar[bool] = True

    size: int = Field(gt=0, description="numbers of a vector")
    names: list[str] = Field([], description="of the numbers, for files and reports")
    standardize: bool = Field(True, description="to zero mean and unit variance over the training data")

    @model_validator(mode="after")
    def _a_name_each(self):
        if self.names and len(self.names) != self.size:
            raise ValueError(f"names has {len(self.names)} entries for the {self.size} numbers of a vector")
        return self

    def build_codec(self, files: Mapping[str, bytes]) -> ArrayCodec:
        return ArrayCodec.from_files((self.size,), self.standardize, files)

    def build_process(self, codec):
        return self.gaussian(self.size)

    def build_stream(self, codec):
        return Features.of(self.stream, features=self.size, patch=self.stream.patch or self.size)

    def read(self, text: str) -> Any:
        if text.endswith(".npy"):
            return super().read(text)
        try:
            return np.array([float(part) for part in text.replace(",", " ").split()])
        except ValueError:
            raise ValueError(f"{text!r} is neither an .npy file nor numbers separated by commas") from None

    def lines(self, values) -> list[str]:
        return [",".join(f"{v:.8g}" for v in np.asarray(value)) for value in values]

    def header(self, codec) -> str | None:
        out = io.StringIO()
        csv.writer(out, lineterminator="").writerow(self.names)
        return out.getvalue() or None

    def as_raw(self, values):
        return [np.asarray(value, dtype=np.float32) for value in values]

    def features(self, codec, values) -> np.ndarray:
        """Standardized as for the network."""
        return codec.encode(values).flatten(1).double().numpy()
