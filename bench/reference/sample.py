"""Sampling as the paper writes it: the implementation that tests and benchmarks compare `sample.sample` with.

Algorithms 3 to 5 of Diffuse Everything (arXiv 2506.07903) in eager PyTorch: every head in every evaluation, guidance as
two passes, logits of the whole vocabulary. The random numbers are those of `sample.sample`, so that samples agree
within
rounding. Samplers: heun, euler, euler_sde and dpmpp_2m for Gaussian modalities; tau_leap, euler, ancestral and
first_hitting for masked ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...diffusion import Gaussian, Guidance, Masked, Space, time_grid
from ...diffusion.schedules import GaussianSchedule
from ...kernels import Draw, LazyLogits, Rng, reference
from ...kernels.backend import use_backend


@torch.no_grad()
def sample(
    net,
    space: Space,
    conditions: Mapping[str, Tensor | tuple[Tensor, float]],
    n: int,
    steps: int,
    samplers: Mapping[str, tuple[str, str]],
    guidance: Guidance | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    start_index: int = 0,
) -> dict[str, Tensor]:
    """{modality: (n, *shape)}, samples start_index, …, start_index + n − 1 of a seed.

    Args:
        conditions: {modality: clean data, or (clean data, noise time)}.
        samplers: {modality: (sampler, time grid)} of the others.
    """
    rng, w = Rng.for_batch(seed, n, start_index, device), guidance or Guidance()
    conditions = {m: c if isinstance(c, tuple) else (c, 0.0) for m, c in conditions.items()}
    generated = [m for m in space if m not in conditions]
    guiding = list(conditions) or [m for m in generated if not isinstance(space[m], Gaussian)]
    guided = [m for m in generated if w.scale_of(m) != 1.0 and (conditions or isinstance(space[m], Gaussian))]
    t_condition = {m: torch.full((n,), s, dtype=torch.float64, device=device) for m, (_, s) in conditions.items()}
    grid = {m: time_grid(space[m], steps, samplers[m][1]).to(device) for m in generated}  # t_0 = 1 > … > t_N = 0

    with use_backend("reference"):
        x = space.prior(rng, generated)
        for m, (x0, s) in conditions.items():
            x[m] = space[m].perturb(x0, t_condition[m], rng.keys(m, Draw.CONDITION)) if s > 0 else x0
        hitting = [m for m in generated if samplers[m][0] == "first_hitting"]
        hits = {m: first_hitting(x[m], steps, rng.keys(m, Draw.TIME)) for m in hitting}
        times = {m: hits[m][0] if m in hits else grid[m][:, None].expand(-1, n) for m in generated}  # (N + 1, n)
        x0_before: dict[str, Tensor] = {}  # of dpmpp_2m

        for k in range(steps):
            if set(hits) == set(generated) and not any(bool((group == k).any()) for _, group in hits.values()):
                continue  # nothing is unmasked in this update
            t = t_condition | {m: times[m][k] for m in generated}
            active = [m for m in guided if w.is_active(m, float(grid[m][k]))]
            out, uncond = predict(net, space, w, guiding, active, x, t, rng.at(2 * k))
            x_next = dict(x)
            for m in generated:
                args = (samplers[m][0], space[m], x[m], out[m], uncond.get(m), w.scale_of(m), times[m], k)
                keys = rng.at(k).keys(m, Draw.STEP)
                if isinstance(space[m], Gaussian):
                    x_next[m] = gaussian_step(*args, keys, x0_before, m)
                else:
                    x_next[m] = masked_step(*args, keys, hits[m][1] if m in hits else None)
            heun = [m for m in generated if samplers[m][0] == "heun" and k < steps - 1]
            if heun:  # the second evaluation is at the later time for these modalities only
                x_hat, t_hat = x | {m: x_next[m] for m in heun}, t | {m: times[m][k + 1] for m in heun}
                out, uncond = predict(net, space, w, guiding, active, x_hat, t_hat, rng.at(2 * k + 1))
                for m in heun:
                    eps = combine(out[m], uncond.get(m), w.scale_of(m))
                    slope = ode_drift(space[m].schedule, x_next[m], eps, times[m][k + 1])
                    dt = expand(times[m][k + 1] - times[m][k], slope)
                    x_next[m] = 0.5 * (x[m] + x_next[m]) + 0.5 * dt * slope
            x = x_next
    return {m: x[m] for m in space}


def predict(
    net, space: Space, w: Guidance, guiding: list[str], active: list[str], x: dict, t: dict, rng: Rng
) -> tuple[dict, dict]:
    """The predictions at (x, t) and, for the modalities `active`, those with the modalities `guiding` noisier."""
    out = space.evaluate(net, x, t)
    if not active:
        return out, {}
    noisy, t_noisy = w.noisier(space, x, t, guiding, rng)
    uncond = space.evaluate(net, x | noisy, t | t_noisy)
    return out, {m: uncond[m] for m in active}


def gaussian_step(
    method: str,
    process: Gaussian,
    x: Tensor,
    out,
    uncond,
    w: float,
    times: Tensor,
    k: int,
    keys,
    x0_before: dict,
    m: str,
) -> Tensor:
    """Update k of a Gaussian modality; the predictor of heun."""
    eps, schedule, (t, t_next) = combine(out, uncond, w), process.schedule, times[k : k + 2]
    last = k == len(times) - 2
    if method == "dpmpp_2m":
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        x0 = (x - sigma * eps) / alpha
        before, x0_before[m] = x0_before.get(m), x0
        if last:
            return x0
        h = expand(half_log_snr(schedule, t_next) - half_log_snr(schedule, t), x)
        if before is not None:
            r = h / expand(half_log_snr(schedule, t) - half_log_snr(schedule, times[k - 1]), x)
            x0 = x0 + 0.5 * r * (x0 - before)
        return expand(schedule.sigma(t_next), x) / sigma * x - expand(schedule.alpha(t_next), x) * torch.expm1(-h) * x0
    dt = expand(t_next - t, x)
    if method != "euler_sde":
        return x + dt * ode_drift(schedule, x, eps, t)
    beta, score = expand(schedule.beta(t), x), -eps / expand(schedule.sigma(t), x)
    noise = reference.normal(keys, x[0].numel()).view(x.shape)
    return x - beta * (x + 2.0 * score) * dt + (0.0 if last else 1.0) * torch.sqrt(2.0 * beta * dt.abs()) * noise


def masked_step(
    method: str, process: Masked, x: Tensor, out, uncond, w: float, times: Tensor, k: int, keys, group: Tensor | None
) -> Tensor:
    """Update k of a masked modality; the last one unmasks all that is left."""
    t, mask_logit = times[k], process.mask_logit == "kept"
    logits, other = (None if o is None else LazyLogits.wrap(o).values() for o in (out, uncond))
    if method == "first_hitting":  # exactly the positions whose time has come
        now = group == k
        x_now = torch.where((x == process.mask_id) & ~now, 0, x)
        drawn = reference.tau_leap(logits, x_now, t, keys, process.states, "last", mask_logit, other, w)
        return torch.where(now, drawn, x)
    rate = (t - times[k + 1]) * process.schedule.reverse_rate(t)  # h s′/(eˢ − 1)
    rule = "last" if k == len(times) - 2 else {"tau_leap": "tau"}.get(method, method)
    return reference.tau_leap(logits, x, rate, keys, process.states, rule, mask_logit, other, w)


def first_hitting(x: Tensor, steps: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(N + 1, B) times before every update, and (B, L) the update that unmasks a position, for x all masked.

    The r-th of L positions, in the order of falling uniform times, is unmasked in update ⌊r N / L⌋, at the time of the
    first of its group.
    """
    hits, order = reference.uniform(keys, x.shape[1]).double().sort(dim=1, descending=True, stable=True)
    group = order.argsort(1) * steps // x.shape[1]
    first = [-(-k * x.shape[1] // steps) for k in range(steps + 1)]
    return torch.nn.functional.pad(hits, (0, 1))[:, first].T, group


def combine(out: Tensor, uncond: Tensor | None, w: float) -> Tensor:
    """w f(x, y_s) + (1 − w) f(x, y_σ)."""
    return out if uncond is None else w * out + (1.0 - w) * uncond


def ode_drift(schedule: GaussianSchedule, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """dx/dt = −β (x + score) of the probability-flow ODE."""
    return -expand(schedule.beta(t), x) * (x - eps / expand(schedule.sigma(t), x))


def half_log_snr(schedule: GaussianSchedule, t: Tensor) -> Tensor:
    """log(α/σ)."""
    return 0.5 * schedule.log_snr(t)


def expand(values: Tensor, x: Tensor) -> Tensor:
    """(B,) values as float32 that broadcast over x (B, …)."""
    return values.float().view(-1, *[1] * (x.ndim - 1))
