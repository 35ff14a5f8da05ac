"""The metrics of `anystate eval`, one class per family.

Each class checks in its constructor whether it can measure, before anything is sampled; `measure` then returns
{metric: {value, error?, …}}. Under torchrun every rank calls `measure`, and the main one gets the values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...model import distributed
from ...model.codecs.pixels import PixelCodec
from ...sample.pipeline import Pipeline
from ...train.data.packed.packed import Packed
from ...train.data.pairs import Pairs
from .attribute_classifier import AttributeClassifier, fit_classifier
from .captions import agreement, exact_match
from .clip import CLIP, ClipScore
from .elbo import bound
from .fid import INCEPTION, FrechetDistance, Statistics
from .frechet import frechet, moments
from .image_folder import ImageFolder
from .samples import DIRECTIONS, Samples

MAX_REFERENCE = 10_000  # training images that reference statistics are computed from, at most


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The object of the metrics: a model with one image and one text modality, its data, and its samples.

    n: samples per direction. seed, repeats: of the likelihood bounds. features, reference: of FID. clip: CLIP model.
    """

    pipeline: Pipeline
    train: Pairs | Packed
    test: Pairs
    samples: Samples
    n: int
    seed: int = 0
    repeats: int = 8
    features: str = INCEPTION
    reference: Path | None = None
    clip: str = CLIP

    @property
    def image(self) -> str:
        return self.pipeline.images[0]

    @property
    def text(self) -> str:
        return self.pipeline.texts[0]

    @property
    def in_pixels(self) -> bool:
        """Whether the model generates pixels, not latents."""
        return isinstance(self.pipeline.codecs[self.image], PixelCodec)

    @property
    def device(self) -> torch.device:
        return next(self.pipeline.net.parameters()).device

    def decode_images(self, x: Tensor) -> np.ndarray:
        """uint8 (n, S, S, C) images."""
        return self.pipeline.codecs[self.image].decode(x)

    def decode_texts(self, x: Tensor) -> list[str]:
        return self.pipeline.codecs[self.text].decode(x)


