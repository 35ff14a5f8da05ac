"""Atomic writes of files, safetensors, and the folders of checkpoints.

    step_00001000/
        model.safetensors   ema.safetensors   config.yaml
        train_state/        optimizer.safetensors, weighting.safetensors, state.json
                            if weights are sharded, sharded/ with one file per rank instead of optimizer.safetensors

A checkpoint is written under a temporary name, synced and renamed, so the last complete checkpoint survives a kill at
any moment. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..configs.runs import CheckpointError, checkpoints, latest
from . import distributed

SHARDS = "train_state/sharded"


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it, so that a kill leaves the old file; create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(
    run: Path, step: int, files: dict[str, bytes], keep: int, shards: Callable[[Path], None] | None = None
) -> Path:
    """Write checkpoint `step` of a run and delete all but the newest `keep` checkpoints; returns its folder.

    Every rank calls this.

    Args:
        files: {relative name: content}; used on the main rank only.
        shards: called on every rank with the folder into which it writes its part of the sharded state.

    Raises:
        CheckpointError: writing failed; earlier checkpoints are unchanged.
    """
    final = run / f"step_{step:08d}"
    temporary = run / f".{final.name}.{'shards' if shards else os.getpid()}.tmp"
    try:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            _write(temporary, files)
        if shards:
            distributed.barrier()
            shards(temporary / SHARDS)
            distributed.barrier()
        if distributed.is_main():
            if final.exists():  # a rerun of the same step replaces it
                shutil.rmtree(final)
            os.rename(temporary, final)
            _sync_folder(run)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest(run)
        remaining = f"the last good one is {last.name}" if last else "there is no earlier one"
        raise CheckpointError(f"cannot save checkpoint {final}: {error.strerror or error}; {remaining}") from None
    if distributed.is_main():
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        for stale in run.glob(".step_*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
    distributed.barrier()
    return final


def load_weights(module: nn.Module, file: Path) -> None:
    """Load the weights of a module from a safetensors file; all names and shapes must match.

    Raises:
        CheckpointError: a missing or truncated file, or weights of another architecture.
    """
    state = read_tensors(file)
    check_shapes(file, module.state_dict(), state)
    module.load_state_dict(state)


def check_shapes(file: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the tensors of a file have the names and shapes of a network's."""
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        key = wrong[0]
        here = f"shape {tuple(own[key].shape)}" if key in own else "no such tensor"
        there = f"shape {tuple(state[key].shape)}" if key in state else "no such tensor"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{file} is of another architecture: {key} has {there} in the file, {here} in the model{more}"
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: missing or truncated.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {file} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint file {file} is truncated or damaged ({error})") from None


def pack(tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a safetensors file with these tensors."""
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def pack_json(values: dict) -> bytes:
    """The bytes of a JSON file."""
    return json.dumps(values, indent=1).encode()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write and sync files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
