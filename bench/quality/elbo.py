"""Bounds on the likelihood: bits per token and bits per dimension of each modality, alone or given the others clean.

Both are negative evidence lower bounds, so the true bits are at most these. "Alone" holds the other modalities at
pure noise, time 1; "given" holds them clean. Since log p(x, y) = log p(y) + log p(x | y), one modality alone plus the
other given it bounds the pair.

Masked text (MDLM, arXiv 2406.07524): with a share p of the positions masked,

    −log p(x) ≤ ∫₀¹ dp (1/p) E Σ_masked −log p(x_i | x_masked).

The integral runs over the masked share itself, from nothing masked to everything, so no term for the ends is left.
All L positions count as tokens, pads included: the model writes those too.

Gaussian data (VDM, arXiv 2107.00630, eq. 11 to 15, continuous time): with λ the log-SNR, from t = 1 to t₀,

    −log p(x) ≤ KL(q(x₁|x) ‖ N(0, 1)) + ½ ∫ dλ E |ε − ε̂|² + E[−log p(x | x_t₀)].

Convention of the last term: pixels are taken as what they are, integers 0 … pixel_max, with
p(x_i | z_i) ∝ N(z_i; α x_i, σ²) over those levels, so no noise is added to the data and the bound is on a
probability. It holds for any t₀; here σ/α(t₀) is an eighth of the distance between levels, or t₀ = t_min if that is
later: nearer to clean data the level is plain to see, and a network that does not see it would pay for nothing.
Anything not on that grid, latents say, gets N(z/α, σ²/α²): a bound on a density, which may be negative.

The integrals are Monte Carlo: `repeats` passes over the data, each with its own shift of evenly spread times and its
own noise. `error` is the standard error of the mean over the passes; it says nothing about the choice of the samples.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ...diffusion import Gaussian, Masked, Space
from ...kernels import Draw, LazyLogits, Rng, normal, uniform
from ...kernels.philox import MASK32

CHUNK = 128
SHARP = 8  # levels lie this many σ/α apart at the clean end of their bound
GOLDEN = 0.6180339887498949  # multiples of it are spread evenly, however many
BINS = 1 << 24  # elements that the table of pixel levels may take at once


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
    net,
    space: Space,
    data: dict[str, Tensor],
    name: str,
    given: bool = False,
    repeats: int = 8,
    seed: int = 0,
    levels: int | None = None,
    chunk: int = CHUNK,
) -> Bound:
    """The negative ELBO of modality `name` of clean data {name: (n, *shape)}.

    Args:
        given: the other modalities are clean conditions, else pure noise.
        repeats: passes over the data, at least 2.
        levels: the data of a Gaussian modality are that many equally spaced values from −1 to 1; None: continuous.

    Raises:
        ValueError: a process without a bound, fewer than 2 repeats, data off the grid of levels.
    """
    process = space[name]
    if not isinstance(process, (Masked, Gaussian)):
        raise ValueError(f"{name}: a bound on the likelihood is there for masked and Gaussian modalities only")
    if repeats < 2:
        raise ValueError(f"the Monte Carlo error needs at least 2 repeats, got {repeats}")
    x0 = data[name]
    if levels is not None and not on_grid(x0, levels):
        raise ValueError(f"{name}: the data are not {levels} equally spaced values from -1 to 1")
    device = next((p.device for p in net.parameters()), x0.device) if isinstance(net, torch.nn.Module) else x0.device
    estimate = _masked if isinstance(process, Masked) else _gaussian
    n = len(x0)
    passes = []
    for k in range(repeats):
        shift = uniform(Rng(seed, torch.zeros(1, dtype=torch.int64), k).keys(name, Draw.TIME), 1).double()[0, 0]
        total = 0.0
        for first in range(0, n, chunk):
            index = torch.arange(first, min(first + chunk, n))
            u = torch.remainder(shift + index * GOLDEN, 1.0).clamp(min=2.0**-32).to(device)
            rng = Rng(seed & MASK32, index.to(device), k)
            x = {m: value[index].to(device) for m, value in data.items()}
            total += float(
                estimate(_Conditioned(net, space, x, name, given, rng), process, x[name], u, rng, levels).sum()
            )
        passes.append(total / n)
    bits = torch.tensor(passes, dtype=torch.float64) / math.log(2.0)
    per_sample, spread = float(bits.mean()), float(bits.std()) / math.sqrt(repeats)
    size = math.prod(process.shape)
    kind = "bits/token" if isinstance(process, Masked) else "bits/dim" if levels else "bits/dim (density)"
    return Bound(per_sample / size, spread / size, per_sample, kind)


class _Conditioned:
    """The network's answer for one modality, the others clean or at pure noise."""

    def __init__(self, net, space: Space, x: dict[str, Tensor], name: str, given: bool, rng: Rng):
        self.net, self.space, self.name = net, space, name
        n, device = len(rng.samples), rng.samples.device
        others = [m for m in space if m != name]
        self.x = {m: x[m] for m in others} if given else space.prior(rng, others)
        self.t = {m: torch.full((n,), 0.0 if given else 1.0, dtype=torch.float64, device=device) for m in others}

    def __call__(self, x: Tensor, t: Tensor):
        x, t = ({m: {**others, self.name: own}[m] for m in self.space} for others, own in ((self.x, x), (self.t, t)))
        return self.space.evaluate(self.net, x, t, [self.name])[self.name]


