"""Bounds on the likelihood: bits per token and bits per dimension of each modality, marginal or conditional.

Both are negative evidence lower bounds, so the true bits are at most these. For the marginal bound of a modality the
other modalities are pure noise, at time 1; for the conditional bound they are clean. Since
log p(x, y) = log p(y) + log p(x | y), the marginal bound of one modality plus the conditional bound of the other is a
bound of the pair.

Masked text (MDLM, arXiv 2406.07524): with a share p of the positions masked,

    −log p(x) ≤ ∫₀¹ dp (1/p) E Σ_masked −log p(x_i | x_masked).

The integral runs over the masked share from 0 to 1, so that there are no boundary terms. All L positions count as
tokens, padding included: the model generates it too.

Gaussian data (VDM, arXiv 2107.00630, eq. 11 to 15, continuous time): with λ the log-SNR, from t = 1 to t₀,

    −log p(x) ≤ KL(q(x₁|x) ‖ N(0, 1)) + ½ ∫ dλ E |ε − ε̂|² + E[−log p(x | x_t₀)].

Last term: pixels are integers 0 … pixel_max, and p(x_i | z_i) ∝ N(z_i; α x_i, σ²) over these levels, so that no noise
is added to the data and the bound is on a probability. It holds for every t₀; here σ/α(t₀) is an eighth of the distance
between levels, or t₀ = t_min if that is later. Closer to clean data the level can be read from z without error, and the
integral would only add the error of the network. Data that are not on such a grid, latents for example, get
N(z/α, σ²/α²): a bound on a density, which may be negative.

The integrals are Monte Carlo estimates: `repeats` passes over the data, each with its own shift of evenly spread times
and its own noise. `error` is the standard error of the mean over the passes; it does not include the choice of the
samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...diffusion import Gaussian, Masked, Space
from ...kernels import Draw, LazyLogits, Rng, normal, uniform
from ...kernels.philox import MASK32

BATCH_SIZE = 128
LEVEL_DISTANCE = 8  # distance between pixel levels at t₀, in units of σ/α
GOLDEN_RATIO = 0.6180339887498949  # its multiples modulo 1 are spread evenly, whatever their number
MAX_ELEMENTS = 1 << 24  # of the table (samples, pixels, levels) in memory at once


@dataclasses.dataclass(frozen=True)
class Bound:
    """bits: per token or dimension. error: Monte Carlo standard error. per_sample: bits of a whole sample.

    unit: "bits/token", "bits/dim" (a probability) or "bits/dim (density)".
    """

    bits: float
    error: float
    per_sample: float
    unit: str


@torch.no_grad()
def bound(
    net: Callable,
    space: Space,
    data: dict[str, Tensor],
    name: str,
    conditional: bool = False,
    repeats: int = 8,
    seed: int = 0,
    levels: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Bound:
    """The negative ELBO of modality `name` of clean data {name: (n, *shape)}.

    Args:
        conditional: the other modalities are clean conditions; else they are pure noise.
        repeats: passes over the data, at least 2.
        levels: the data of a Gaussian modality are that many equally spaced values from −1 to 1; None: continuous.

    Raises:
        ValueError: the process has no bound, fewer than 2 repeats, or data that are not on the grid of levels.
    """
    process = space[name]
    _check(process, name, data[name], repeats, levels)
    device = next((p.device for p in net.parameters()), None) if isinstance(net, torch.nn.Module) else None
    device = device or data[name].device
    estimate = _masked if isinstance(process, Masked) else _gaussian
    n = len(data[name])
    passes = []
    for k in range(repeats):
        shift = uniform(Rng(seed, torch.zeros(1, dtype=torch.int64), k).keys(name, Draw.TIME), 1).double()[0, 0]
        total = 0.0
        for start in range(0, n, batch_size):
            index = torch.arange(start, min(start + batch_size, n))
            u = torch.remainder(shift + index * GOLDEN_RATIO, 1.0).clamp(min=2.0**-32).to(device)
            rng = Rng(seed & MASK32, index.to(device), k)
            x = {m: value[index].to(device) for m, value in data.items()}
            predict = _Predictor(net, space, x, name, conditional, rng)
            total += float(estimate(predict, process, x[name], u, rng, levels).sum())
        passes.append(total / n)
    return _bound(passes, process, levels)


def has_bound(process: object) -> bool:
    """Whether there is a bound on the likelihood under a process."""
    return isinstance(process, (Masked, Gaussian))


def _check(process: object, name: str, x0: Tensor, repeats: int, levels: int | None) -> None:
    if not has_bound(process):
        raise ValueError(f"{name}: likelihood bounds exist for masked and Gaussian modalities only")
    if repeats < 2:
        raise ValueError(f"the Monte Carlo error needs at least 2 repeats, got {repeats}")
    if levels is not None and not on_grid(x0, levels):
        raise ValueError(f"{name}: the data are not {levels} equally spaced values from -1 to 1")


def _bound(passes: list[float], process: Masked | Gaussian, levels: int | None) -> Bound:
    """From nats per sample of every pass."""
    bits = torch.tensor(passes, dtype=torch.float64) / math.log(2.0)
    per_sample, error = float(bits.mean()), float(bits.std()) / math.sqrt(len(passes))
    size = math.prod(process.shape)
    if isinstance(process, Masked):
        unit = "bits/token"
    else:
        unit = "bits/dim" if levels else "bits/dim (density)"
    return Bound(per_sample / size, error / size, per_sample, unit)


class _Predictor:
    """The network's prediction for one modality, with the other modalities clean or pure noise."""

    def __init__(self, net: Callable, space: Space, x: dict[str, Tensor], name: str, conditional: bool, rng: Rng):
        self.net, self.space, self.name = net, space, name
        n, device = len(rng.samples), rng.samples.device
        others = [m for m in space if m != name]
        time = 0.0 if conditional else 1.0
        self.x = {m: x[m] for m in others} if conditional else space.prior(rng, others)
        self.t = {m: torch.full((n,), time, dtype=torch.float64, device=device) for m in others}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor | LazyLogits:
        all_x, all_t = {**self.x, self.name: x}, {**self.t, self.name: t}
        ordered_x = {m: all_x[m] for m in self.space}
        ordered_t = {m: all_t[m] for m in self.space}
        return self.space.evaluate(self.net, ordered_x, ordered_t, [self.name])[self.name]


