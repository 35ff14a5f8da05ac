"""An example of every kind: settings, raw values, and the same values as they are decoded."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest

from anystate.configs.load import parse_config
from anystate.model.codecs.base import Codec
from anystate.model.modalities.base import Modality

RNG = np.random.default_rng(0)
TABLE = pd.DataFrame(
    {
        "age": np.round(RNG.normal(40, 12, 300), 3),
        "colour": RNG.choice(["red", "green", "blue"], 300),
        "rooms": RNG.integers(1, 4, 300),
        "income": np.where(RNG.random(300) < 0.2, np.nan, np.round(RNG.lognormal(8, 1, 300), 2)),
    }
)
IMAGES = RNG.integers(0, 17, (8, 4, 4))
COLOURS = RNG.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
VECTORS = [RNG.normal(size=3) * [1.0, 20.0, 0.1] + [0.0, 5.0, -1.0] for _ in range(50)]
SERIES = [RNG.normal(size=(2, 8)) * [[3.0], [0.2]] for _ in range(20)]
CLASSES = ["nine", "ten", "nine", "one"]


@dataclasses.dataclass(frozen=True)
class Example:
    """A modality and values of it.

    Attributes:
        decoded: the values after encoding and decoding, up to `tolerance`; None: the same.
        processes: {part: (shape of a sample, number of states or None)}.
    """

    settings: dict[str, Any]
    values: Any
    processes: dict[str, tuple[tuple[int, ...], int | None]]
    decoded: Any = None
    tolerance: float = 0.0

    @property
    def expected(self) -> Any:
        return self.values if self.decoded is None else self.decoded

    def modality(self, **settings) -> Modality:
        return make_modality({**self.settings, **settings})

    def fitted(self, **settings) -> tuple[Modality, Codec]:
        modality = self.modality(**settings)
        codec = modality.build_codec({})
        codec.fit(self.values)
        return modality, codec


def make_modality(section: dict[str, Any]) -> Modality:
    """A modality as a config of nothing else gives it."""
    raw = {"name": "one", "train": {"steps": 1, "batch": 1}, "network": {"depth": 1, "heads": 1, "head_dim": 4}}
    return parse_config({**raw, "modalities": {"it": {"stream": {"width": 8}, **section}}}, "test").modalities["it"]


EXAMPLES = {
    "image": Example(
        {"kind": "image", "channels": 1, "size": 4, "pixel_max": 16},
        IMAGES,
        {"": ((1, 4, 4), None)},
        np.round(IMAGES * 255 / 16)[..., None],
        0.5,
    ),
    "image in colour": Example(
        {"kind": "image", "channels": 3, "size": 6}, list(COLOURS), {"": ((3, 6, 6), None)}, COLOURS
    ),
    "text": Example({"kind": "text", "alphabet": "abc ", "length": 6}, ["", "a", "cab a"], {"": ((6,), 5)}),
    "uniform text": Example(
        {"kind": "text", "alphabet": "abc ", "length": 6, "process": "uniform"}, ["abc", "b"], {"": ((6,), 5)}
    ),
    "label": Example({"kind": "label"}, CLASSES, {"": ((1,), 3)}),
    "label of numbers": Example({"kind": "label"}, np.array([10, 9, 2]), {"": ((1,), 3)}, ["10", "9", "2"]),
    "label of given classes": Example(
        {"kind": "label", "classes": ["no", "yes", "maybe"], "process": "uniform"}, ["yes", "no"], {"": ((1,), 3)}
    ),
    "vector": Example({"kind": "vector", "size": 3}, VECTORS, {"": ((3,), None)}, np.stack(VECTORS), 1e-5),
    "vector as it is": Example(
        {"kind": "vector", "size": 3, "standardize": False}, VECTORS, {"": ((3,), None)}, np.stack(VECTORS), 1e-5
    ),
    "series": Example(
        {"kind": "series", "channels": 2, "length": 8}, SERIES, {"": ((2, 8), None)}, np.stack(SERIES), 1e-5
    ),
    "columns": Example(
        {"kind": "columns", "encoding": {"max_discrete_values": 8}},
        TABLE,
        {"num": ((2,), None), "cat": ((3,), 3)},
        TABLE,
        0.05,
    ),
    "columns of numbers": Example({"kind": "columns"}, TABLE[["age"]], {"num": ((1,), None)}, TABLE[["age"]], 0.05),
    "columns of classes": Example({"kind": "columns"}, TABLE[["colour"]], {"cat": ((1,), 3)}),
}


@pytest.fixture(params=EXAMPLES)
def example(request) -> Example:
    """Each of the examples."""
    return EXAMPLES[request.param]


@pytest.fixture(scope="session")
def examples() -> dict[str, Example]:
    return EXAMPLES


@pytest.fixture(scope="session")
def modality_of():
    """modality_of({"kind": …}) → the modality."""
    return make_modality


@pytest.fixture(scope="session")
def same():
    """same(a, b, tolerance): decoded values are equal."""

    def compare(a: Any, b: Any, tolerance: float) -> None:
        if isinstance(b, pd.DataFrame):
            pd.testing.assert_frame_equal(a, b, check_dtype=False, rtol=tolerance or 1e-9, atol=1e-9)
        elif isinstance(b, np.ndarray):
            np.testing.assert_allclose(np.asarray(a, dtype=np.float64), b, rtol=0, atol=tolerance)
        else:
            assert list(a) == list(b)

    return compare
