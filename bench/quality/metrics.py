"""The metrics of `anystate eval`, one class per family.

Each class checks in its constructor whether it can measure, before anything is sampled; `measure` then returns
{metric: {value, error?, …}}. Under torchrun every rank calls `measure`, and the main one gets the values. `applies`
says whether the family is among those that are measured by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ...model import distributed
from ...sample.pipeline import BATCH_SIZE
from ...train.data.examples import Examples, presence
from .agreement import Agreement
from .attribute_classifier import AttributeClassifier, fit_classifier, has_classifier
from .captions import agreement, exact_match, versions_of
from .clip import ClipScore
from .elbo import bound, has_bound, on_grid
from .evaluation import Evaluation, Metrics, in_memory
from .fid import FrechetDistance, Statistics
from .frechet import frechet, moments
from .image_folder import ImageFolder
from .roles import has_pixels, image_and_text
from .samples import given

MAX_REFERENCE = 10_000  # training images that reference statistics are computed from, at most


class LikelihoodBounds:
    """Bits per token and per dimension of held-out examples, each process alone and given the others clean.

    Examples that lack a modality are left out where it is measured or is a condition. Cells of a table without a number
    count with the noise that stands in for it.
    """

    def __init__(self, evaluation: Evaluation):
        self.evaluation, pipeline = evaluation, evaluation.pipeline
        n = min(evaluation.n, len(evaluation.test))
        batch = evaluation.test.batch(evaluation.seed, 0, range(n), n)
        self.data = {k: batch[k].cpu() for k in pipeline.space}
        everywhere = torch.ones(n, dtype=torch.bool)
        self.present = {k: batch.get(presence(k), everywhere).cpu() for k in pipeline.space}
        measured = pipeline.measured_by("elbo")
        self.names = [
            k for k in pipeline.net.outputs if has_bound(pipeline.space[k]) and pipeline.modality_of(k) in measured
        ]
        if not self.names:
            raise ValueError("--metrics elbo: bounds exist for masked and Gaussian modalities, this model has none")

    @staticmethod
    def applies(evaluation: Evaluation) -> bool:
        return any(has_bound(evaluation.pipeline.space[k]) for k in evaluation.pipeline.net.outputs)

    def measure(self) -> dict[str, dict]:
        if not distributed.is_main():
            return {}
        pair = image_and_text(self.evaluation.pipeline) and len(self.data) == 2
        values = {"pairs" if pair else "examples": {"value": len(next(iter(self.data.values())))}}
        whole = torch.stack(list(self.present.values())).all(0)
        for name in self.names:
            values |= self._bound(f"{name}_alone", name, self.present[name], conditional=False)
            if len(self.data) > 1:
                values |= self._bound(f"{name}_given", name, whole, conditional=True)
        return values

    def _bound(self, metric: str, name: str, rows: Tensor, conditional: bool) -> dict[str, dict]:
        """{metric: its entry}; {} without examples."""
        if not rows.any():
            return {}
        evaluation, pipeline = self.evaluation, self.evaluation.pipeline
        data = {k: x[rows] for k, x in self.data.items()}
        result = bound(
            pipeline.net,
            pipeline.space,
            data,
            name,
            conditional,
            evaluation.repeats,
            evaluation.seed,
            self._levels(name, data[name]),
            pipeline.config.sample.batch_size or BATCH_SIZE,
        )
        entry = {"value": result.bits, "error": result.error, "unit": result.unit, "per_sample": result.per_sample}
        return {metric: entry if bool(rows.all()) else {**entry, "samples": int(rows.sum())}}

    def _levels(self, name: str, x: Tensor) -> int | None:
        """Number of equally spaced values that the data of a process take; None: they are continuous."""
        pipeline, m = self.evaluation.pipeline, self.evaluation.pipeline.modality_of(name)
        levels = pipeline.modalities[m].grid_levels(pipeline.codecs[m])
        return levels if levels and on_grid(x, levels) else None


class LabelAgreement:
    """Agreement of images and captions in every direction, by the attributes that a classifier assigns to both.

    classifier: of the data set; default: fitted here.
    """

    def __init__(self, evaluation: Evaluation, classifier: AttributeClassifier | None = None):
        self.image, self.text = evaluation.image("labels"), evaluation.text("labels")
        if not has_pixels(evaluation.pipeline, self.image):
            raise ValueError("--metrics labels: attribute classifiers need pixels, this model generates latents")
        if {self.image, self.text} & set(evaluation.test.present):
            raise ValueError(
                "--metrics labels: some held-out examples lack the image or the text; choose other --metrics"
            )
        self.evaluation = evaluation
        self.classifier = classifier or fit_classifier(evaluation.train, evaluation.test, self.image, self.text)
        self.to_image, self.to_text = (given(evaluation.pipeline, m) for m in (self.text, self.image))

    @staticmethod
    def applies(evaluation: Evaluation) -> bool:
        pipeline, test = evaluation.pipeline, evaluation.test
        pair = image_and_text(pipeline)
        if pair is None or not has_pixels(pipeline, pair[0]) or set(pair) & set(test.present):
            return False
        return {*pair} <= set(pipeline.generated) and has_classifier(test, pair[1])

    def measure(self) -> dict[str, dict]:
        wanted = (self.to_image, self.to_text, "joint")
        to_image, to_text, joint = (self.evaluation.samples.draw(d, self.evaluation.n) for d in wanted)
        if not distributed.is_main():
            return {}
        values = self._conditional(to_image, to_text)
        values |= self._joint(joint)
        values |= _with_prefix("judge on real pictures", self._on_real_images())
        return {name: {"value": value} for name, value in values.items()}

    def _conditional(self, to_image: dict[str, Tensor], to_text: dict[str, Tensor]) -> dict[str, float]:
        """Agreement with the held-out pairs that the samples are conditioned on."""
        evaluation, classifier = self.evaluation, self.classifier
        index, texts = evaluation.samples.examples(self.to_image, evaluation.n), versions_of(evaluation.test, self.text)
        references = [texts[i] for i in index.tolist()]
        truth = classifier.caption_attributes([captions[0] for captions in references])
        written = evaluation.decode_texts(self.text, to_text[self.text])
        images = to_image[self.image]
        values = {"image_to_text exact": exact_match(written, references)}
        read = classifier.caption_attributes(written, strict=False)
        values |= _with_prefix("image_to_text", agreement(read, truth))
        values |= _with_prefix("text_to_image", agreement(classifier.image_attributes(images), truth))
        values |= classifier.distance_to_reference(images, evaluation.test.first(index)[self.image])
        return values

    def _joint(self, samples: dict[str, Tensor]) -> dict[str, float]:
        classifier, images = self.classifier, samples[self.image]
        shown = classifier.image_attributes(images)
        written = classifier.caption_attributes(self.evaluation.decode_texts(self.text, samples[self.text]))
        real = moments(classifier.features(classifier.train))
        return {
            "joint valid": _share(caption is not None for caption in written),
            "joint agree": _share(caption == image for caption, image in zip(written, shown, strict=True)),
            "joint frechet": frechet(*moments(classifier.features(images)), *real),
        }

    def _on_real_images(self) -> dict[str, float]:
        """Accuracy of the classifier on held-out pairs: the highest values that samples can be expected to reach."""
        test = self.evaluation.test
        truth = self.classifier.caption_attributes([captions[0] for captions in versions_of(test, self.text)])
        return agreement(self.classifier.image_attributes(test.first(slice(None))[self.image]), truth)


class FidScores:
    """Fréchet distance of the images of every direction to reference statistics."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.image = evaluation, evaluation.image("fid")
        self.shape = self._decode(evaluation.test.first(slice(0, 1))[self.image]).shape[1:]
        height, width, channels = self.shape
        self.distance = FrechetDistance(evaluation.features, (channels, height, width), evaluation.device)
        self.reference = self._reference()

    @staticmethod
    def applies(evaluation: Evaluation) -> bool:
        return False  # on request only: its network has to be downloaded

    def measure(self) -> dict[str, dict]:
        evaluation, reference, values = self.evaluation, self.reference, {}
        for direction, conditions in evaluation.samples.directions.items():
            if self.image in conditions:
                continue
            samples = evaluation.samples.draw(direction, evaluation.n)
            if samples:
                value = self.distance(self._decode(samples[self.image]), reference)
                values[direction] = {"value": value, "samples": evaluation.n, "reference": reference.n}
        if distributed.is_main():
            real = self._real(evaluation.test)
            values["real held-out pictures"] = {"value": self.distance(real, reference), "samples": len(real)}
        return values

    def _decode(self, x: Tensor) -> np.ndarray:
        return self.evaluation.decode_images(self.image, x)

    def _real(self, examples: Examples) -> np.ndarray:
        """The real images, uint8 (n, S, S, C), of the examples that have one."""
        has = examples.present.get(self.image)
        rows = torch.arange(len(examples)) if has is None else has.cpu().nonzero()[:, 0]
        return self._decode(examples.first(rows)[self.image])

    def _reference(self) -> Statistics:
        """Reference statistics: read, or computed from training images and stored."""
        evaluation = self.evaluation
        name = re.sub(r"[^a-zA-Z0-9.-]+", "_", self.distance.name)
        path = evaluation.reference or evaluation.samples.out / f"reference-{name}.npz"
        if path.is_dir():
            return self.distance.statistics(ImageFolder(path, self.shape))
        if path.exists() or path.suffix != ".npz":
            return Statistics.load(path)
        statistics = self.distance.statistics(self._real(in_memory(evaluation.train, MAX_REFERENCE)))
        if distributed.is_main():
            statistics.save(path)
        return statistics


