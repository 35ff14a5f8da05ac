"""Conditions: a modality, or a part of one, that is fixed while the rest is sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..diffusion import Masked, Process, Space
from ..diffusion.space import expand_time
from ..kernels import Draw, Rng


@dataclasses.dataclass(frozen=True)
class Condition:
    """A modality, or its elements inside a mask, that is a condition, clean or at a noise time.

    Without a mask the whole modality stays at time t. With a mask the elements inside it are observed, and
    the others are sampled:

    - Masked (discrete) modalities: observed elements start as they are instead of as the mask token. This is exact
      for every network. With t > 0 they are noised once, and those that become masks are sampled as well.
    - Gaussian modalities of a network that was trained with `observed` elements (`net.observes`), t = 0:
      observed elements are clean at every evaluation, and the network sees which they are.
    - All others: in every step the observed elements are set to x noised to the current time (the replacement method),
      down to time t. This is approximate, because the network's predictions do not account for the condition exactly.
      With two coordinates of correlation 0.8, one of them known to be 1, the other should have mean 0.80 and standard
      deviation 0.60; with the exact score heun gives 0.34 and 0.82, euler_sde 0.50 and 0.77 (50 and 200 steps alike).

    Args:
        x: (n, *shape) clean data; values outside the mask are not used.
        t: noise time of the condition in [0, 1]; 0 is clean.
        mask: (n, *shape) bool, or broadcastable to it: the observed elements; None: all.
    """

    x: Tensor
    t: float = 0.0
    mask: Tensor | None = None

    @classmethod
    def wrap(cls, value: Tensor | tuple[Tensor, float] | Condition) -> Condition:
        """A condition from clean data, from (clean data, time) or from a condition."""
        if isinstance(value, Condition):
            return value
        return cls(*value) if isinstance(value, tuple) else cls(value)

    def check(self, name: str, space: Space) -> None:
        """Raise ValueError, naming the modality, unless x and mask fit its process."""
        if not 0.0 <= self.t <= 1.0:
            raise ValueError(f"{name}: the time of a condition must lie in [0, 1], got {self.t}")
        if self.mask is None:
            space.check({name: self.x})
            return
        if name not in space:
            raise ValueError(f"unknown modality {name!r}; this space has {', '.join(space)}")
        space[name].check_shape(name, self.x)
        if self.mask.dtype != torch.bool:
            raise ValueError(f"{name}: the mask of a condition must be bool, got {self.mask.dtype}")
        try:
            mask = self.mask.expand(self.x.shape)
        except RuntimeError:
            raise ValueError(
                f"{name}: a mask of shape {tuple(self.mask.shape)} does not fit data of shape {tuple(self.x.shape)}"
            ) from None
        space[name].check(name, torch.where(mask, self.x, torch.zeros_like(self.x)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with a function applied to its tensors, say to select samples."""
        mask = None if self.mask is None else function(self.mask.expand(self.x.shape))
        return Condition(function(self.x), self.t, mask)

    def noised(self, name: str, process: Process, rng: Rng) -> Tensor:
        """x noised to time t."""
        return self.at(name, process, rng, expand_time(self.t, len(self.x), self.x.device)) if self.t else self.x

    def at(self, name: str, process: Process, rng: Rng, t: Tensor) -> Tensor:
        """x noised to times t (B,), with the same random numbers at every time."""
        return process.perturb(self.x, t, rng.at(0).keys(name, Draw.CONDITION))


def is_exact(process: Process) -> bool:
    """Whether the sampler never changes observed elements, as in the masked process."""
    return isinstance(process, Masked)


def initial_state(
    space: Space, conditions: Mapping[str, Condition], generated: Iterable[str], rng: Rng
) -> dict[str, Tensor]:
    """Every modality at the start of sampling: `generated` ones at pure noise, conditions at their times."""
    x = space.prior(rng, generated)
    for m, c in conditions.items():
        if c.mask is None:
            x[m] = c.noised(m, space[m], rng)
        elif is_exact(space[m]):
            x[m] = torch.where(c.mask, c.noised(m, space[m], rng), x[m])
    return {m: x[m] for m in space}
