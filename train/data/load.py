"""From a config to its training and held-out data."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from ...configs.locate import locate, not_found
from ...sample.pipeline import Pipeline
from . import digits, pairs
from .packed.packed import Packed, load_packed


def load_data(pipeline: Pipeline, log: Path | None = None) -> tuple[pairs.Pairs | Packed, pairs.Pairs]:
    """Training and held-out pairs of a pipeline with one image and one text modality.

    log: file that unreadable samples of a packed data set are named in.

    Raises:
        ValueError: no such data, or it does not fit the config.
    """
    if len(pipeline.images) != 1 or len(pipeline.texts) != 1:
        raise ValueError("image-text data needs exactly one image and one text modality in the config")
    image, text = pipeline.images[0], pipeline.texts[0]
    data, codecs = pipeline.config.data, pipeline.codecs
    args = (codecs[image].encode, codecs[text].encode, data.test_share, data.split_seed)
    if data.name == "digits":
        loaded = digits.load(*args)
    elif data.path is None:
        raise ValueError(f"data.path: {data.name} data needs the path of its file or folder")
    elif data.name == "packed":
        return load_packed(pipeline.config, (image, text), codecs[text], log)
    else:
        loaded = pairs.load_npz(data.path, *args)
    return tuple(dataclasses.replace(part, names=(image, text)) for part in loaded)


def with_data(pipeline: Pipeline, data: str, **settings) -> Pipeline:
    """The pipeline with another data set, split as its own would be; `settings` of `Data` besides.

    data: digits, an .npz of pairs, or a folder made by `anystate data pack`.

    Raises:
        ValueError: there is none.
    """
    path = None if data == "digits" else locate(data)
    if path is None and data != "digits":
        raise ValueError(not_found("--data takes digits, an .npz file or a folder of anystate data pack:", data))
    settings |= {"name": "digits" if path is None else "packed" if path.is_dir() else "npz", "path": path and data}
    config = pipeline.config.model_copy(update={"data": pipeline.config.data.model_copy(update=settings)})
    return dataclasses.replace(pipeline, config=config)


def read_rows(pipeline: Pipeline, data: str, split: str, limit: int | None) -> pairs.Pairs:
    """One split of a data set as the pipeline encodes it.

    data: a folder made by `anystate data pack`, an .npz of pairs, or a bundled set's name.

    Raises:
        ValueError: nothing there, no such split, or data that does not fit the model.
    """
    if split not in ("train", "test"):
        raise ValueError(f"--split must be train or test, got {split!r}")
    other = with_data(pipeline, data, held_out=limit or sys.maxsize)
    part = load_data(other)[("train", "test").index(split)]
    return part if isinstance(part, pairs.Pairs) else part.pairs(limit)
