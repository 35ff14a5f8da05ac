"""Training times: one per sample and modality, independent or tied, spread evenly over a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .. import kernels
from ..kernels import Draw, Rng
from .processes import Process

DRAWS = ("decoupled", "unified")


@dataclasses.dataclass(frozen=True)
class TimeSampler:
    """Draws the training times of a batch.

    Args:
        draw: "decoupled", a time per modality (the paper), or "unified", one time for all (its ablation).
        low_discrepancy: spread the times of a batch evenly over [t_min, 1] per modality and jointly, which lowers the
            variance of the gradient; else independent uniforms.
        time_skew: {modality: s ≥ 1}: t = 1 − (1 − u)ˢ instead of t = u; a larger s draws more noisy times.
        condition_prob: {modality, or several joined by +: probability that it is, or they are, clean conditions of a
            sample, at time t_min}. At most one of these applies to a sample, so the probabilities sum to at most 1.
        subset_prob: probability that a random part of the modalities are clean conditions of a sample: each with
            probability 1/2, at least one not. Draws from the samples to which no `condition_prob` applies.
        groups: the modalities of which a random part is drawn, each a list of processes; default every process alone.
    """

    draw: str = "decoupled"
    low_discrepancy: bool = True
    time_skew: dict[str, float] = dataclasses.field(default_factory=dict)
    condition_prob: dict[str, float] = dataclasses.field(default_factory=dict)
    subset_prob: float = 0.0
    groups: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        if any(s < 1.0 for s in self.time_skew.values()):
            raise ValueError(f"times.time_skew must be at least 1, got {self.time_skew}")
        if self.draw not in DRAWS:
            raise ValueError(f"times.draw must be one of {', '.join(DRAWS)}, got {self.draw!r}")
        probs = self.condition_prob.values()
        if any(p < 0 for p in probs) or sum(probs) + self.subset_prob > 1.0 + 1e-9:
            more = f" and subset_prob {self.subset_prob}" if self.subset_prob else ""
            raise ValueError(f"times.condition_prob must be >= 0 and sum to at most 1, got {self.condition_prob}{more}")

    def without_conditions(self) -> TimeSampler:
        """The same, with no modality a clean condition."""
        return dataclasses.replace(self, condition_prob={}, subset_prob=0.0)

    def condition_share(self, name: str, count: int) -> float:
        """The share of samples in which a process is a clean condition; count: number of processes in the space."""
        share = sum(p for subset, p in self.condition_prob.items() if name in subset.split("+"))
        n = len(self.groups) or count
        return share + self.subset_prob * (2 ** (n - 1) - 1) / max(2**n - 1, 1)

    def __call__(self, space: Mapping[str, Process], rng: Rng) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(times {modality: (B,) float64}, loss masks {modality: (B,) float32, 0 where it is a condition, else 1})."""
        conditions = [name for subset in self.condition_prob for name in subset.split("+")]
        for what, names in (("condition_prob", conditions), ("time_skew", self.time_skew)):
            if unknown := sorted(set(names) - set(space)):
                raise ValueError(f"times.{what} names unknown modality {unknown[0]!r}; there are {', '.join(space)}")
        u = self._uniforms(space, rng)
        conditioned = self._conditioned(space, rng)
        times, loss_mask = {}, {}
        for name, process in space.items():
            skewed = 1.0 - (1.0 - u[name]) ** self.time_skew.get(name, 1.0)
            t = process.t_min + (1.0 - process.t_min) * skewed
            times[name] = torch.where(conditioned[name], process.t_min, t)
            loss_mask[name] = (~conditioned[name]).float()
        return times, loss_mask

    def _uniforms(self, names: Iterable[str], rng: Rng) -> dict[str, Tensor]:
        """{modality: (B,) float64 in [0, 1)}.

        Low discrepancy: sample i gets frac(shift + i g_m), a shift per step and an additive recurrence with the
        generalized golden ratio (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018). It
        depends on the global sample index only, so ranks need no communication.
        """
        names = list(names)
        shared = dataclasses.replace(rng, samples=torch.zeros_like(rng.samples[:1]))
        dims = 1 if self.draw == "unified" else len(names)
        golden = _golden_ratio(dims)
        out = {}
        for m, name in enumerate(names):
            stream = "all" if self.draw == "unified" else name
            if self.low_discrepancy:
                shift = kernels.uniform(shared.keys(stream, Draw.TIME), 1).double()[:, 0]
                step = golden ** -(1.0 + (m if dims > 1 else 0))
                out[name] = torch.remainder(shift + rng.samples.double() * step, 1.0)
            else:
                out[name] = kernels.uniform(rng.keys(stream, Draw.TIME), 1).double()[:, 0].clamp(max=1 - 2.0**-24)
        return out

    def _conditioned(self, names: Iterable[str], rng: Rng) -> dict[str, Tensor]:
        """{modality: (B,) bool, whether it is a clean condition}."""
        names = list(names)
        u = kernels.uniform(rng.keys("all", Draw.CONDITIONED), 1)[:, 0].double()
        conditioned, low = {name: torch.zeros_like(u, dtype=torch.bool) for name in names}, 0.0
        alone = [name for name in names if name in self.condition_prob]
        for subset in [*alone, *(s for s in self.condition_prob if "+" in s)]:
            high = low + self.condition_prob[subset]
            for name in subset.split("+"):
                conditioned[name] = conditioned[name] | ((u > low) & (u <= high))
            low = high
        if self.subset_prob:
            applies = (u > low) & (u <= low + self.subset_prob)
            groups = self.groups or tuple((name,) for name in names)
            chosen = self._random_subset(len(groups), rng)
            for i, group in enumerate(groups):
                for name in group:
                    conditioned[name] = conditioned[name] | (applies & chosen[:, i])
        return conditioned

    def _random_subset(self, n: int, rng: Rng) -> Tensor:
        """(B, n) bool: a subset drawn uniformly from all but the whole set."""
        u = kernels.uniform(rng.keys("subset", Draw.CONDITIONED), 1)[:, 0].double()
        number = (u * (2**n - 1)).long().clamp(max=2**n - 2)  # the number whose bits are all 1 is left out
        return (number[:, None] >> torch.arange(n, device=number.device)) & 1 == 1


def _golden_ratio(dims: int) -> float:
    """The root of g^(dims+1) = g + 1: the golden ratio for one dimension, its generalization for more."""
    g = 1.5
    for _ in range(60):
        g = (1.0 + g) ** (1.0 / (dims + 1))
    return g
