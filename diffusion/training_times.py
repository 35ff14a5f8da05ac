"""When: the times at which training looks, and the grids along which sampling walks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import kernels
from ..kernels import Draw, Rng
from .processes import Gaussian, Process

DRAWS = ("decoupled", "unified")
GRIDS = ("linear", "rho", "logsnr")


@dataclasses.dataclass(frozen=True)
class TimeSampler:
    """How training times are drawn for a batch.

    Args:
        draw: "decoupled", a time per modality (the paper), or "unified", one time for all (its ablation).
        low_discrepancy: spread the times of a batch evenly over [t_min, 1] per modality and jointly, which
            lowers the gradient's variance; else independent uniforms.
        skew: {modality: s ≥ 1}: t = 1 − (1 − u)ˢ instead of t = u, so that a larger s looks more often at noisy times.
        hold: {modality: share of samples in which it is a clean condition, held at its t_min}. At most one
            modality is held in a sample, so the shares may sum to 1 at most.
    """

    draw: str = "decoupled"
    low_discrepancy: bool = True
    skew: dict[str, float] = dataclasses.field(default_factory=dict)
    hold: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if any(s < 1.0 for s in self.skew.values()):
            raise ValueError(f"times.time_skew must be at least 1, got {self.skew}")
        if self.draw not in DRAWS:
            raise ValueError(f"times.draw must be one of {', '.join(DRAWS)}, got {self.draw!r}")
        if any(share < 0 for share in self.hold.values()) or sum(self.hold.values()) > 1.0 + 1e-9:
            raise ValueError(f"times.condition_prob shares must be >= 0 and sum to at most 1, got {self.hold}")

    def __call__(self, space: dict[str, Process], rng: Rng) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Times {name: (B,) float64} and where a modality loss_mask {name: (B,) float32 of 1, or 0 if held}."""
        for what, names in (("hold", self.hold), ("skew", self.skew)):
            if unknown := sorted(set(names) - set(space)):
                raise ValueError(f"times.{what} names unknown modality {unknown[0]!r}; there are {', '.join(space)}")
        u = self._uniforms(space, rng)
        held = self._held(list(space), rng)
        times, loss_mask = {}, {}
        for name, process in space.items():
            share = 1.0 - (1.0 - u[name]) ** self.skew.get(name, 1.0)
            t = process.t_min + (1.0 - process.t_min) * share
            times[name] = torch.where(held[name], process.t_min, t)
            loss_mask[name] = (~held[name]).float()
        return times, loss_mask

    def _uniforms(self, names, rng: Rng) -> dict[str, Tensor]:
        """(B,) float64 in [0, 1) per modality.

        Low discrepancy: sample i gets frac(shift + i g_m), a shift per step and an additive recurrence with the
        generalized golden ratio (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
        It needs only the global sample index, so ranks agree without talking.
        """
        shared = dataclasses.replace(rng, samples=torch.zeros_like(rng.samples[:1]))
        dims = 1 if self.draw == "unified" else len(names)
        golden = _golden(dims)
        out = {}
        for m, name in enumerate(names):
            key_name = "all" if self.draw == "unified" else name
            if self.low_discrepancy:
                shift = kernels.uniform(shared.keys(key_name, Draw.TIME), 1).double()[:, 0]
                step = golden ** -(1.0 + (m if dims > 1 else 0))
                out[name] = torch.remainder(shift + rng.samples.double() * step, 1.0)
            else:
                out[name] = kernels.uniform(rng.keys(key_name, Draw.TIME), 1).double()[:, 0].clamp(max=1 - 2.0**-24)
        return out

    def _held(self, names: list[str], rng: Rng) -> dict[str, Tensor]:
        u = kernels.uniform(rng.keys("all", Draw.CONDITIONED), 1)[:, 0].double()
        held, low = {}, 0.0
        for name in names:
            high = low + self.hold.get(name, 0.0)
            held[name] = (u > low) & (u <= high)
            low = high
        return held


def _golden(dims: int) -> float:
    """The root of g^(dims+1) = g + 1: the golden ratio for one dimension, its generalization for more."""
    g = 1.5
    for _ in range(60):
        g = (1.0 + g) ** (1.0 / (dims + 1))
    return g


def grid(process: Process, steps: int, kind: str = "linear", start: float = 1.0, rho: float = 7.0) -> Tensor:
    """(steps + 1,) float64 times from `start` down to t_min, then 0: a walk of `steps` updates.

    linear: evenly spaced (official). logsnr: evenly spaced in log-SNR. rho: evenly spaced in
    (σ/α)^(1/rho) as in EDM (arXiv 2206.00364, eq. 5). The last two are for Gaussian processes.

    Raises:
        ValueError: fewer than one step, an unknown kind, or a kind that the process does not have.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if kind not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {kind!r}")
    if kind != "linear" and not isinstance(process, Gaussian):
        raise ValueError(f"grid {kind} is for Gaussian modalities; a discrete one walks a linear grid")
    if start <= process.t_min:  # one update takes off what little noise there is, the others stand still
        return torch.tensor([start] + [0.0] * steps, dtype=torch.float64)
    if steps == 1:
        inner = torch.tensor([start], dtype=torch.float64)
    elif kind == "linear":
        inner = torch.linspace(start, process.t_min, steps, dtype=torch.float64)
    else:
        ends = torch.tensor([start, process.t_min], dtype=torch.float64)
        high, low = process.schedule.log_snr(ends)  # log-SNR at the noisy and at the clean end
        share = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
        if kind == "logsnr":
            log_snr = high + share * (low - high)
        else:
            noisy, clean = torch.exp(-high / (2.0 * rho)), torch.exp(-low / (2.0 * rho))
            log_snr = -2.0 * rho * torch.log(noisy + share * (clean - noisy))
        inner = process.schedule.time_of_log_snr(log_snr).clamp(process.t_min, start)
        inner[0], inner[-1] = start, process.t_min
    return torch.cat([inner, torch.zeros(1, dtype=torch.float64)])