class LikelihoodBounds:
    """Bits per token and per dimension of held-out pairs, each modality alone and given the other clean."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.pairs = evaluation, min(evaluation.n, len(evaluation.test))
        self.data = evaluation.test.batch(evaluation.seed, 0, range(self.pairs), self.pairs)

    def measure(self) -> dict[str, dict]:
        if not distributed.is_main():
            return {}
        values = {"pairs": {"value": self.pairs}}
        for name in self.evaluation.pipeline.net.head:
            values[f"{name}_alone"] = self._bound(name, conditional=False)
            values[f"{name}_given"] = self._bound(name, conditional=True)
        return values

    def _bound(self, name: str, conditional: bool) -> dict:
        evaluation, pipeline = self.evaluation, self.evaluation.pipeline
        levels = None
        if name == evaluation.image and evaluation.in_pixels:
            levels = int(pipeline.config.modalities[name].pixel_max) + 1
        result = bound(
            pipeline.net,
            pipeline.space,
            self.data,
            name,
            conditional,
            evaluation.repeats,
            evaluation.seed,
            levels,
            pipeline.config.sample.batch_size,
        )
        return {"value": result.bits, "error": result.error, "unit": result.unit, "per_sample": result.per_sample}


class LabelAgreement:
    """Agreement of images and captions in every direction, by the attributes that a classifier assigns to both.

    classifier: of the data set; default: fitted here.
    """

    def __init__(self, evaluation: Evaluation, classifier: AttributeClassifier | None = None):
        if not evaluation.in_pixels:
            raise ValueError("--metrics labels: attribute classifiers need pixels, this model generates latents")
        self.evaluation = evaluation
        self.classifier = classifier or fit_classifier(evaluation.train, evaluation.test)

    def measure(self) -> dict[str, dict]:
        samples = {d: self.evaluation.samples.draw(d, self.evaluation.n) for d in DIRECTIONS}
        if not distributed.is_main():
            return {}
        values = self._conditional(samples["text_to_image"], samples["image_to_text"])
        values |= self._joint(samples["joint"])
        values |= _with_prefix("judge on real pictures", self._on_real_images())
        return {name: {"value": value} for name, value in values.items()}

    def _conditional(self, to_image: dict[str, Tensor], to_text: dict[str, Tensor]) -> dict[str, float]:
        """Agreement with the held-out pairs that the samples are conditioned on."""
        evaluation, classifier = self.evaluation, self.classifier
        index, texts = evaluation.samples.pairs(evaluation.n), self._texts()
        references = [texts[i] for i in index.tolist()]
        truth = classifier.caption_attributes([captions[0] for captions in references])
        written = evaluation.decode_texts(to_text[evaluation.text])
        images = to_image[evaluation.image]
        values = {"image_to_text exact": exact_match(written, references)}
        read = classifier.caption_attributes(written, strict=False)
        values |= _with_prefix("image_to_text", agreement(read, truth))
        values |= _with_prefix("text_to_image", agreement(classifier.image_attributes(images), truth))
        values |= classifier.distance_to_reference(images, evaluation.test.images[index])
        return values

    def _joint(self, samples: dict[str, Tensor]) -> dict[str, float]:
        classifier, images = self.classifier, samples[self.evaluation.image]
        shown = classifier.image_attributes(images)
        written = classifier.caption_attributes(self.evaluation.decode_texts(samples[self.evaluation.text]))
        real = moments(classifier.features(classifier.train.images))
        return {
            "joint valid": _share(caption is not None for caption in written),
            "joint agree": _share(caption == image for caption, image in zip(written, shown, strict=True)),
            "joint frechet": frechet(*moments(classifier.features(images)), *real),
        }

    def _on_real_images(self) -> dict[str, float]:
        """Accuracy of the classifier on held-out pairs: the highest values that samples can be expected to reach."""
        truth = self.classifier.caption_attributes([captions[0] for captions in self._texts()])
        return agreement(self.classifier.image_attributes(self.evaluation.test.images), truth)

    def _texts(self) -> list[list[str]]:
        """All captions of every held-out pair."""
        test = self.evaluation.test
        return test.texts or [self.evaluation.decode_texts(captions) for captions in test.captions]


class FidScores:
    """Fréchet distance of joint images and of images of held-out captions to reference statistics."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation
        self.shape = evaluation.decode_images(evaluation.test.images[:1]).shape[1:]
        height, width, channels = self.shape
        self.distance = FrechetDistance(evaluation.features, (channels, height, width), evaluation.device)
        self.reference = self._reference()

    def measure(self) -> dict[str, dict]:
        evaluation, reference, values = self.evaluation, self.reference, {}
        for direction in ("joint", "text_to_image"):
            samples = evaluation.samples.draw(direction, evaluation.n)
            if samples:
                value = self.distance(evaluation.decode_images(samples[evaluation.image]), reference)
                values[direction] = {"value": value, "samples": evaluation.n, "reference": reference.n}
        if distributed.is_main():
            real = evaluation.decode_images(evaluation.test.images)
            values["real held-out pictures"] = {"value": self.distance(real, reference), "samples": len(real)}
        return values

    def _reference(self) -> Statistics:
        """Reference statistics: read, or computed from training images and stored."""
        evaluation = self.evaluation
        name = re.sub(r"[^a-zA-Z0-9.-]+", "_", self.distance.name)
        path = evaluation.reference or evaluation.samples.out / f"reference-{name}.npz"
        if path.is_dir():
            return self.distance.statistics(ImageFolder(path, self.shape))
        if path.exists() or path.suffix != ".npz":
            return Statistics.load(path)
        train = evaluation.train
        train = train.pairs(MAX_REFERENCE) if isinstance(train, Packed) else train
        statistics = self.distance.statistics(evaluation.decode_images(train.images))
        if distributed.is_main():
            statistics.save(path)
        return statistics


class ClipScores:
    """CLIP score of the image-caption pairs of every direction, and of real pairs."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.score = evaluation, ClipScore(evaluation.clip, evaluation.device)

    def measure(self) -> dict[str, dict]:
        evaluation, values = self.evaluation, {}
        for direction in DIRECTIONS:
            samples = evaluation.samples.draw(direction, evaluation.n)
            if samples:
                value = self._score(samples[evaluation.image], samples[evaluation.text])
                values[direction] = {"value": value, "samples": evaluation.n}
        if distributed.is_main():
            test = evaluation.test
            real = self._score(test.images, test.captions[:, 0])
            values["real held-out pairs"] = {"value": real, "samples": len(test)}
        return values

    def _score(self, images: Tensor, texts: Tensor) -> float:
        return self.score(self.evaluation.decode_images(images), self.evaluation.decode_texts(texts))


METRICS = {"elbo": LikelihoodBounds, "labels": LabelAgreement, "fid": FidScores, "clip": ClipScores}


def _with_prefix(prefix: str, shares: dict[str, float]) -> dict[str, float]:
    """The shares of `agreement` under the names of metrics: all attributes, their mean, and each."""
    names = {"all": "all attributes", "mean": "attributes"}
    return {f"{prefix} {names.get(name, name)}": value for name, value in shares.items()}


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))
