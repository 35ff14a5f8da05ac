"""Training as the paper writes it: the implementation that tests and benchmarks compare `train` with.

Eager PyTorch: every head, the logits of the whole vocabulary, PyTorch's AdamW, and losses that are read in every step.
The random numbers are those of `train`, so that losses and weights agree within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...configs.config import Train
from ...diffusion import Space, TimeSampler, Weighting
from ...kernels import Draw, Rng
from ...kernels.backend import use_backend


def training_step(
    net: nn.Module,
    ema: nn.Module,
    weighting: Mapping[str, Weighting],
    optimizer: torch.optim.Optimizer,
    space: Space,
    times: TimeSampler,
    x0: dict[str, Tensor],
    settings: Train,
    seed: int,
    step: int,
    observed: Callable[[Rng], dict[str, Tensor]] | None = None,
    precision: torch.dtype = torch.float32,
    present_share: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Step `step` on the batch x0; returns {modality: mean unweighted loss} of the samples in which it is learned.

    Args:
        x0: {modality: (B, *shape)}, and {"modality:present": (B,) bool} of those that some samples lack.
        weighting: {modality: w(t)} of the modalities that are learned.
        observed: draws the elements that are clean conditions, {modality: bool}.
        precision: of matrix products, by autocast.
        present_share: {modality: share of the data that has it}, default 1.
    """
    batch, parts, device = settings.batch, settings.gradient_accumulation_steps, next(net.parameters()).device
    losses = dict.fromkeys(weighting, 0.0)
    optimizer.zero_grad()
    for rows in torch.arange(batch, device=device).chunk(parts):
        rng = Rng(seed, rows, step)
        t, loss_mask = times(space, rng)
        masks = observed(rng) if observed else {}
        batch_part = {name: x[rows.to(x.device)].to(device) for name, x in x0.items()}
        for m in space:
            has = batch_part.get(f"{m}:present")
            if has is not None:  # a modality that a sample lacks is pure noise to the network, and not learned
                t[m], loss_mask[m] = torch.where(has, t[m], 1.0), loss_mask[m] * has
                if m in masks:
                    masks[m] = masks[m] & has.view(-1, *[1] * len(space[m].shape))
        total = torch.zeros((), device=device)
        with use_backend("reference"), torch.autocast(device.type, torch.bfloat16, enabled=precision != torch.float32):
            clean = {m: batch_part[m] for m in space}
            xt = {m: space[m].perturb(x, t[m], rng.keys(m, Draw.NOISE)) for m, x in clean.items()}
            xt = {m: torch.where(masks[m], clean[m], x) if m in masks else x for m, x in xt.items()}
            out = space.evaluate(net, xt, t, observed=masks)
            for m, weight in weighting.items():
                loss = space[m].loss(out[m], clean[m], xt[m], rng.keys(m, Draw.NOISE), masks.get(m))
                total = total + (weight(loss, t[m]) * loss_mask[m]).sum() / batch
                learned = batch * (1.0 - times.condition_share(m, len(space))) * (present_share or {}).get(m, 1.0)
                losses[m] += (loss.detach() * loss_mask[m]).sum().item() / max(learned, 1e-9)
        total.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    optimizer.step()
    decay = min(settings.ema, (1 + step) / (10 + step))
    with torch.no_grad():
        for p_ema, p in zip(ema.parameters(), net.parameters(), strict=True):
            p_ema.lerp_(p, 1.0 - decay)
    return losses


def adamw(net: nn.Module, weighting: nn.Module, settings: Train) -> torch.optim.AdamW:
    """PyTorch's AdamW with the configured settings."""
    parameters = [p for module in (net, weighting) for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, settings.lr, settings.betas, weight_decay=settings.weight_decay)


def learning_rate(settings: Train, step: int) -> float:
    """Linear warm-up, then constant, cosine or linear."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = min((step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1), 1.0)
    factor = {"constant": 1.0, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done}
    return settings.lr * factor[settings.lr_schedule]
