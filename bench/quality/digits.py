"""How good the samples of a digits model are, judged by a classifier fitted on the real training pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ...sample.pipeline import Pipeline
from ...train.data.digits import captions_of, digit_of
from ...train.data.pairs import Pairs


class Judge:
    """Names the digit in a picture: a support vector machine on pixels, fitted on real training pictures."""

    def __init__(self, train: Pairs):
        from sklearn.svm import SVC

        self.train = train
        self.classifier = SVC(gamma="scale", C=10.0).fit(_flat(train.images), train.labels.numpy())

    def __call__(self, images: Tensor) -> np.ndarray:
        return self.classifier.predict(_flat(images))

    def accuracy(self, pairs: Pairs) -> float:
        """Share of real pictures that it names correctly: the ceiling of text → image."""
        return float((self(pairs.images) == pairs.labels.numpy()).mean())

    def nearest_train(self, images: Tensor) -> np.ndarray:
        """Root-mean-square distance of each picture to its nearest training picture."""
        return (torch.cdist(_tensor(images), _tensor(self.train.images)).min(1).values).numpy() / _pixels(images)


@dataclasses.dataclass(frozen=True)
class Quality:
    """The demo's metrics; all but the ratio are shares of samples.

    text_to_image: the judge sees the digit asked for. image_to_text: captions of held-out pictures that name
    the right digit. joint: caption in the grammar and naming the digit the judge sees. nearest_train_ratio: median
    nearest-training-picture distance of joint samples over that of held-out pictures (copies would make it 0).
    """

    text_to_image: float
    image_to_text: float
    joint: float
    nearest_train_ratio: float


def measure(
    system: Pipeline, judge: Judge, test: Pairs, n: int = 500, seed: int = 0, progress: bool = False
) -> Quality:
    """Sample every direction and judge it: n pictures of n captions, a caption per held-out picture, n joint pairs."""
    (image,), (text,) = system.images, system.texts
    codec = system.codecs[text]
    common = {"seed": seed, "chunk": system.config.sample.batch_size, "progress": progress}

    asked = np.arange(n) % 10
    rng = np.random.default_rng(seed)
    prompts = codec.encode([str(rng.choice(captions_of(d))) for d in asked])
    drawn = system.sample({text: prompts}, **common)

    named = system.sample({image: test.images}, **common)
    read = [digit_of(caption) for caption in codec.decode(named[text])]

    joint = system.sample(n=n, **common)
    said = [digit_of(caption) for caption in codec.decode(joint[text])]
    distance = np.median(judge.nearest_train(joint[image]))
    return Quality(
        text_to_image=float((judge(drawn[image]) == asked).mean()),
        image_to_text=float(np.mean([r == int(d) for r, d in zip(read, test.labels, strict=True)])),
        joint=float(np.mean([s == int(d) for s, d in zip(said, judge(joint[image]), strict=True)])),
        nearest_train_ratio=float(distance / np.median(judge.nearest_train(test.images))),
    )


def _tensor(images: Tensor) -> Tensor:
    return images.cpu().float().clamp(-1.0, 1.0).flatten(1)


def _flat(images: Tensor) -> np.ndarray:
    return _tensor(images).numpy()


def _pixels(images: Tensor) -> float:
    return float(images[0].numel() ** 0.5)