class ClipScores:
    """CLIP score of the image-caption pairs of every direction, and of real pairs."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.image, self.text = evaluation, evaluation.image("clip"), evaluation.text("clip")
        self.score = ClipScore(evaluation.clip, evaluation.device)

    @staticmethod
    def applies(evaluation: Evaluation) -> bool:
        return False  # on request only: its network has to be downloaded

    def measure(self) -> dict[str, dict]:
        evaluation, values = self.evaluation, {}
        for direction, conditions in evaluation.samples.directions.items():
            if {self.image, self.text} <= set(conditions):
                continue
            samples = evaluation.samples.draw(direction, evaluation.n)
            if samples:
                values[direction] = {"value": self._score(samples), "samples": evaluation.n}
        if distributed.is_main():
            rows = self._real_pairs()
            real = self._score(evaluation.test.first(rows))
            values["real held-out pairs"] = {"value": real, "samples": len(rows)}
        return values

    def _real_pairs(self) -> Tensor:
        """The rows of the held-out examples that have both."""
        has = torch.ones(len(self.evaluation.test), dtype=torch.bool)
        for m in (self.image, self.text):
            has &= self.evaluation.test.present.get(m, has).cpu()
        return has.nonzero()[:, 0]

    def _score(self, x: dict[str, Tensor]) -> float:
        images = self.evaluation.decode_images(self.image, x[self.image])
        return self.score(images, self.evaluation.decode_texts(self.text, x[self.text]))


METRICS: dict[str, type[Metrics]] = {
    "elbo": LikelihoodBounds,
    "labels": LabelAgreement,
    "fid": FidScores,
    "clip": ClipScores,
    "agreement": Agreement,
}


def _with_prefix(prefix: str, shares: dict[str, float]) -> dict[str, float]:
    """The shares of `agreement` under the names of metrics: all attributes, their mean, and each."""
    names = {"all": "all attributes", "mean": "attributes"}
    return {f"{prefix} {names.get(name, name)}": value for name, value in shares.items()}


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))