def _masked(predict: _Predictor, process: Masked, x0: Tensor, share: Tensor, rng: Rng, levels: int | None) -> Tensor:
    """(B,) float64 nats; share (B,) of positions to mask."""
    masked = uniform(rng.keys(predict.name, Draw.NOISE), x0.shape[1]).double() < share[:, None]
    time = process.schedule.inverse_prob(share).clamp(max=1.0)
    logits = LazyLogits.wrap(predict(torch.where(masked, process.mask_id, x0), time))
    nats = logits.cross_entropy(torch.where(masked, x0, -1), process.states + (process.mask_logit == "kept"))
    return nats.double().sum(1) / share


def _gaussian(predict: _Predictor, process: Gaussian, x0: Tensor, u: Tensor, rng: Rng, levels: int | None) -> Tensor:
    """(B,) float64 nats; u (B,) in [0, 1] is the place of the log-SNR between its ends."""
    schedule = process.schedule
    ends = torch.tensor([1.0, _end_time(process, levels)], dtype=torch.float64, device=u.device)
    low, high = schedule.log_snr(ends)
    flat = x0.double().flatten(1)

    time = schedule.time_of_log_snr(low + u * (high - low)).clamp(float(ends[1]), 1.0)
    noise = normal(rng.keys(predict.name, Draw.NOISE), flat.shape[1]).view(x0.shape)
    per_sample = [-1] + [1] * (x0.ndim - 1)
    alpha, sigma = schedule.alpha(time).float().view(per_sample), schedule.sigma(time).float().view(per_sample)
    prediction = predict(alpha * x0 + sigma * noise, time)
    diffusion = 0.5 * (high - low) * (prediction.double() - noise.double()).flatten(1).square().sum(1)

    (alpha1, alpha0), (sigma1, sigma0) = schedule.alpha(ends), schedule.sigma(ends)
    prior = 0.5 * (sigma1**2 + alpha1**2 * flat**2 - 1.0 - 2.0 * torch.log(sigma1)).sum(1)
    ratio = sigma0 / alpha0
    if levels is None:
        entropy = 0.5 * math.log(2.0 * math.pi * math.e) + torch.log(ratio)
        reconstruction = torch.full_like(prior, flat.shape[1] * float(entropy))
    else:
        end_noise = normal(rng.keys(predict.name, Draw.CONDITION), flat.shape[1]).double()
        reconstruction = _level_nats(flat, flat + ratio * end_noise, float(ratio), levels)
    return prior + diffusion + reconstruction


def _end_time(process: Gaussian, levels: int | None) -> float:
    """t₀, where the integral ends."""
    if levels is None:
        return process.t_min
    ratio = torch.tensor(2.0 / (levels - 1) / LEVEL_DISTANCE, dtype=torch.float64)
    return max(process.t_min, float(process.schedule.time_of_log_snr(-2.0 * torch.log(ratio))))


def _level_nats(x: Tensor, z: Tensor, ratio: float, levels: int) -> Tensor:
    """(B,) of Σ −log p(x_i | z_i) over the grid of levels, z already divided by α."""
    grid = torch.linspace(-1.0, 1.0, levels, dtype=torch.float64, device=x.device)
    batch, nats = max(1, MAX_ELEMENTS // (levels * x.shape[1])), []
    for a, b in zip(x.split(batch), z.split(batch), strict=True):
        own = -0.5 * ((b - a) / ratio) ** 2
        every = -0.5 * ((b[..., None] - grid) / ratio) ** 2
        nats.append((torch.logsumexp(every, -1) - own).sum(1))
    return torch.cat(nats)


def on_grid(x: Tensor, levels: int) -> bool:
    """Whether all values are among `levels` equally spaced ones from −1 to 1."""
    index = (x.double() + 1.0) * (0.5 * (levels - 1))
    inside = index.min() > -1e-3 and index.max() < levels - 1 + 1e-3
    return bool(inside and (index - index.round()).abs().max() < 1e-3)
