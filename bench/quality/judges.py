"""Judges name what a picture shows and what a caption says, in the same attributes, so the two can be compared."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...train.data.digits import digit_of
from ...train.data.packed.packed import Packed
from ...train.data.pairs import Pairs
from .captions import Attributes, Grammar, attributes
from .digits import Judge as DigitClassifier

LEVELS = 8  # histogram bins per colour channel
BLUR = 6.0 / 255.0  # noise on the copies that a tone classifier also loss_mask from: samples are never quite clean
FITTED = 10_000  # training pairs that a judge loss_mask from, at most
COMPONENTS = 200  # principal components for telling bases apart
SHRINK = 0.03  # share of the mean variance added to each


class Judge(Protocol):
    """What the any-to-any measurements need to know about a data set."""

    def pictures(self, images: Tensor) -> list[Attributes]:
        """What each picture (n, C, S, S) in [−1, 1] shows."""

    train: Pairs

    def captions(self, texts: Sequence[str]) -> list[Attributes | None]:
        """What each caption says; None where it is not one that the data set could hold."""

    def read(self, texts: Sequence[str]) -> list[Attributes | None]:
        """What can be made out of each caption, also of one that the data set could not hold."""

    def nearest(self, images: Tensor, wanted: Tensor) -> dict[str, float]:
        """Measures of pictures against the exact real picture that each was asked for, where captions determine it."""

    def features(self, images: Tensor) -> np.ndarray:
        """(n, d) float64 vectors for a Fréchet distance."""


class DigitJudge:
    """Digits: a support vector machine on pixels names pictures, the grammar reads captions, features are pixels."""

    def __init__(self, train: Pairs):
        self.train, self.classifier = train, DigitClassifier(train)

    def pictures(self, images):
        return [(("digit", str(digit)),) for digit in self.classifier(images)]

    def captions(self, texts):
        digits = [digit_of(text) for text in texts]
        return [None if digit is None else (("digit", str(digit)),) for digit in digits]

    read = captions

    def nearest(self, images, wanted):
        return {}

    def features(self, images):
        return images.detach().cpu().clamp(-1.0, 1.0).flatten(1).double().numpy()


class EmojiJudge:
    """Base and modifier by nearest class mean, skin tones by logistic regression, both fitted on real training
    pictures in seconds.

    Bases: principal components, whitened by the scatter within a base, so that what only tells tones apart counts
    little (linear discriminant analysis with one shared covariance). Tones: colour histograms of the left and the
    right half. Its own accuracy on real held-out pictures is the ceiling of what it can measure.
    """

    def __init__(self, train: Pairs, test: Pairs):
        self.train, self.grammar = train, Grammar(train, test)
        self.real = torch.cat([train.images, test.images]).float().flatten(1)
        x = _pixels(train.images)
        named = [dict(self.grammar.attributes(texts[0])) for texts in train.texts]
        self._fit_bases(x, [(a["base"], a.get("modifier", "")) for a in named])
        self._fit_tones(x, ["|".join((a.get("tone", ""), a.get("second tone", ""))) for a in named])

    def pictures(self, images):
        x = _pixels(images)
        return [
            attributes(*base, [tone for tone in tones.split("|") if tone])
            for base, tones in zip(self._bases(x), self._tones(x), strict=True)
        ]

    def captions(self, texts):
        return [self.grammar.attributes(text) if self.grammar.valid(text) else None for text in texts]

    def read(self, texts):
        return [self.grammar.attributes(text) for text in texts]

    def nearest(self, images, wanted):
        """Share of pictures nearer to the one asked for than to any other real one, and the distance, of 255."""
        drawn = images.detach().cpu().float().clamp(-1.0, 1.0).flatten(1)
        own = torch.linalg.vector_norm(drawn - wanted.float().flatten(1), dim=1)
        best = torch.cdist(drawn, self.real, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        rmse = own.mean() * 127.5 / drawn.shape[1] ** 0.5
        return {
            "text_to_image nearest is the reference": float((own <= best + 1e-4).float().mean()),
            "text_to_image RMSE to the reference": float(rmse),
        }

    def features(self, images):
        flat = _pixels(images).reshape(len(images), -1)
        return self.pca.transform(flat).astype(np.float64)[:, :64]

    def _fit_bases(self, x: np.ndarray, names: list[tuple[str, str]]) -> None:
        from sklearn.decomposition import PCA

        flat = x.reshape(len(x), -1)
        self.pca = PCA(min(COMPONENTS, *flat.shape), svd_solver="randomized", random_state=0).fit(flat)
        z = self.pca.transform(flat)
        self.names = list(dict.fromkeys(names))
        index = np.array([self.names.index(name) for name in names])
        means = np.zeros((len(self.names), z.shape[1]))
        np.add.at(means, index, z)
        means /= np.bincount(index)[:, None]
        within = z - means[index]
        values, vectors = np.linalg.eigh(within.T @ within / len(z))
        self.whiten = vectors / np.sqrt(values.clip(0.0) + SHRINK * values.mean() + 1e-12)
        self.means = means @ self.whiten

    def _bases(self, x: np.ndarray) -> list[tuple[str, str]]:
        z = self.pca.transform(x.reshape(len(x), -1)) @ self.whiten
        distance = torch.cdist(torch.from_numpy(z), torch.from_numpy(self.means))
        return [self.names[i] for i in distance.argmin(1).tolist()]

    def _fit_tones(self, x: np.ndarray, tones: list[str]) -> None:
        from sklearn.dummy import DummyClassifier
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        noisy = (x + np.random.default_rng(0).normal(0.0, BLUR, x.shape)).clip(0.0, 1.0)
        clean = _histograms(x)
        self.bins = clean.max(0) > 0
        seen = np.concatenate([clean[:, self.bins], _histograms(noisy)[:, self.bins]])
        several = len(set(tones)) > 1
        self.tones = LogisticRegression(C=300.0, max_iter=80) if several else DummyClassifier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a few more digits of the optimum change nothing
            self.tones.fit(seen, np.array(tones * 2))

    def _tones(self, x: np.ndarray) -> list[str]:
        return self.tones.predict(_histograms(x)[:, self.bins]).tolist()


def has_judge(test: Pairs) -> bool:
    """Whether `judge_of` knows the data set."""
    return test.labels is not None or (test.texts is not None and {"base", "modifier"} <= set(test.meta or ()))


def judge_of(train: Pairs | Packed, test: Pairs) -> Judge:
    """The judge of a data set, fitted on its training pictures (of a packed one, the first `FITTED`).

    Raises:
        ValueError: there is none for it.
    """
    if not has_judge(test):
        raise ValueError(
            "no judge for this data set: digits has one, and sets with the labels base and modifier (emoji); "
            "choose other --metrics"
        )
    train = train.pairs(FITTED) if isinstance(train, Packed) else train
    return DigitJudge(train) if test.labels is not None else EmojiJudge(train, test)


def _pixels(images: Tensor) -> np.ndarray:
    """(n, C, S, S) in [−1, 1] → float32 (n, S, S, C) in [0, 1]."""
    return ((images.detach().cpu().float().clamp(-1.0, 1.0) + 1.0) / 2.0).permute(0, 2, 3, 1).numpy()


def _histograms(x: np.ndarray) -> np.ndarray:
    """(n, d) square roots of colour histograms of the left and right half; a pixel counts linearly in its 2^C bins."""
    n, height, width, channels = x.shape
    place = x * (LEVELS - 1)
    low = np.floor(place).clip(max=LEVELS - 2).astype(np.int64)
    rest = place - low
    half = np.arange(n)[:, None, None] * 2 + (np.arange(width) * 2 // width)[None, None, :]
    start = np.broadcast_to(half, (n, height, width)) * LEVELS**channels
    counts = np.zeros(n * 2 * LEVELS**channels)
    for corner in range(2**channels):
        up = [corner >> c & 1 for c in range(channels)]
        code = sum((low[..., c] + up[c]) * LEVELS**c for c in range(channels))
        weight = np.prod([rest[..., c] if up[c] else 1.0 - rest[..., c] for c in range(channels)], axis=0)
        counts += np.bincount((start + code).ravel(), weight.ravel(), minlength=len(counts))
    return np.sqrt(counts.reshape(n, -1) / (height * width / 2)).astype(np.float32)
