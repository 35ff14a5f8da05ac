"""Classes that modalities hold, and classifiers that read them off other modalities, fitted on real data."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ...sample.pipeline import Pipeline
from ...train.data.examples import Examples

MAX_CLASSES = 100  # columns with more classes are left out
COMPONENTS = 128  # principal components that more features are reduced to
SHRINKAGE = 0.1  # share of the mean variance that is added to each variance


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Classes that a modality holds: its own, or those of one of its columns.

    name: "" is the modality itself.
    """

    modality: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.modality}.{self.name}" if self.name else self.modality


class DecodedValues:
    """Values of all modalities as people see them, decoded when they are first asked for.

    Args:
        x: {process: (n, *shape)}.
        present: {process: (n,) bool} where examples lack a modality.
    """

    def __init__(self, pipeline: Pipeline, x: dict[str, Tensor], present: dict[str, Tensor] | None = None):
        self.pipeline, self.x, self._present = pipeline, x, present or {}
        self.n = len(next(iter(x.values())))
        self._decoded: dict = {}
        self._features: dict[str, np.ndarray] = {}
        self._classes: dict[str, dict[str, np.ndarray]] = {}

    @classmethod
    def of_examples(cls, pipeline: Pipeline, examples: Examples, rows: Tensor, seed: int) -> DecodedValues:
        """The examples `rows`, of several versions a random one."""
        batch = examples.at(rows.to(examples.device), torch.arange(len(rows), device=examples.device), seed, 0)
        present = {name: has[rows.to(has.device)].cpu() for name, has in examples.present.items()}
        return cls(pipeline, {name: batch[name].cpu() for name in pipeline.space}, present)

    def decoded(self, m: str):
        """The values of a modality."""
        if m not in self._decoded:
            self._decoded |= self.pipeline.decode(self.x, [m])
        return self._decoded[m]

    def present(self, m: str) -> np.ndarray:
        """(n,) bool: which of them have the modality."""
        first = next(iter(self.pipeline.names[m].values()))
        return self._present[first].numpy() if first in self._present else np.ones(self.n, dtype=bool)

    def features(self, m: str) -> np.ndarray:
        """(n, D) numbers that a classifier reads."""
        if m not in self._features:
            own = self.pipeline.modalities[m].features(self.pipeline.codecs[m], self.decoded(m))
            self._features[m] = np.nan_to_num(np.asarray(own, dtype=np.float64), posinf=0.0, neginf=0.0)
        return self._features[m]

    def classes(self, attribute: Attribute) -> np.ndarray:
        """(n,) classes."""
        m = attribute.modality
        if m not in self._classes:
            self._classes[m] = self.pipeline.modalities[m].attributes(self.pipeline.codecs[m], self.decoded(m))
        return self._classes[m][attribute.name]

    def attributes(self) -> list[Attribute]:
        """All classes that the modalities hold."""
        for m in self.pipeline.names:
            if m not in self._classes:
                self._classes[m] = self.pipeline.modalities[m].attributes(self.pipeline.codecs[m], self.decoded(m))
        return [Attribute(m, name) for m, held in self._classes.items() for name in held]


class ClassReader:
    """A classifier of an attribute by features of another modality: a support vector machine.

    The features are standardized, with a share of the mean variance added to each variance, so that features that
    hardly vary do not count more than others; many are reduced to principal components.
    """

    def __init__(self, features: np.ndarray, classes: np.ndarray):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        variance = features.var(0)
        self.mean = features.mean(0)
        self.scale = np.sqrt(variance + SHRINKAGE * variance.mean()) if variance.any() else np.ones_like(variance)
        z = (features - self.mean) / self.scale
        few = min(z.shape) <= COMPONENTS
        self.pca = None if few else PCA(COMPONENTS, svd_solver="randomized", random_state=0).fit(z)
        self.classifier = SVC(C=10.0, gamma="scale").fit(self._reduced(z), classes)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n,) classes."""
        return self.classifier.predict(self._reduced((features - self.mean) / self.scale))

    def _reduced(self, z: np.ndarray) -> np.ndarray:
        return z if self.pca is None else self.pca.transform(z)


def fit_reader(train: DecodedValues, attribute: Attribute, m: str) -> ClassReader | None:
    """The classifier of an attribute by the modality m; None where the training examples do not allow one."""
    rows = train.present(attribute.modality) & train.present(m)
    classes = train.classes(attribute)[rows]
    if not 2 <= len(set(classes.tolist())) <= MAX_CLASSES:
        return None
    return ClassReader(train.features(m)[rows], classes)
