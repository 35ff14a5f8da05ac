"""What a run starts and resumes from: another run's weights, and the state of the optimizer as flat tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..configs.runs import WEIGHTS, CheckpointError, resolve
from ..model.storage import read_tensors


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
