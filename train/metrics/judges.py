"""Judges name what a picture shows and what a caption says, in the same words, so the two can be compared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from ..data.digits import digit_of
from ..data.pairs import Pairs
from ..quality import Judge as DigitClassifier


class Judge(Protocol):
    """What the any-to-any measurements need to know about a data set."""

    def pictures(self, images: Tensor) -> list[Hashable]:
        """What each picture (n, C, S, S) in [−1, 1] shows."""

    def captions(self, texts: Sequence[str]) -> list[Hashable | None]:
        """What each caption says; None where it is not one that the data set could hold."""

    def features(self, images: Tensor) -> np.ndarray:
        """(n, d) float64 vectors for a Fréchet distance."""


class DigitJudge:
    """Digits: a support vector machine on pixels names pictures, the grammar reads captions, features are pixels."""

    def __init__(self, train: Pairs):
        self.classifier = DigitClassifier(train)

    def pictures(self, images):
        return [int(digit) for digit in self.classifier(images)]

    def captions(self, texts):
        return [digit_of(text) for text in texts]

    def features(self, images):
        return images.detach().cpu().clamp(-1.0, 1.0).flatten(1).double().numpy()


def judge_of(train: Pairs, test: Pairs) -> Judge:
    """The judge of a data set.

    Raises:
        ValueError: there is none for it.
    """
    if train.labels is not None:
        return DigitJudge(train)
    raise ValueError("this data set has no judge: digits has, and a set with emoji's arrays base and modifier")
