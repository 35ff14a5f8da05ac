"""Checkpoints of a training state: what is written, and what a run starts and resumes from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..configs.runs import WEIGHTS, CheckpointError, resolve
from ..model import distributed
from ..model.storage import SHARDS, load_weights, pack, pack_json, read_tensors
from . import sharded
from .state import TrainState


def checkpoint_files(state: TrainState, is_sharded: bool, seconds: float) -> dict[str, bytes]:
    """The weights and the training state as files, {relative name: content}.

    The main rank gets them, the others an empty dictionary; every rank must call this.

    Args:
        is_sharded: the optimizer's state is written by `sharded.save` instead.
        seconds: spent on training so far.
    """
    tensors = {
        "model.safetensors": whole_tensors(state.net),
        "ema.safetensors": whole_tensors(state.ema),
        "train_state/weighting.safetensors": whole_tensors(state.weighting),
    }
    if not is_sharded:
        tensors["train_state/optimizer.safetensors"] = optimizer_tensors(state.optimizer)
    if not distributed.is_main():
        return {}
    files = {name: pack(values) for name, values in tensors.items()}
    files["train_state/state.json"] = pack_json({"step": state.step, "seconds": seconds})
    return files


def resume(state: TrainState, folder: Path, is_sharded: bool) -> float:
    """Fill the state from a checkpoint; returns the seconds spent on training before it.

    Raises:
        CheckpointError: a missing, truncated or foreign file; weights that were not sharded for a run that shards them.
    """
    shards = folder / SHARDS
    if shards.is_dir():
        init_optimizer_state(state.optimizer, state.parameters)
        tensors, saved = state_tensors(state), sharded.names(shards)
        sharded.load(shards, {name: x for name, x in tensors.items() if name in saved})
    elif is_sharded:
        raise CheckpointError(
            f"{folder} was not saved with train.parallel=fsdp: go on with train.parallel=ddp, or begin another "
            f"--out with init.checkpoint={folder}"
        )
    else:
        load_weights(state.net, folder / "model.safetensors")
        load_weights(state.ema, folder / "ema.safetensors")
        load_weights(state.weighting, folder / "train_state/weighting.safetensors")
        restore_optimizer(state.optimizer, read_tensors(folder / "train_state/optimizer.safetensors"))
    saved = json.loads((folder / "train_state/state.json").read_text())
    state.step = saved["step"]
    return saved["seconds"]


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """All that a run resumes from, {name: tensor}, in whatever way they are sharded over the ranks."""
    parts = {"model": state.net, "ema": state.ema, "weighting": state.weighting}
    tensors = {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}
    return tensors | {f"optimizer.{name}": x for name, x in optimizer_tensors(state.optimizer).items()}


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's state, gathered from all ranks; every rank must call this."""
    return {name: sharded.whole(value) for name, value in module.state_dict().items()}


def init_from(net: nn.Module, path: str | Path, weights: str) -> str:
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


def init_optimizer_state(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
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


def _modules(keys: set[str]) -> str:
    """The modules that tensors belong to, two names deep."""
    return ", ".join(sorted({".".join(key.split(".")[:2]) for key in keys}))
