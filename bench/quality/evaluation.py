"""The object of the metrics: a model, its data and its samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...sample.pipeline import Pipeline
from ...train.data.examples import Examples
from ...train.data.load import TrainingData
from .clip import CLIP
from .fid import INCEPTION
from .roles import images_of, require_one, texts_of
from .samples import Samples


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model, its data, and its samples.

    n: samples per direction. seed, repeats: of the likelihood bounds. features, reference: of FID. clip: CLIP model.
    """

    pipeline: Pipeline
    train: TrainingData
    test: Examples
    samples: Samples
    n: int
    seed: int = 0
    repeats: int = 8
    features: str = INCEPTION
    reference: Path | None = None
    clip: str = CLIP

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def image(self, family: str) -> str:
        """The image modality; ValueError, naming the family of metrics, unless there is exactly one."""
        return require_one(images_of(self.pipeline.config), "image", family)

    def text(self, family: str) -> str:
        """The text modality; ValueError, naming the family of metrics, unless there is exactly one."""
        return require_one(texts_of(self.pipeline.config), "text", family)

    def decode_images(self, m: str, x: Tensor) -> np.ndarray:
        """uint8 (n, S, S, C) images."""
        return self.pipeline.codecs[m].decode(x)

    def decode_texts(self, m: str, x: Tensor) -> list[str]:
        return self.pipeline.codecs[m].decode(x)


class Metrics(Protocol):
    """A family of metrics. Its constructor checks, before anything is sampled, whether it can measure."""

    def __init__(self, evaluation: Evaluation): ...

    @staticmethod
    def applies(evaluation: Evaluation) -> bool:
        """Whether the family is among those that are measured by default."""

    def measure(self) -> dict[str, dict]:
        """{metric: {value, error?, …}}; every rank calls this, and the main one gets the values."""


def in_memory(data: TrainingData, limit: int) -> Examples:
    """Training data in memory: of a packed data set, the first `limit` examples."""
    return data if isinstance(data, Examples) else data.examples(limit)
