"""Classifiers that describe images and captions by the same attributes, so that the two can be compared."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...train.data.digits import digit_of
from ...train.data.examples import Examples
from ...train.data.load import TrainingData
from .captions import Attributes, Grammar, attributes, versions_of
from .digits import DigitClassifier, is_digits
from .evaluation import in_memory

LEVELS = 8  # histogram bins per colour channel
AUGMENTATION_STD = 6.0 / 255.0  # noise on copies of the images that tones are also fitted on: samples have some noise
MAX_TRAIN = 10_000  # training pairs that a classifier is fitted on, at most
COMPONENTS = 200  # principal components for classifying bases
SHRINKAGE = 0.03  # share of the mean variance that is added to each variance


class AttributeClassifier(Protocol):
    """Attributes of the images and captions of one data set.

    train: the encoded images that the classifier was fitted on.
    """

    train: Tensor

    def image_attributes(self, images: Tensor) -> list[Attributes]:
        """Predicted attributes of images (n, C, S, S) in [−1, 1]."""

    def caption_attributes(self, texts: Sequence[str], strict: bool = True) -> list[Attributes | None]:
        """Attributes of captions; None where a caption cannot be parsed.

        strict: also None where the caption could not occur in the data set.
        """

    def distance_to_reference(self, images: Tensor, reference: Tensor) -> dict[str, float]:
        """Metrics of images against the real image of the same caption, where captions determine the image."""

    def features(self, images: Tensor) -> np.ndarray:
        """(n, d) float64 vectors for a Fréchet distance."""


class DigitAttributeClassifier:
    """Digits: a support vector machine classifies images, the grammar parses captions, features are pixels."""

    def __init__(self, train: Examples, image: str):
        self.classifier = DigitClassifier(train, image)
        self.train = self.classifier.images

    def image_attributes(self, images: Tensor) -> list[Attributes]:
        return [(("digit", str(digit)),) for digit in self.classifier(images)]

    def caption_attributes(self, texts: Sequence[str], strict: bool = True) -> list[Attributes | None]:
        digits = [digit_of(text) for text in texts]
        return [None if digit is None else (("digit", str(digit)),) for digit in digits]

    def distance_to_reference(self, images: Tensor, reference: Tensor) -> dict[str, float]:
        return {}

    def features(self, images: Tensor) -> np.ndarray:
        return images.detach().cpu().clamp(-1.0, 1.0).flatten(1).double().numpy()


class EmojiAttributeClassifier:
    """Base and modifier by nearest class mean, skin tones by logistic regression, both fitted on training images.

    Bases: principal components, whitened by the scatter within a base, so that directions in which only tones differ
    have little weight (linear discriminant analysis with one shared covariance). Tones: colour histograms of the left
    and the right half. The accuracy on real held-out images is the highest value that samples can be expected to reach.
    """

    def __init__(self, train: Examples, test: Examples, image: str, text: str):
        self.train, self.grammar = train.first(slice(None))[image], Grammar(train, test, text=text)
        self.real = torch.cat([self.train, test.first(slice(None))[image]]).float().flatten(1)
        x = _pixels(self.train)
        labels = [dict(self.grammar.attributes(texts[0])) for texts in versions_of(train, text)]
        self._fit_bases(x, [(a["base"], a.get("modifier", "")) for a in labels])
        self._fit_tones(x, ["|".join((a.get("tone", ""), a.get("second tone", ""))) for a in labels])

    def image_attributes(self, images: Tensor) -> list[Attributes]:
        x = _pixels(images)
        found = []
        for (base, modifier), tones in zip(self._bases(x), self._tones(x), strict=True):
            found.append(attributes(base, modifier, [tone for tone in tones.split("|") if tone]))
        return found

    def caption_attributes(self, texts: Sequence[str], strict: bool = True) -> list[Attributes | None]:
        return [self.grammar.attributes(text) if not strict or self.grammar.valid(text) else None for text in texts]

    def distance_to_reference(self, images: Tensor, reference: Tensor) -> dict[str, float]:
        """Share of images that are nearer to their reference than to any other real image, and the RMSE of 255."""
        drawn = images.detach().cpu().float().clamp(-1.0, 1.0).flatten(1)
        own = torch.linalg.vector_norm(drawn - reference.float().flatten(1), dim=1)
        best = torch.cdist(drawn, self.real, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        rmse = own.mean() * 127.5 / drawn.shape[1] ** 0.5
        return {
            "text_to_image nearest is the reference": float((own <= best + 1e-4).float().mean()),
            "text_to_image RMSE to the reference": float(rmse),
        }

    def features(self, images: Tensor) -> np.ndarray:
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
        self.whiten = vectors / np.sqrt(values.clip(0.0) + SHRINKAGE * values.mean() + 1e-12)
        self.means = means @ self.whiten

    def _bases(self, x: np.ndarray) -> list[tuple[str, str]]:
        z = self.pca.transform(x.reshape(len(x), -1)) @ self.whiten
        distance = torch.cdist(torch.from_numpy(z), torch.from_numpy(self.means))
        return [self.names[i] for i in distance.argmin(1).tolist()]

    def _fit_tones(self, x: np.ndarray, tones: list[str]) -> None:
        from sklearn.dummy import DummyClassifier
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        noisy = (x + np.random.default_rng(0).normal(0.0, AUGMENTATION_STD, x.shape)).clip(0.0, 1.0)
        clean = _histograms(x)
        self.bins = clean.max(0) > 0
        inputs = np.concatenate([clean[:, self.bins], _histograms(noisy)[:, self.bins]])
        several = len(set(tones)) > 1
        self.tones = LogisticRegression(C=300.0, max_iter=80) if several else DummyClassifier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # more iterations do not change the predictions
            self.tones.fit(inputs, np.array(tones * 2))

    def _tones(self, x: np.ndarray) -> list[str]:
        return self.tones.predict(_histograms(x)[:, self.bins]).tolist()


def has_classifier(test: Examples, text: str) -> bool:
    """Whether `fit_classifier` supports the data set."""
    return is_digits(test, text) or {"base", "modifier"} <= set(test.labels)


def fit_classifier(train: TrainingData, test: Examples, image: str, text: str) -> AttributeClassifier:
    """The classifier of a data set, fitted on its training images (of a packed one, the first `MAX_TRAIN`).

    Args:
        image, text: names of the modalities.

    Raises:
        ValueError: there is none for the data set.
    """
    if not has_classifier(test, text):
        raise ValueError(
            "no attribute classifier for this data set: there is one for digits and for sets with the arrays base and "
            "modifier (emoji); choose other --metrics"
        )
    train = in_memory(train, MAX_TRAIN)
    if is_digits(test, text):
        return DigitAttributeClassifier(train, image)
    return EmojiAttributeClassifier(train, test, image, text)


def _pixels(images: Tensor) -> np.ndarray:
    """(n, C, S, S) in [−1, 1] → float32 (n, S, S, C) in [0, 1]."""
    return ((images.detach().cpu().float().clamp(-1.0, 1.0) + 1.0) / 2.0).permute(0, 2, 3, 1).numpy()


def _histograms(x: np.ndarray) -> np.ndarray:
    """(n, d) square roots of colour histograms of the left and the right half.

    Bins are soft: a pixel is split linearly between the 2^C bins around its colour.
    """
    n, height, width, channels = x.shape
    scaled = x * (LEVELS - 1)
    low = np.floor(scaled).clip(max=LEVELS - 2).astype(np.int64)
    rest = scaled - low
    half = np.arange(n)[:, None, None] * 2 + (np.arange(width) * 2 // width)[None, None, :]
    start = np.broadcast_to(half, (n, height, width)) * LEVELS**channels
    counts = np.zeros(n * 2 * LEVELS**channels)
    for corner in range(2**channels):
        up = [corner >> c & 1 for c in range(channels)]
        code = sum((low[..., c] + up[c]) * LEVELS**c for c in range(channels))
        weight = np.prod([rest[..., c] if up[c] else 1.0 - rest[..., c] for c in range(channels)], axis=0)
        counts += np.bincount((start + code).ravel(), weight.ravel(), minlength=len(counts))
    return np.sqrt(counts.reshape(n, -1) / (height * width / 2)).astype(np.float32)
