"""From a config to its training and held-out data."""

from __future__ import annotations

import sys
from pathlib import Path

from ...configs.config import Config, Data
from ...configs.locate import locate
from ...model.build import Codecs, modalities_of
from ...sample.pipeline import Pipeline
from .dataset import Dataset, split_at_random
from .examples import Examples, encode, fit_codecs
from .packed.manifest import MANIFEST
from .packed.packed import Packed, load_packed
from .sources import open_source

TrainingData = Examples | Packed


def load_data(config: Config, codecs: Codecs, log: Path | None = None) -> tuple[TrainingData, Examples]:
    """Training and held-out examples of a config; codecs that are not fitted yet are fitted on the former.

    log: file that unreadable samples of a packed data set are named in.

    Raises:
        ValueError: no such data, or it does not fit the config.
    """
    if config.data is None:
        raise ValueError("data.source is not set: name the training data, e.g. data.source=digits")
    folder = locate(config.data.source)
    if folder is not None and (folder / MANIFEST).is_file():
        return load_packed(config, codecs, log)
    train, test = load_raw(config)
    return encode_split(train, test, config, codecs, config.data.source)


def encode_split(train: Dataset, test: Dataset, config: Config, codecs: Codecs, what: str) -> tuple[Examples, Examples]:
    """Both parts encoded, after fitting the codecs on the first; `what` names the data in errors."""
    fit_codecs(train, codecs, config.seed, what)
    return encode(train, config, codecs, what), encode(test, config, codecs, f"{what} (held out)")


def load_raw(config: Config) -> tuple[Dataset, Dataset]:
    """The training and held-out part of the data set that a config names, as raw values.

    Raises:
        ValueError: there is none.
    """
    data = config.data
    assert data is not None  # see `load_data`
    opened = open_source(data, modalities_of(config))
    if isinstance(opened, tuple):
        return opened
    train, test = split_at_random(opened, data.test_share, data.split_seed)
    if not len(train) or not len(test):
        raise ValueError(
            f"{data.source}: {len(train)} training and {len(test)} held-out examples; both parts need at least one"
        )
    return train, test


def with_data(pipeline: Pipeline, source: str, **settings) -> Config:
    """The pipeline's config with another data set, split as its own would be; `settings` of `Data` besides.

    Raises:
        ValueError: there is none.
    """
    own = pipeline.config.data
    data = Data(source=source) if own is None else own
    return pipeline.config.model_copy(update={"data": data.model_copy(update={"source": source, **settings})})


def read_rows(pipeline: Pipeline, data: str, split: str, limit: int | None) -> Examples:
    """One split of a data set as the pipeline encodes it.

    data: as `data.source` of a config.

    Raises:
        ValueError: nothing there, no such split, or data that does not fit the model.
    """
    if split not in ("train", "test"):
        raise ValueError(f"--split must be train or test, got {split!r}")
    config = with_data(pipeline, data, held_out=limit or sys.maxsize)
    part = load_data(config, pipeline.codecs)[("train", "test").index(split)]
    return part if isinstance(part, Examples) else part.examples(limit)
