"""Diffusion of one state space: how it is noised, what its network loss_mask, what pure noise looks like.

A process knows the shape of one sample, its schedule and its earliest time t_min; it is handed noise keys
(see `kernels.philox`) and per-sample times (B,). The network's answer reaches it as `out`: ε̂ for Gaussian
data, `LazyLogits` (or a plain tensor of logits) for discrete data.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from .. import kernels
from ..kernels import LazyLogits
from .schedules import GaussianSchedule, LogLinear


class Process(abc.ABC):
    """One modality's forward process on [0, 1].

    Attributes:
        shape: shape of one sample, without the batch.
        t_min: times below it count as clean; training and sampling stay above.
    """

    shape: tuple[int, ...]
    t_min: float
    discrete: bool

    @abc.abstractmethod
    def check(self, name: str, x: Tensor) -> None:
        """Raise ValueError, naming the modality, unless x (B, *shape) is valid clean data."""

    @abc.abstractmethod
    def prior(self, n: int, keys: Tensor) -> Tensor:
        """(n, *shape) of pure noise, time 1."""

    @abc.abstractmethod
    def transition(self, x: Tensor, s: Tensor, t: Tensor, keys: Tensor) -> Tensor:
        """Carry x from noise level s to level t ≥ s, both (B,); level 0 is clean data."""

    @abc.abstractmethod
    def loss(self, out, x0: Tensor, xt: Tensor, keys: Tensor, given: Tensor | None = None) -> Tensor:
        """(B,) float32 loss of a network output at x_t, with the keys that noised x₀.

        given: bool of x₀'s shape, elements that are a condition and add nothing; the mean is over all elements.
        """

    @abc.abstractmethod
    def elbo_weight(self, t: Tensor) -> Tensor:
        """(B,) weight that turns `loss` into the negative ELBO's integrand."""

    def perturb(self, x0: Tensor, t: Tensor, keys: Tensor) -> Tensor:
        """Draw x_t given x₀; t (B,)."""
        return self.transition(x0, torch.zeros_like(t), t, keys)

    def time_conditioning(self, t: Tensor) -> Tensor:
        """(B,) float32: what the network is told about the time."""
        return t.float()

    def answer(self, out, x: Tensor, t: Tensor):
        """What the network's raw output at (x, t) says in the terms of this module: ε̂ or logits."""
        return out

    def key_mask(self, x: Tensor) -> Tensor | None:
        """(B, L) bool, True where attention may look, or None for everywhere."""
        return None

    def check_shape(self, name: str, x: Tensor) -> None:
        """Raise ValueError, naming the modality, unless x is (B, *shape)."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{name}: expected samples of shape {self.shape}, got {tuple(x.shape[1:])}")


class Gaussian(Process):
    """Variance-preserving Gaussian diffusion of tensors; everything but the network speaks of ε̂.

    Args:
        shape: (C, H, W) or (features,).
        time_conditioning: what conditions the network: "sigma" (official text+image), "time", or "log_snr"
            (scaled by 1/8 to about [−1, 1]).
        predicts: what the network puts out. "eps" (official), or "v" = α ε − σ x₀ (arXiv 2202.00512), read as
            ε̂ = σ x + α v̂: near pure noise ε̂ then follows x by itself and the network's error counts α times.
    """

    discrete = False

    def __init__(
        self, shape, schedule: GaussianSchedule, t_min: float = 1e-5, time_conditioning: str = "sigma", predicts: str = "eps"
    ):
        self.shape, self.schedule, self.t_min, self.predicts = tuple(shape), schedule, t_min, predicts
        if time_conditioning not in ("sigma", "time", "log_snr"):
            raise ValueError(f"time_conditioning must be sigma, time or log_snr, got {time_conditioning!r}")
        if predicts not in ("eps", "v"):
            raise ValueError(f"predicts must be eps or v, got {predicts!r}")
        self._time_conditioning = time_conditioning

    def answer(self, out, x, t):
        if self.predicts == "eps":
            return out
        alpha, sigma = (f(t).float().view(-1, *[1] * (x.ndim - 1)) for f in (self.schedule.alpha, self.schedule.sigma))
        return sigma * x + alpha * out.float()

    def check(self, name, x):
        self.check_shape(name, x)
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating tensor, got {x.dtype}")

    def prior(self, n, keys):
        return kernels.normal(keys, math.prod(self.shape)).view(n, *self.shape)

    def transition(self, x, s, t, keys):
        b = self.schedule.integral(t) - self.schedule.integral(s)
        return kernels.gaussian_perturb(x, torch.exp(-b), torch.sqrt(-torch.expm1(-2.0 * b)), keys)

    def time_conditioning(self, t):
        if self._time_conditioning == "sigma":
            return self.schedule.sigma(t).float()
        if self._time_conditioning == "log_snr":
            return (self.schedule.log_snr(t) / 8.0).float()
        return t.float()

    def loss(self, out, x0, xt, keys, given=None):
        if given is not None:
            noise = kernels.normal(keys, math.prod(self.shape)).view(x0.shape)
            out = torch.where(given, noise.to(out.dtype), out)
        return kernels.eps_mse(out, keys)

    def elbo_weight(self, t):
        """½ |dλ/dt| per element, with λ the log-SNR: β/σ² (arXiv 2107.00630)."""
        return self.schedule.beta(t) / self.schedule.sigma(t) ** 2

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR, γ)/SNR for ε prediction (arXiv 2303.09556)."""
        return torch.clamp(gamma * torch.exp(-self.schedule.log_snr(t)), max=1.0)


