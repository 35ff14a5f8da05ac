"""The state of a training run, which a step reads and updates."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..configs.config import Train
from ..diffusion import Space, TimeSampler
from .objective import Objective


class TrainingData(Protocol):
    """Training data: a length and batches that are a function of (seed, step)."""

    def __len__(self) -> int: ...

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """{modality: (len(rows), *shape)}: rows `rows` of batch number `step` of `size` samples."""
        ...


@dataclasses.dataclass
class TrainState:
    """The state of a run.

    Attributes:
        settings, seed: of the config.
        objective: computes the loss; the same as `module`, or it wrapped for several ranks.
        rows: the rows of every batch that this rank computes.
        compiled: whether a step that is one CUDA graph is compiled as a whole; see `graph_step`.
        finite: () bool on the device, False once a loss was not finite.
        grad_norm: of the last step, before clipping.
    """

    settings: Train
    seed: int
    device: torch.device
    space: Space
    times: TimeSampler
    net: nn.Module
    ema: nn.Module
    module: Objective
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    data: TrainingData
    rows: range
    bf16: bool
    compiled: bool = False
    step: int = 0
    grad_norm: Tensor | float = 0.0
    finite: Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the optimizer: network and weighting, without frozen parts."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def weighting(self) -> nn.ModuleDict:
        return self.module.weighting

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in bfloat16, where the run computes in it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def without_sync(self) -> contextlib.AbstractContextManager:
        """Gradients stay on this rank: for all but the last part of an accumulated batch."""
        wrapped = isinstance(self.objective, DistributedDataParallel)
        return self.objective.no_sync() if wrapped else contextlib.nullcontext()
