"""A training step of a small model as one CUDA graph.

The hundreds of kernels of a step of a table's network take far longer to launch one by one than to run, and in a graph
still some microseconds each. In a compiled run everything from the rows of the data set to the losses is therefore one
piece, and so is its backward pass. The data set is on the device; from step to step only a few tensors change: the
step's number (which keys all random numbers), the rows of the batch, the learning rate and the decay of the EMA.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ..configs.config import Train
from ..kernels import Rng
from ..model import distributed
from ..model.compilation import compile_small
from ..sample import cuda_graphs
from .checkpoint import init_optimizer_state
from .data.epochs import batch_rows
from .data.examples import Examples
from .state import TrainingData, TrainState
from .step import batch_losses, clip_and_step, ema_decay, learning_rate, set_learning_rate

log = logging.getLogger(__name__)
DEVICES = ("cuda",)
MAX_PARAMETERS = 20_000_000  # larger networks keep a GPU busy without a graph


def is_capturable(settings: Train, net: nn.Module, data: TrainingData, device: torch.device) -> bool:
    """Whether a step of a run can be one graph."""
    small = net.narrow and sum(p.numel() for p in net.parameters()) <= MAX_PARAMETERS
    whole = settings.gradient_accumulation_steps == 1 and settings.on_nonfinite_grad == "stop"
    alone = distributed.world() == 1
    on_device = isinstance(data, Examples) and data.device.type == device.type
    return device.type in DEVICES and small and whole and alone and on_device


def with_graph_optimizer(state: TrainState) -> None:
    """Let the optimizer read its learning rate from the device, as a graph needs it."""
    for group in state.optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=state.device)
        group["capturable"] = state.device.type == "cuda"


class GraphStep:
    """`training_step` of a state as a graph; see `graph_step`."""

    def __init__(self, state: TrainState):
        assert isinstance(state.data, Examples)  # see `is_capturable`
        self.state, self.data, device = state, state.data, state.device
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = torch.arange(state.rows.start, state.rows.stop, device=device)
        self.index = torch.zeros(len(state.rows), dtype=torch.int64, device=device)
        self.weight = torch.zeros((), device=device)
        self.losses = compile_small(self._losses) if state.compiled else self._losses

    def __call__(self) -> dict[str, Tensor]:
        """See `training_step`."""
        self._set_inputs()
        self.replay()
        losses, self.state.grad_norm = self.result
        return {m: value.clone() for m, value in losses.items()}

    def capture(self) -> None:
        """Capture the step. Its warm-ups are real steps: the caller restores what they changed."""
        self._set_inputs()
        self.replay, self.result = cuda_graphs.capture(self._body)

    def changed(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        state = self.state
        if not state.optimizer.state:
            init_optimizer_state(state.optimizer, state.parameters)
        slots = [v for s in state.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return [*state.parameters, *state.ema.parameters(), state.finite, *slots]

    def _set_inputs(self) -> None:
        state, settings = self.state, self.state.settings
        self.step.fill_(state.step)
        index = batch_rows(len(self.data), state.seed, state.step, state.rows, settings.batch)
        self.index.copy_(index.pin_memory() if state.device.type == "cuda" else index, non_blocking=True)
        set_learning_rate(state.optimizer, learning_rate(settings, state.step))
        self.weight.fill_(1.0 - ema_decay(settings, state.step))

    def _body(self) -> tuple[dict[str, Tensor], Tensor]:
        state = self.state
        state.optimizer.zero_grad(set_to_none=True)
        total, finite, losses = self.losses()
        state.finite &= finite
        total.backward()
        norm = clip_and_step(state)
        with torch.no_grad():
            ema, weights = list(state.ema.parameters()), list(state.net.parameters())
            difference = torch._foreach_sub(weights, ema)
            torch._foreach_mul_(difference, self.weight)
            torch._foreach_add_(ema, difference)
        return losses, norm

    def _losses(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(the loss to be minimized, whether it is finite, {modality: mean unweighted loss}) of the current batch."""
        seed = self.state.seed
        x0 = self.data.at(self.index, self.samples, seed, self.step)
        total, losses = batch_losses(self.state, x0, Rng(seed, self.samples, self.step))
        return total, torch.isfinite(total.detach()), losses


def graph_step(state: TrainState) -> GraphStep | None:
    """The step as a graph; None where it is not capturable, and with a line in the log where capturing fails."""
    if not is_capturable(state.settings, state.net, state.data, state.device):
        return None
    step = GraphStep(state)
    changed = step.changed()
    kept = [x.detach().clone() for x in changed]
    try:
        step.capture()
    except RuntimeError as error:
        reason = str(error.__context__ or error).splitlines()[0]  # see sample.cuda_graphs
        log.warning("no CUDA graph for the training step, it runs eagerly: %s", reason)
        state.optimizer.zero_grad(set_to_none=True)
        return None
    finally:
        with torch.no_grad():
            for x, old in zip(changed, kept, strict=True):
                x.copy_(old)
    return step
