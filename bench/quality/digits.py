"""Quality of the samples of a digits model, measured with a classifier fitted on the real training images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...sample.pipeline import Pipeline
from ...train.data.digits import captions_of, digit_of
from ...train.data.examples import Examples
from .captions import versions_of
from .roles import require_one, texts_of


class DigitClassifier:
    """Predicts the digit of an image: a support vector machine on pixels, fitted on real training images.

    Args:
        train: examples with the annotation `digit`.
        image: name of the image modality.
    """

    def __init__(self, train: Examples, image: str):
        from sklearn.svm import SVC

        self.image, self.images = image, train.first(slice(None))[image]
        self.classifier = SVC(gamma="scale", C=10.0).fit(_flat(self.images).numpy(), train.labels["digit"])

    def __call__(self, images: Tensor) -> np.ndarray:
        """The digits (n,) of images (n, C, S, S) in [−1, 1]."""
        return self.classifier.predict(_flat(images).numpy())

    def accuracy(self, examples: Examples) -> float:
        """Accuracy on real images: the highest value that `text_to_image` can be expected to reach."""
        return float((self(examples.first(slice(None))[self.image]) == examples.labels["digit"]).mean())

    def nearest_train(self, images: Tensor) -> np.ndarray:
        """Root-mean-square distance of each image to its nearest training image."""
        distance = torch.cdist(_flat(images), _flat(self.images)).min(1).values
        return distance.numpy() / float(images[0].numel() ** 0.5)


def is_digits(examples: Examples, text: str) -> bool:
    """Whether examples have digits as annotations and captions that the grammar knows."""
    if "digit" not in examples.labels:
        return False
    return all(digit_of(caption) is not None for versions in versions_of(examples, text) for caption in versions)


@dataclasses.dataclass(frozen=True)
class Quality:
    """The metrics of the demo; all but the ratio are shares of samples.

    text_to_image: the classifier sees the digit of the caption. image_to_text: captions of held-out images that name
    the right digit. joint: the caption is in the grammar and names the digit that the classifier sees.
    nearest_train_ratio: median distance of joint samples to the nearest training image, divided by that of held-out
    images (0 for copies of training images).
    """

    text_to_image: float
    image_to_text: float
    joint: float
    nearest_train_ratio: float


def measure(
    pipeline: Pipeline, classifier: DigitClassifier, test: Examples, n: int = 500, seed: int = 0, progress: bool = False
) -> Quality:
    """Sample in every direction and measure.

    Args:
        n: images sampled from captions, and joint samples; one caption is sampled for every held-out image.
    """
    image, text = classifier.image, require_one(texts_of(pipeline.config), "text", "labels")
    codec, held_out = pipeline.codecs[text], test.first(slice(None))[image]
    options = {"seed": seed, "batch_size": pipeline.config.sample.batch_size, "progress": progress}

    digits = np.arange(n) % 10
    rng = np.random.default_rng(seed)
    prompts = codec.encode([str(rng.choice(captions_of(digit))) for digit in digits])
    images = pipeline.sample({text: prompts}, **options)[image]
    written = codec.decode(pipeline.sample({image: held_out}, **options)[text])
    joint = pipeline.sample(n=n, **options)

    distance = np.median(classifier.nearest_train(joint[image]))
    return Quality(
        text_to_image=float((classifier(images) == digits).mean()),
        image_to_text=_share_naming(written, test.labels["digit"]),
        joint=_share_naming(codec.decode(joint[text]), classifier(joint[image])),
        nearest_train_ratio=float(distance / np.median(classifier.nearest_train(held_out))),
    )


def _share_naming(captions: Sequence[str], digits: Sequence[int]) -> float:
    """Share of captions that name the digit of their image."""
    named = [digit_of(caption) for caption in captions]
    return float(np.mean([name == int(digit) for name, digit in zip(named, digits, strict=True)]))


def _flat(images: Tensor) -> Tensor:
    return images.cpu().float().clamp(-1.0, 1.0).flatten(1)
