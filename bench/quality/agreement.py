"""Agreement between the modalities of a model, for any mix: classes given the rest, and the rest given classes.

For every modality, or column of a table, that holds classes, and every other modality B, a classifier is fitted on real
training values of B (see `class_readers`). Side by side, on held-out examples, named for an attribute A:

- "A given B": share of right classes among those generated given B;
- "B given M: A": M holds the classes; share of the generated B in which the classifier sees the class of the example;
- "classifier on real B: A": the same for real B: the most to expect of the line above, and the rival of the first;
- "majority: A": the most frequent class of the training data, as a prediction;
- "… given rest": given all other modalities;
- "joint A: B and C": share of joint samples in which both show the same class;
- "T exact match given B": share of generated texts that are one of those of the example.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...model import distributed
from ...sample.pipeline import Pipeline
from ...train.data.examples import Examples
from .class_readers import MAX_CLASSES, Attribute, ClassReader, DecodedValues, fit_reader
from .evaluation import Evaluation, in_memory
from .roles import texts_of

if TYPE_CHECKING:
    from ...train.data.load import TrainingData

MAX_TRAIN, MAX_TEST = 2000, 2000  # examples that classifiers are fitted on and measured on, at most

Entries = dict[str, dict]


class Judges:
    """The classifiers of a data set, and the real held-out values.

    Attributes:
        real, some: all held-out values, and the first ones, on which the classifiers are measured.
        attributes: with 2 to `MAX_CLASSES` classes in the training data.
        readers: {(attribute, modality): classifier}.
        majority: {attribute: the most frequent class of the training data}.
    """

    def __init__(self, pipeline: Pipeline, train: TrainingData, test: Examples, seed: int = 0):
        examples = in_memory(train, 10 * MAX_TRAIN)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(examples))[:MAX_TRAIN])
        values = DecodedValues.of_examples(pipeline, examples, order, seed)
        self.real = DecodedValues.of_examples(pipeline, test, torch.arange(len(test)), seed)
        self.some = DecodedValues.of_examples(pipeline, test, torch.arange(len(test))[:MAX_TEST], seed)
        self.attributes: list[Attribute] = []
        self.readers: dict[tuple[Attribute, str], ClassReader] = {}
        self.majority: dict[Attribute, str] = {}
        for attribute in values.attributes():
            counts = collections.Counter(values.classes(attribute)[values.present(attribute.modality)].tolist())
            if 2 <= len(counts) <= MAX_CLASSES:
                self.attributes.append(attribute)
                self.majority[attribute] = counts.most_common(1)[0][0]
                for m in pipeline.names:
                    reader = None if m == attribute.modality else fit_reader(values, attribute, m)
                    if reader is not None:
                        self.readers[attribute, m] = reader

    def readable(self, attribute: Attribute, m: str) -> bool:
        """Whether the classes can be read off a modality."""
        return m == attribute.modality or (attribute, m) in self.readers

    def read(self, attribute: Attribute, m: str, values: DecodedValues) -> np.ndarray:
        """(n,) classes: of the modality that holds them as they are, of another one by its classifier."""
        if m == attribute.modality:
            return values.classes(attribute)
        return self.readers[attribute, m](values.features(m))

    def on_real_data(self, attribute: Attribute) -> Entries:
        """Accuracy of the classifiers of an attribute, and of the majority, on held-out examples."""
        values: Entries = {}
        truth, has = self.some.classes(attribute), self.some.present(attribute.modality)
        for m in [m for a, m in self.readers if a == attribute]:
            right = self.read(attribute, m, self.some) == truth
            values |= share(f"classifier on real {m}: {attribute}", right[has & self.some.present(m)])
        return values | share(f"majority: {attribute}", (truth == self.majority[attribute])[has])


class Agreement:
    """The metrics of this file.

    judges: of the data set; default: fitted when they are needed.
    """

    def __init__(self, evaluation: Evaluation, judges: Judges | None = None):
        self.evaluation, self.judges = evaluation, judges
        self.texts = texts_of(evaluation.pipeline.config)
        if len(evaluation.pipeline.modalities) < 2 or not (self.texts or holds_classes(evaluation)):
            raise ValueError(
                "--metrics agreement: needs a model of several modalities, of which one holds classes or is a text"
            )

    @staticmethod
    def applies(evaluation: Evaluation) -> bool:
        """Whether there are several modalities, one of which holds classes."""
        return len(evaluation.pipeline.modalities) > 1 and holds_classes(evaluation)

    def measure(self) -> Entries:
        evaluation = self.evaluation
        samples = {d: evaluation.samples.draw(d, evaluation.n) for d in evaluation.samples.directions}
        if not distributed.is_main():
            return {}
        pipeline = evaluation.pipeline
        judges = self.judges or Judges(pipeline, evaluation.train, evaluation.test, evaluation.seed)
        generated = {d: DecodedValues(pipeline, x) for d, x in samples.items()}
        values: Entries = {}
        for attribute in judges.attributes:
            for direction in evaluation.samples.directions:
                values |= self._conditional(judges, attribute, direction, generated[direction])
            values |= judges.on_real_data(attribute)
            if "joint" in generated:
                values |= self._joint(judges, attribute, generated["joint"])
        for m in self.texts:
            values |= self._exact_matches(m, generated)
        return values

    def _conditional(self, judges: Judges, attribute: Attribute, direction: str, generated: DecodedValues) -> Entries:
        """The classes of every generated modality against those of the examples that are conditioned on."""
        conditions, values = self.evaluation.samples.directions[direction], {}
        if not conditions:
            return {}
        index = self._index(direction)
        truth, has = judges.real.classes(attribute)[index], judges.real.present(attribute.modality)[index]
        for m in self.evaluation.pipeline.names:
            if m not in conditions and judges.readable(attribute, m):
                own, source = m == attribute.modality, _source(conditions)
                name = f"{attribute} given {source}" if own else f"{m} given {source}: {attribute}"
                values |= share(name, (judges.read(attribute, m, generated) == truth)[has])
        return values

    def _joint(self, judges: Judges, attribute: Attribute, generated: DecodedValues) -> Entries:
        """Classes that are read off two modalities of the same sample."""
        names = [m for m in self.evaluation.pipeline.names if judges.readable(attribute, m)]
        seen, values = {m: judges.read(attribute, m, generated) for m in names}, {}
        for first, second in itertools.combinations(names, 2):
            values |= share(f"joint {attribute}: {first} and {second}", seen[first] == seen[second])
        return values

    def _exact_matches(self, m: str, generated: dict[str, DecodedValues]) -> Entries:
        """The text m in every direction in which it is generated from something."""
        values: Entries = {}
        for direction, conditions in self.evaluation.samples.directions.items():
            if conditions and m not in conditions:
                right = self._exact(m, generated[direction].decoded(m), self._index(direction))
                values |= share(f"{m} exact match given {_source(conditions)}", right)
        return values

    def _index(self, direction: str) -> np.ndarray:
        """(n,) held-out examples that the samples of a direction are conditioned on."""
        return self.evaluation.samples.examples(direction, self.evaluation.n).numpy()

    def _exact(self, m: str, texts: Sequence[str], index: np.ndarray) -> np.ndarray:
        """Whether texts are among those of the examples `index`, of those that have one."""
        test, (name,) = self.evaluation.test, self.evaluation.pipeline.names[m].values()
        several, x = m in test.versions, test.x[name].cpu().long()
        present = test.present[name].tolist() if name in test.present else [True] * len(test)
        codec = self.evaluation.pipeline.codecs[m]
        own = {i: set(codec.decode(x[i] if several else x[i : i + 1])) for i in set(index.tolist())}
        return np.array(
            [text in own[i] for text, i in zip(texts, index.tolist(), strict=True) if present[i]], dtype=bool
        )


def holds_classes(evaluation: Evaluation) -> bool:
    """Whether a modality of the model holds classes."""
    few = DecodedValues.of_examples(evaluation.pipeline, evaluation.test, torch.arange(min(2, len(evaluation.test))), 0)
    return bool(few.attributes())


def share(name: str, hits: np.ndarray) -> Entries:
    """{name: the share of hits with its standard error}; {} where nothing could be compared."""
    n = len(hits)
    if not n:
        return {}
    value = float(hits.mean())
    return {name: {"value": value, "error": (value * (1.0 - value) / n) ** 0.5, "samples": n}}


def _source(conditions: tuple[str, ...]) -> str:
    return conditions[0] if len(conditions) == 1 else "rest"
