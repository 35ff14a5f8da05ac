"""One optimizer step: losses, gradients, clipping, update, EMA."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from ..configs.config import Train
from ..kernels import Rng
from ..model import distributed
from . import sharded
from .data.examples import presence
from .objective import like
from .state import TrainState


def training_step(state: TrainState) -> dict[str, Tensor]:
    """Update network, weighting, optimizer and EMA; the caller increments `state.step`.

    Returns:
        {modality: this rank's part of the mean unweighted loss}, on the device.
    """
    settings = state.settings
    set_learning_rate(state.optimizer, learning_rate(settings, state.step))
    x0 = state.data.batch(state.seed, state.step, state.rows, settings.batch)
    losses = accumulate_gradients(state, x0)
    if settings.on_nonfinite_grad == "zero":
        zero_nonfinite_gradients(state)
    state.grad_norm = sharded.whole(clip_and_step(state))
    state.optimizer.zero_grad(set_to_none=True)
    update_ema(state)
    return losses


def accumulate_gradients(state: TrainState, x0: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a batch, computed in `gradient_accumulation_steps` parts; returns what `backward` does."""
    parts = state.settings.gradient_accumulation_steps
    size, losses = len(state.rows) // parts, {}
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        with contextlib.nullcontext() if i == parts - 1 else state.without_sync():
            part = backward(state, {m: x[rows] for m, x in x0.items()}, state.rows[rows])
        losses = {m: losses.get(m, 0.0) + value for m, value in part.items()}
    return losses


def backward(state: TrainState, x0: dict[str, Tensor], rows: range) -> dict[str, Tensor]:
    """Add the gradients of these rows of the current batch; returns their parts of the mean losses."""
    x0 = {m: value.to(state.device, non_blocking=True) for m, value in x0.items()}
    rng = Rng(state.seed, torch.arange(rows.start, rows.stop, device=state.device), state.step)
    total, losses = batch_losses(state, x0, rng)
    if state.settings.on_nonfinite_grad == "stop":
        state.finite &= torch.isfinite(total.detach())
    (total * distributed.world()).backward()  # ranks average their gradients; the loss is a sum over ranks
    return losses


def batch_losses(state: TrainState, x0: dict[str, Tensor], rng: Rng) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss to be minimized, {modality: mean unweighted loss}): the parts of the rows in x0, on the device.

    Draws training times and noise. May be compiled whole, so that it reads no number that changes from step to step
    but those in tensors.
    """
    batch, x0 = state.settings.batch, dict(x0)
    present = {m: x0.pop(presence(m)) for m in state.space if presence(m) in x0}
    t, loss_mask = state.times(state.space, rng)
    for m, has in present.items():  # what an example lacks is pure noise to the network, and not learned
        t[m], loss_mask[m] = torch.where(has, t[m], 1.0), loss_mask[m] * has
        x0[m] = torch.where(like(has, x0[m]), x0[m], torch.zeros_like(x0[m]))
    with state.autocast():
        total, losses = state.objective(x0, t, loss_mask, rng, present)
    expected = {m: batch * expected_share(state, m) for m in losses}  # samples with a loss
    means = {m: (loss * loss_mask[m]).sum() / expected[m] for m, loss in losses.items() if expected[m] > 1e-9}
    return total / batch, means


def expected_share(state: TrainState, name: str) -> float:
    """The expected share of samples from which a process is learned."""
    share = 1.0 - state.times.condition_share(name, len(state.space))
    return share * getattr(state.data, "present_share", {}).get(name, 1.0)


def zero_nonfinite_gradients(state: TrainState) -> None:
    """Replace entries of the gradients that are infinite or not a number by 0."""
    for p in state.parameters:
        if p.grad is not None:
            torch.nan_to_num_(*sharded.local([p.grad]), nan=0.0, posinf=0.0, neginf=0.0)


def clip_and_step(state: TrainState) -> Tensor:
    """Clip the gradients and let the optimizer step; returns the gradients' norm before clipping."""
    limit, parameters = state.settings.max_grad_norm, state.parameters
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    state.optimizer.step()
    return norm


def learning_rate(settings: Train, step: int) -> float:
    """The learning rate of update `step`: linear warm-up, then the configured schedule."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    if settings.lr_schedule == "cosine":
        return settings.lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return settings.lr * (max(1.0 - done, 0.0) if settings.lr_schedule == "linear" else 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set it for all parameters, also where it is a tensor that a CUDA graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def ema_decay(settings: Train, step: int) -> float:
    """The decay of the EMA in update `step`, smaller at first: min(ema, (1 + n)/(10 + n))."""
    return min(settings.ema, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(state: TrainState) -> None:
    """Update the EMA weights."""
    ema, weights = (sharded.local(list(net.parameters())) for net in (state.ema, state.net))
    torch._foreach_lerp_(ema, weights, 1.0 - ema_decay(state.settings, state.step))
