"""Files of the official code: .pt files of plain tensors with raw and EMA weights, optimizer and scheduler."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...configs.config import Section
from ...configs.load import dump_config
from ...configs.runs import CheckpointError
from ..storage import pack, pack_json, read_tensors, save_checkpoint

WEIGHT_SETS = {"model": "raw", "ema": "ema"}  # official name of a set of weights: name here


def read_pt(file: Path) -> dict:
    """The content of a .pt file, loaded with `weights_only`; tensors are memory-mapped where possible.

    Raises:
        ValueError: a damaged file, one with pickled code, or content other than a dictionary.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; such files are refused below
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise ValueError(
                f"{file} holds pickled code, which is never run: save only its state dicts, or use .safetensors"
            ) from None
        raise ValueError(f"{file} is truncated or not a .pt file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise ValueError(f"{file} is truncated or not a .pt file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, not an official snapshot")
    return content


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; ValueError if it is damaged."""
    try:
        return read_tensors(file)
    except CheckpointError:
        raise ValueError(f"{file} is truncated or not a .safetensors file") from None


def weight_sets(content: Mapping, single: str = "ema") -> dict[str, Mapping[str, Tensor]]:
    """{"raw" or "ema": state dict} of a snapshot, empty if it has no weights.

    A file that is itself a state dict counts as the set `single`.
    """
    sets = {name: content[key] for key, name in WEIGHT_SETS.items() if isinstance(content.get(key), dict)}
    if not sets and content and all(isinstance(value, Tensor) for value in content.values()):
        sets = {single: content}
    return sets


def save_imported(
    out: Path, step: int, sets: Mapping[str, Mapping[str, Tensor]], config: Section, about: dict, files: dict
) -> Path:
    """Write weights of the official code, already converted, as the only checkpoint of a run; returns its folder.

    Args:
        sets: {"raw" or "ema": state dict}; a single set is used for both.
        about: the content of import.json.
        files: {name: content} of further files of the checkpoint.
    """
    packed = {kind: pack({key: x.float() for key, x in state.items()}) for kind, state in sets.items()}
    content = {
        "model.safetensors": packed.get("raw", packed.get("ema")),
        "ema.safetensors": packed.get("ema", packed.get("raw")),
        "config.yaml": dump_config(config).encode(),
        "import.json": pack_json(about),
        **files,
    }
    return save_checkpoint(out, step, content, keep=1)