def _masked(ask: _Conditioned, process: Masked, x0: Tensor, share: Tensor, rng: Rng, levels) -> Tensor:
    """(B,) float64 nats; share (B,) of positions masked."""
    hidden = uniform(rng.keys(ask.name, Draw.NOISE), x0.shape[1]).double() < share[:, None]
    time = process.schedule.inverse_prob(share).clamp(max=1.0)
    out = LazyLogits.wrap(ask(torch.where(hidden, process.mask_id, x0), time))
    rows = out.cross_entropy(torch.where(hidden, x0, -1), process.states + (process.mask_logit == "kept"))
    return rows.double().sum(1) / share


def _gaussian(ask: _Conditioned, process: Gaussian, x0: Tensor, u: Tensor, rng: Rng, levels: int | None) -> Tensor:
    """(B,) float64 nats; u (B,) places the log-SNR evenly between its ends."""
    schedule = process.schedule
    ends = torch.tensor([1.0, _clean_end(process, levels)], dtype=torch.float64, device=u.device)
    low, high = schedule.log_snr(ends)
    wide = [-1] + [1] * (x0.ndim - 1)
    flat = x0.double().flatten(1)

    time = schedule.time_of_log_snr(low + u * (high - low)).clamp(float(ends[1]), 1.0)
    noise = normal(rng.keys(ask.name, Draw.NOISE), flat.shape[1]).view(x0.shape)
    alpha, sigma = (f(time).float().view(wide) for f in (schedule.alpha, schedule.sigma))
    answer = ask(alpha * x0 + sigma * noise, time)
    diffusion = 0.5 * (high - low) * (answer.double() - noise.double()).flatten(1).square().sum(1)

    (alpha1, alpha0), (sigma1, sigma0) = schedule.alpha(ends), schedule.sigma(ends)
    prior = 0.5 * (sigma1**2 + alpha1**2 * flat**2 - 1.0 - 2.0 * torch.log(sigma1)).sum(1)
    ratio = sigma0 / alpha0
    if levels is None:
        rest = torch.full_like(prior, flat.shape[1] * float(0.5 * math.log(2.0 * math.pi * math.e) + torch.log(ratio)))
    else:
        fresh = normal(rng.keys(ask.name, Draw.CONDITION), flat.shape[1]).double()
        rest = _levels_term(flat, flat + ratio * fresh, float(ratio), levels)
    return prior + diffusion + rest


def _clean_end(process: Gaussian, levels: int | None) -> float:
    """t₀, where the integral ends."""
    if levels is None:
        return process.t_min
    ratio = torch.tensor(2.0 / (levels - 1) / SHARP, dtype=torch.float64)
    return max(process.t_min, float(process.schedule.time_of_log_snr(-2.0 * torch.log(ratio))))


def _levels_term(x: Tensor, z: Tensor, ratio: float, levels: int) -> Tensor:
    """(B,) of Σ −log p(x_i | z_i) over the grid of levels, z already divided by α."""
    grid = torch.linspace(-1.0, 1.0, levels, dtype=torch.float64, device=x.device)
    rows, out = max(1, BINS // (levels * x.shape[1])), []
    for a, b in zip(x.split(rows), z.split(rows), strict=True):
        own = -0.5 * ((b - a) / ratio) ** 2
        every = -0.5 * ((b[..., None] - grid) / ratio) ** 2
        out.append((torch.logsumexp(every, -1) - own).sum(1))
    return torch.cat(out)


def on_grid(x: Tensor, levels: int) -> bool:
    """Whether all values are among `levels` equally spaced ones from −1 to 1."""
    place = (x.double() + 1.0) * (0.5 * (levels - 1))
    inside = place.min() > -1e-3 and place.max() < levels - 1 + 1e-3
    return bool(inside and (place - place.round()).abs().max() < 1e-3)
