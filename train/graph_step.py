"""A whole training step of a small model as one CUDA graph: a table's network is launched in far less time than its
thousand kernels take to launch one by one.

The data set lies on the device. What changes from step to step is a handful of tensors: the step's number (which keys
all random numbers), the rows of the batch, the learning rate and the weight of the average.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import Rng
from ..model import distributed
from ..sample import cuda_graphs as graphs
from .checkpoint import init_optimizer_state
from .data.epochs import batch_rows
from .data.rows import Rows

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger(__name__)
DEVICES = ("cuda",)
LARGEST = 20_000_000  # parameters; larger networks keep a GPU busy without


def suits(trainer: Trainer) -> bool:
    """Whether a trainer's step can be one graph."""
    settings = trainer.config.train
    small = sum(p.numel() for p in trainer.parameters) <= LARGEST
    alone = distributed.world() == 1 and settings.gradient_accumulation_steps == 1 and settings.on_nonfinite_grad == "stop"
    return trainer.device.type in DEVICES and small and alone and isinstance(trainer.train_data, Rows)


class GraphedStep:
    """One update of a trainer; its optimizer's learning rate must be a tensor."""

    def __init__(self, trainer: Trainer):
        self.trainer, device = trainer, trainer.device
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = torch.arange(trainer.rows.start, trainer.rows.stop, device=device)
        self.index = torch.zeros(len(trainer.rows), dtype=torch.int64, device=device)
        self.weight = torch.zeros((), device=device)

    def __call__(self) -> dict[str, Tensor]:
        """See `Trainer.update`."""
        self._set()
        self.replay()
        losses, self.trainer.grad_norm = self.result
        return {m: value.clone() for m, value in losses.items()}

    def capture(self) -> None:
        """Capture the step. Its warm-ups are real steps: whoever calls this puts back what they changed."""
        self._set()
        self.replay, self.result = graphs.capture(self._body)

    def changed(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        trainer = self.trainer
        if not trainer.optimizer.state:
            init_optimizer_state(trainer.optimizer, trainer.parameters)
        slots = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return [*trainer.parameters, *trainer.ema.parameters(), trainer.finite, *slots]

    def _set(self) -> None:
        trainer, settings = self.trainer, self.trainer.config.train
        self.step.fill_(trainer.step)
        rows = batch_rows(len(trainer.train_data), trainer.config.seed, trainer.step, trainer.rows, settings.batch)
        self.index.copy_(rows.pin_memory() if trainer.device.type == "cuda" else rows, non_blocking=True)
        trainer.engine.set_lr(trainer.optimizer, trainer.lr(trainer.step))
        self.weight.fill_(1.0 - trainer.decay())

    def _body(self) -> tuple[dict[str, Tensor], Tensor]:
        trainer = self.trainer
        trainer.optimizer.zero_grad(set_to_none=True)
        x0 = trainer.train_data.at(self.index, self.samples, trainer.config.seed, self.step)
        losses = trainer.backward(x0, trainer.rows, Rng(trainer.config.seed, self.samples, self.step))
        norm = trainer.descend()
        with torch.no_grad():
            average, now = list(trainer.ema.parameters()), list(trainer.net.parameters())
            apart = torch._foreach_sub(now, average)
            torch._foreach_mul_(apart, self.weight)
            torch._foreach_add_(average, apart)
        return losses, norm


def graphed_step(trainer: Trainer) -> GraphedStep | None:
    """The step of a trainer as one graph; None where it does not suit, and with a line in the log where it fails."""
    if not suits(trainer):
        return None
    step = GraphedStep(trainer)
    changed = step.changed()
    kept = [x.detach().clone() for x in changed]
    try:
        step.capture()
    except RuntimeError as error:
        reason = str(error.__context__ or error).splitlines()[0]  # see sample.graphs
        log.warning("no CUDA graph for the training step, it runs eagerly: %s", reason)
        trainer.optimizer.zero_grad(set_to_none=True)
        return None
    finally:
        with torch.no_grad():
            for x, old in zip(changed, kept, strict=True):
                x.copy_(old)
    return step