class Discrete(Process):
    """What masked and uniform diffusion share: (B, L) int64 tokens of `states` real states."""

    discrete = True

    def __init__(self, length: int, states: int, schedule: LogLinear, t_min: float):
        if states < 1 or length < 1:
            raise ValueError(f"a discrete space needs states >= 1 and length >= 1, got {states} and {length}")
        self.shape, self.states, self.schedule, self.t_min = (length,), states, schedule, t_min

    def check(self, name, x):
        self.check_shape(name, x)
        if x.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 tokens, got {x.dtype}")
        if x.numel() and not (int(x.min()) >= 0 and int(x.max()) < self.states):
            raise ValueError(f"{name}: tokens must lie in [0, {self.states}), got {int(x.min())} to {int(x.max())}")

    def _transition_prob(self, s: Tensor, t: Tensor) -> Tensor:
        """Probability that a position untouched at level s is noised by level t."""
        return -torch.expm1(self.schedule.total(s) - self.schedule.total(t))


class Masked(Discrete):
    """Absorbing diffusion: states 0 … K−1 and the mask K. Networks give log p(x₀) over the K real states.

    Args:
        counted: positions in the loss: "all" (official), "masked", or "balanced": the masked ones with the mean of the
            ELBO's weight over all times at which so many are masked, (n + 1)/k for k of the n that are not given. The
            same objective as "masked" under the ELBO's weight 1/t, without its variance; it takes no further weight.
        mask_logit: how a head with K + 1 columns is read. None: the head has K columns.
            "extra" (official text+image): p is normalized over the K real states and the mask logit m only adds
            log(1 + eᵐ) to the loss. "leak" (official tables): p is normalized over K + 1 columns and the share of
            the mask lowers the total rate.
        pad_id, attend_pads: with attend_pads False, keys whose current token is pad_id are hidden from attention.
    """

    def __init__(
        self,
        length: int,
        states: int,
        schedule: LogLinear,
        t_min: float = 1e-5,
        counted: str = "all",
        mask_logit: str | None = None,
        pad_id: int | None = None,
        attend_pads: bool = True,
    ):
        super().__init__(length, states, schedule, t_min)
        if counted not in ("all", "masked", "balanced"):
            raise ValueError(f"counted must be all, masked or balanced, got {counted!r}")
        if mask_logit not in (None, "extra", "leak"):
            raise ValueError(f"mask_logit must be null, extra or leak, got {mask_logit!r}")
        if not attend_pads and pad_id is None:
            raise ValueError("attend_pads: false needs a pad_id")
        self.counted, self.mask_logit, self.pad_id, self.attend_pads = counted, mask_logit, pad_id, attend_pads

    @property
    def mask_id(self) -> int:
        return self.states

    def prior(self, n, keys):
        return torch.full((n, *self.shape), self.mask_id, dtype=torch.int64, device=keys.device)

    def transition(self, x, s, t, keys):
        return kernels.mask_perturb(x, self._transition_prob(s, t), keys, self.mask_id)

    def key_mask(self, x):
        return None if self.attend_pads else x != self.pad_id

    def loss(self, out, x0, xt, keys, given=None):
        target = x0 if self.counted == "all" else torch.where(xt == self.mask_id, x0, -1)
        target = target if given is None else torch.where(given, -1, target)
        out = LazyLogits.wrap(out)
        rows = out.cross_entropy(target, self.states + (self.mask_logit == "kept"))
        if self.mask_logit == "ignored":
            rows = rows + torch.where(target < 0, 0.0, torch.nn.functional.softplus(out.column(self.states)))
        if self.counted == "balanced":
            free = rows.shape[1] if given is None else (~given).sum(1)
            return rows.mean(1) * (free + 1) / (target >= 0).sum(1).clamp(min=1)
        return rows.mean(1)

    def elbo_weight(self, t):
        return self.schedule.reverse_rate(t)


class Uniform(Discrete):
    """Uniform diffusion: a noised position holds any of the K states. Networks predict x₀."""

    def __init__(self, length: int, states: int, schedule: LogLinear, t_min: float = 1e-3):
        super().__init__(length, states, schedule, t_min)

    def prior(self, n, keys):
        tokens = torch.zeros(n, *self.shape, dtype=torch.int64, device=keys.device)
        return kernels.uniform_perturb(tokens, torch.ones(n, device=keys.device), keys, self.states)

    def transition(self, x, s, t, keys):
        return kernels.uniform_perturb(x, self._transition_prob(s, t), keys, self.states)

    def odds(self, t: Tensor) -> Tensor:
        """a K/(1 − a) with a = e^{−s}: how much likelier the clean state is than any other one, minus 1."""
        return self.states / torch.expm1(self.schedule.total(t))

    def loss(self, out, x0, xt, keys, given=None):
        target = x0 if given is None else torch.where(given, -1, x0)
        return LazyLogits.wrap(out).cross_entropy(target, self.states).mean(1)

    def elbo_weight(self, t):
        raise ValueError("weighting elbo is not defined for the uniform process: choose none or learned")
