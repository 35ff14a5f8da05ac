"""What the official code saves: .pt files of plain tensors, two sets of weights, optimizer and scheduler."""

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

SETS = {"model": "raw", "ema": "ema"}  # their name of a set of weights: ours


def read_pt(file: Path) -> dict:
    """The content of a .pt file by PyTorch's reader of plain data; tensors are mapped from the disk where possible.

    Raises:
        ValueError: a damaged file, one that holds code, or something other than a dictionary.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; such files are refused in our own words
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise ValueError(
                f"{file} holds pickled code, which is never run: save its state dicts alone, or as .safetensors"
            ) from None
        raise ValueError(f"{file} is not a whole .pt file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise ValueError(f"{file} is not a whole .pt file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, not an official snapshot")
    return content


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; ValueError for a damaged one."""
    try:
        return read_tensors(file)
    except CheckpointError:
        raise ValueError(f"{file} is not a whole .safetensors file") from None


def weight_sets(content: Mapping, alone: str = "ema") -> dict[str, Mapping[str, Tensor]]:
    """{"raw" or "ema": state dict} of a snapshot; a state dict by itself counts as the set `alone`. Empty if none."""
    sets = {ours: content[theirs] for theirs, ours in SETS.items() if isinstance(content.get(theirs), dict)}
    if not sets and content and all(isinstance(value, Tensor) for value in content.values()):
        sets = {alone: content}
    return sets


def save_imported(
    out: Path, step: int, sets: Mapping[str, Mapping[str, Tensor]], config: Section, about: dict, files: dict
) -> Path:
    """Write {"raw" or "ema": our state dict} as the only checkpoint of a run; one set by itself stands for both.

    about: for import.json; files: {name: content} of whatever else the checkpoint needs.
    """
    packed = {kind: pack({key: x.float() for key, x in state.items()}) for kind, state in sets.items()}
    weights = {
        "model.safetensors": packed.get("raw", packed.get("ema")),
        "ema.safetensors": packed.get("ema", packed.get("raw")),
    }
    said = {"config.yaml": dump_config(config).encode(), "import.json": pack_json(about)}
    return save_checkpoint(out, step, {**weights, **said, **files}, keep=1)
