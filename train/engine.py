"""The two ways to run the same mathematics: `fast`, and `plain`, which every benchmark puts beside it.

`plain` is what a careful reader of the paper would write: eager PyTorch, every operation in its reference form (logits
of the whole vocabulary in float32, SDPA with a mask), every head always computed, the optimizer and the average as
PyTorch offers them, and a loop that reads its losses each step. Both draw the same random numbers and agree within
rounding. The sampling half of `plain` is `sample.plain`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels.backend import use_backend
from ..model import distributed, float8
from ..model.compilation import compile_net, pays
from ..model.cpu_memory import keep_memory
from ..sample.plain import every_head
from . import graph_step as graphed
from . import sharded

if TYPE_CHECKING:
    from .trainer import Trainer


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Compiled code adds up gradients of embeddings in a fixed order, not as threads come; eager code does anyway."""
    before, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills


class Fast:
    """The default."""

    def __init__(self, config, device: torch.device):
        self.config, self.device = config, device
        self.tried, self.graph = False, None
        self.settle(device)

    @staticmethod
    def settle(device: torch.device) -> None:
        """Settings of the process."""
        if device.type == "cpu":
            keep_memory()

    def running(self) -> contextlib.AbstractContextManager:
        """Around every step."""
        return deterministic() if self.device.type == "cpu" else contextlib.nullcontext()

    def prepare(self, net: nn.Module, work: Callable[[], float], shards: bool) -> None:
        """Convert it to fp8 where the config says so and compile it where that pays; before sharding, if any.

        work: counts the FLOPs of the whole run.
        """
        compiles, settings = pays(self.config.compile, self.device, work), self.config.train
        if settings.precision == "fp8":
            float8.convert(net, self.device, settings.batch // settings.gradient_accumulation_steps // distributed.world())
        if compiles:
            compile_net(net, self.device, self.config.compile == "always", sharded=shards)

    def net(self, net: nn.Module) -> Callable:
        """The network as the losses call it."""
        return net

    def optimizer(self, trainer: Trainer) -> torch.optim.Optimizer:
        s, options = self.config.train, {}
        lr = s.lr
        if graphed.suits(trainer):  # a graph reads the learning rate from the device
            lr, options = torch.tensor(s.lr, device=self.device), {"capturable": self.device.type == "cuda"}
        return torch.optim.AdamW(trainer.parameters, lr, s.betas, weight_decay=s.weight_decay, fused=True, **options)

    def set_lr(self, optimizer: torch.optim.Optimizer, value: float) -> None:
        group = optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value

    def update(self, trainer: Trainer) -> dict[str, Tensor]:
        """One step, as a graph where that suits."""
        if not self.tried:
            self.tried, self.graph = True, graphed.graphed_step(trainer)
        return trainer.step_by_step() if self.graph is None else self.graph()

    def average(self, average: nn.Module, now: nn.Module, weight: float) -> None:
        """Move the averaged weights towards those of now by a share `weight` of the way."""
        torch._foreach_lerp_(*(sharded.local(list(net.parameters())) for net in (average, now)), weight)

    def report(self, losses: dict[str, Tensor]) -> None:
        """What a step does with its losses besides returning them."""


class Plain(Fast):
    @staticmethod
    def settle(device):
        pass

    def running(self):
        return use_backend("reference")

    def prepare(self, net, work, shards):
        pass

    def net(self, net):
        return every_head(net)

    def optimizer(self, trainer):
        s = self.config.train
        return torch.optim.AdamW(trainer.parameters, s.lr, s.betas, weight_decay=s.weight_decay)

    def update(self, trainer):
        return trainer.step_by_step()

    def average(self, average, now, weight):
        for a, b in zip(average.parameters(), now.parameters(), strict=True):
            a.lerp_(b, weight)

    def report(self, losses):
        for value in losses.values():
            value.item()


ENGINES = {"fast": Fast, "plain": Plain}
