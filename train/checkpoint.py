"""Checkpoints: a folder that is either whole or not there.

    step_00001000/
        model.safetensors   ema.safetensors   config.yaml
        train_state/        optimizer.safetensors, weighting.safetensors, state.json
                            sharded/, a file a rank, instead of the optimizer's file where weights are sharded

Written under a temporary name, synced, then renamed, so that a kill at any moment leaves the last good one.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..configs import schema
from . import distributed, sharded
from .build import System, build

STEP = re.compile(r"step_(\d{8,})")
WEIGHTS = {"ema": "ema.safetensors", "raw": "model.safetensors"}


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one line for the user."""


def save_checkpoint(
    run: Path, step: int, files: dict[str, bytes], keep: int, shards: Callable[[Path], None] | None = None
) -> Path:
    """Write `files` {relative name: content} as checkpoint `step` of a run and drop all but the newest `keep`.

    Every rank calls this, the main one with all files. shards: writes each rank's part of the sharded state into the
    folder it is given.

    Raises:
        CheckpointError: the disk refused; what was there before is untouched.
    """
    final = run / f"step_{step:08d}"
    temporary = run / f".{final.name}.{'shards' if shards else os.getpid()}.tmp"
    try:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            _write(temporary, files)
        if shards:
            distributed.barrier()
            shards(temporary / sharded.FOLDER)
            distributed.barrier()
        if distributed.is_main():
            if final.exists():  # a rerun of the same step: the new one takes its place
                shutil.rmtree(final)
            os.rename(temporary, final)
            _sync_folder(run)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest(run)
        raise CheckpointError(
            f"cannot save checkpoint {final}: {error.strerror or error}; "
            + (f"the last good one is {last.name}" if last else "there is no earlier one")
        ) from None
    if distributed.is_main():
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        for stale in run.glob(".step_*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
    distributed.barrier()
    return final


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run.glob("step_*") if STEP.fullmatch(path.name)] if run.is_dir() else []
    return sorted(found, key=lambda path: int(STEP.fullmatch(path.name)[1]))


def latest(run: Path) -> Path | None:
    found = checkpoints(run)
    return found[-1] if found else None


def resolve(path: str | Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the newest one of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "config.yaml").is_file() and (path / "model.safetensors").is_file():
        return path
    if newest := latest(path):
        return newest
    raise CheckpointError(f"no checkpoint at {str(path)!r}: expected a run folder or one of its step_… folders")


def load_system(path: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> System:
    """The system saved in a checkpoint, with its EMA weights (default) or its raw ones.

    Raises:
        CheckpointError: no, a truncated, or another architecture's checkpoint.
    """
    folder = resolve(path)
    raw = schema.load(folder / "config.yaml")
    system = build(raw, folder)
    load_weights(system.net, folder / WEIGHTS[weights])
    system.net.to(device).eval()
    return system


def load_weights(module: nn.Module, file: Path) -> None:
    """Fill a module from a safetensors file; every name and shape must agree.

    Raises:
        CheckpointError: missing or truncated file, or weights of another architecture.
    """
    state = read_tensors(file)
    check_shapes(file, module.state_dict(), state)
    module.load_state_dict(state)


def check_shapes(file: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """CheckpointError unless the tensors of a file are a network's own, name by name and shape by shape."""
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        key = wrong[0]
        here = f"shape {tuple(own[key].shape)}" if key in own else "no such tensor"
        there = f"shape {tuple(state[key].shape)}" if key in state else "no such tensor"
        raise CheckpointError(
            f"{file} is of another architecture: {key} has {there} in the file, {here} in the model"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {file} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint file {file} is truncated or damaged ({error})") from None


def begin_from(net: nn.Module, path: str | Path, weights: str) -> str:
    """Start a network from another run's weights; what that run lacks keeps its initial values.

    Returns:
        One line that says what was taken, what is new and what was left out.

    Raises:
        CheckpointError: no checkpoint, a tensor of another shape, or nothing in common.
    """
    file = resolve(path) / WEIGHTS[weights]
    there, own = read_tensors(file), net.state_dict()
    shared = {key: value for key, value in there.items() if key in own}
    if not shared:
        raise CheckpointError(f"{file} is of another architecture: it shares no tensor with this config")
    for key, value in shared.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{file} is of another architecture: {key} has shape {tuple(value.shape)} in the file, "
                f"{tuple(own[key].shape)} in this config"
            )
    net.load_state_dict(shared, strict=False)
    new, left = _modules(set(own) - set(shared)), _modules(set(there) - set(shared))
    parts = [f"{len(shared)} tensors from {file}", f"new: {new}" if new else "", f"left out: {left}" if left else ""]
    return "; ".join(part for part in parts if part)


def empty_slots(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """Give AdamW the state it would have before its first step, as tensors to read into or to capture."""
    slots = {"exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like}
    state = {i: {name: make(p) for name, make in slots.items()} for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        state[i]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, {parameter number.name: tensor}."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}": torch.as_tensor(value).contiguous()
        for i, slots in state.items()
        for name, value in slots.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; learning rates are set by the loop."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def pack_json(values: dict) -> bytes:
    return json.dumps(values, indent=1).encode()


def _modules(keys: set[str]) -> str:
    """The modules that tensors belong to, two names deep."""
    return ", ".join(sorted({".".join(key.split(".")[:2]) for key in keys}))


def _write(folder: Path, files: dict[str, bytes]) -> None:
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
