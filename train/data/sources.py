"""Opens the data set that a config names: bundled, a file, a folder, a data set of the hub, or the user's function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...configs.config import Data
from ...configs.kinds import import_object
from ...configs.locate import is_hub_id, locate, not_found
from . import bundled, digits, emoji
from .dataset import Dataset, InMemory, Opened, is_table
from .fields import Modalities, find_fields, pick
from .source_arrays import open_npz
from .source_files import open_files
from .source_tables import is_table_file, open_tables, tables_in

FUNCTIONS: dict[str, Callable[..., Opened]] = {"digits": digits.load, "emoji": emoji.load}


def open_source(data: Data, modalities: Modalities) -> Opened:
    """The data set of a config's section, for these modalities.

    Raises:
        ValueError: there is none, or it lacks a modality; one line that names it.
    """
    if data.source in FUNCTIONS:
        return call_function(FUNCTIONS[data.source], data, modalities)
    path = bundled.BUNDLED.get(data.source) or locate(data.source)
    if path is None and ":" in data.source:
        return call_function(import_object(data.source, "data.source"), data, modalities)
    if path is None and is_hub_id(data.source):
        path = download(data)
    if path is None:
        ways = "a file, a folder, OWNER/NAME of the hub or package.module:function"
        raise ValueError(f"{not_found('data.source', data.source)}; give {', '.join(FUNCTIONS)}, adult, {ways}")
    if path.is_dir():
        tables = tables_in(path)
        return open_tables(tables, path, data, modalities) if tables else open_files(path, data, modalities)
    if path.suffix == ".npz":
        return open_npz(path, data, modalities)
    if is_table_file(path):
        return open_tables([path], path.parent, data, modalities)
    endings = "an .npz, .csv, .tsv, .parquet, .arrow, .feather, .xlsx, .json or .jsonl file"
    raise ValueError(f"data.source {data.source!r}: give a folder, or {endings}")


def call_function(function: Any, data: Data, modalities: Modalities) -> Opened:
    """What a function returns for `data.options`: a data set, or a training and a held-out one.

    Raises:
        ValueError: other arguments, or it returns something else.
    """
    what = f"data.source {data.source!r}"
    try:
        inspect.signature(function).bind(**data.options)
    except TypeError as error:
        raise ValueError(f"{what}: {error}; data.options are its arguments") from None
    opened = function(**data.options)
    parts = opened if isinstance(opened, tuple) else (opened,)
    if not 1 <= len(parts) <= 2 or not all(_is_dataset(part) for part in parts):
        raise ValueError(
            f"{what} returned a {type(opened).__name__}: return a data set (len and [i] → {{modality: value}}), or a "
            "training and a held-out one"
        )
    chosen = [_choose(part, data, modalities, what) for part in parts]
    return (chosen[0], chosen[1]) if len(chosen) == 2 else chosen[0]


def _is_dataset(part: Any) -> bool:
    if isinstance(part, Mapping | str) or is_table(part) or not isinstance(part, Dataset):
        return False
    return not len(part) or isinstance(part[0], Mapping)


def _choose(part: Dataset, data: Data, modalities: Modalities, what: str) -> Dataset:
    """A data set of a function under the names of the modalities."""
    if not isinstance(part, InMemory):
        if data.fields:
            raise ValueError(f"{what}: data.fields is for an InMemory; a data set of your own names its modalities")
        return part
    found = find_fields(part.values, modalities, data, what)
    values, _ = pick(part.values, modalities, data, found, what)
    return InMemory(values, part.labels)


def download(data: Data) -> Path:
    """The local folder of a data set of the Hugging Face hub; `data.options` are arguments of `snapshot_download`.

    Raises:
        ValueError: there is none, it cannot be reached, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{data.source!r} is no file or folder here; for a data set of the hub: pip install anystate[latents]"
        ) from None
    try:
        return Path(snapshot_download(data.source, repo_type="dataset", **data.options))
    except Exception as error:  # the hub and the network raise their own exception types
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{not_found('data.source', data.source)}, nor on the Hugging Face hub: {reason}") from None
