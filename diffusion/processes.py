"""Diffusion of one state space: forward process, prior, loss and the conversion of network outputs.

A process has the shape of one sample, a schedule and a smallest time t_min. Its methods take random-number keys
(see `kernels.philox`) and times per sample (B,). Predictions `out` are ε̂ for Gaussian data and `LazyLogits` (or a
plain tensor of logits) for discrete data.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..kernels import LazyLogits
from .schedules import GaussianSchedule, LogLinear


class Process(abc.ABC):
    """The forward process of one modality for times in [0, 1].

    Attributes:
        shape: shape of one sample, without the batch.
        schedule: how much of the data is left at a time.
        t_min: smallest time of training and sampling; data at smaller times counts as clean.
        discrete: whether samples are tokens.
    """

    shape: tuple[int, ...]
    schedule: GaussianSchedule | LogLinear
    t_min: float
    discrete: bool

    @abc.abstractmethod
    def check(self, name: str, x: Tensor) -> None:
        """Raise ValueError, naming the modality, unless x (B, *shape) is valid clean data."""

    @abc.abstractmethod
    def prior(self, n: int, keys: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """(n, *shape) samples of pure noise, at time 1.

        uniforms: (n, *shape) float64 in (0, 1) to be turned into noise, instead of independent random numbers.
        """

    @abc.abstractmethod
    def transition(self, x: Tensor, s: Tensor, t: Tensor, keys: Tensor) -> Tensor:
        """Draw x_t given x_s, for times s ≤ t (B,); time 0 is clean data."""

    @abc.abstractmethod
    def loss(self, out, x0: Tensor, xt: Tensor, keys: Tensor, observed: Tensor | None = None) -> Tensor:
        """(B,) float32 unweighted loss of a prediction at x_t; `keys` are those that noised x₀.

        observed: bool of x₀'s shape, elements that are a condition and add nothing; the mean is over all elements.
        """

    def loss_sum(
        self, weigh: Callable[[Tensor], Tensor], proportional: bool, out, x0: Tensor, xt: Tensor, keys: Tensor, observed
    ) -> tuple[Tensor, Tensor]:
        """(Σ weigh(loss), detached loss (B,)) of `loss`.

        weigh: weighted losses (B,) from losses (B,); proportional: they are in proportion, so that the weights are
        known before the losses, and gradients may be computed together with them.
        """
        loss = self.loss(out, x0, xt, keys, observed)
        return weigh(loss).sum(), loss.detach()

    @abc.abstractmethod
    def elbo_weight(self, t: Tensor) -> Tensor:
        """(B,) weight that turns `loss` into the integrand of the negative ELBO."""

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """(B,) min(SNR, γ)/SNR; ValueError unless the process is Gaussian."""
        raise ValueError("weighting min_snr is for Gaussian modalities")

    def perturb(self, x0: Tensor, t: Tensor, keys: Tensor) -> Tensor:
        """Draw x_t given x₀; t (B,)."""
        return self.transition(x0, torch.zeros_like(t), t, keys)

    def time_conditioning(self, t: Tensor) -> Tensor:
        """(B,) float32: the network's input for time t."""
        return t.float()

    def to_prediction(self, out, x: Tensor, t: Tensor):
        """Convert the network's output at (x, t) to an ε-prediction (Gaussian) or to logits of x₀ (discrete)."""
        return out

    def key_mask(self, x: Tensor) -> Tensor | None:
        """(B, L) bool, True for positions that attention may attend to; None if it may attend to all."""
        return None

    def check_shape(self, name: str, x: Tensor) -> None:
        """Raise ValueError, naming the modality, unless x is (B, *shape)."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{name}: expected samples of shape {self.shape}, got {tuple(x.shape[1:])}")


class Gaussian(Process):
    """Variance-preserving Gaussian diffusion. Outside the network, predictions are always of ε.

    Args:
        shape: (C, H, W) or (features,).
        time_conditioning: what conditions the network: "sigma" (official text+image), "time", or "log_snr"
            (times 1/8, to about [−1, 1]).
        prediction_type: what the network predicts: "epsilon" (official), or "v_prediction", v = α ε − σ x₀
            (arXiv 2202.00512), converted by ε̂ = σ x + α v̂, so that near pure noise the network's error in ε̂ is
            scaled down by α.
    """

    schedule: GaussianSchedule
    discrete = False

    def __init__(
        self,
        shape: Sequence[int],
        schedule: GaussianSchedule,
        t_min: float = 1e-5,
        time_conditioning: str = "sigma",
        prediction_type: str = "epsilon",
    ):
        self.shape, self.schedule, self.t_min, self.prediction_type = tuple(shape), schedule, t_min, prediction_type
        if time_conditioning not in ("sigma", "time", "log_snr"):
            raise ValueError(f"time_conditioning must be sigma, time or log_snr, got {time_conditioning!r}")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be epsilon or v_prediction, got {prediction_type!r}")
        self._time_conditioning = time_conditioning

    def to_prediction(self, out, x, t):
        if self.prediction_type == "epsilon":
            return out
        alpha, sigma = (value.float().view(-1, *[1] * (x.ndim - 1)) for value in self.schedule.alpha_sigma(t))
        return sigma * x + alpha * out.float()

    def check(self, name, x):
        self.check_shape(name, x)
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating tensor, got {x.dtype}")

    def prior(self, n, keys, uniforms=None):
        if uniforms is not None:
            return torch.special.ndtri(uniforms).float()
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

    def loss(self, out, x0, xt, keys, observed=None):
        if observed is not None:
            noise = kernels.normal(keys, math.prod(self.shape)).view(x0.shape)
            out = torch.where(observed, noise.to(out.dtype), out)
        return kernels.eps_mse(out, keys)

    def elbo_weight(self, t):
        """½ |dλ/dt| per element, with λ the log-SNR: β/σ² (arXiv 2107.00630)."""
        return self.schedule.beta(t) / self.schedule.sigma(t) ** 2

    def min_snr_weight(self, t, gamma):
        """min(SNR, γ)/SNR for ε-prediction (arXiv 2303.09556)."""
        return torch.clamp(gamma * torch.exp(-self.schedule.log_snr(t)), max=1.0)


class Discrete(Process):
    """Base of masked and uniform diffusion: (B, L) int64 tokens with `states` real states."""

    schedule: LogLinear
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
        """Probability that a position that is clean at time s is noised by time t."""
        return -torch.expm1(self.schedule.total(s) - self.schedule.total(t))

    @property
    def columns(self) -> int:
        """The number of outputs over which p is normalized."""
        return self.states

    def target(self, x0: Tensor, xt: Tensor, observed: Tensor | None) -> Tensor:
        """(B, L): the tokens to predict, −1 where none is."""
        return x0 if observed is None else torch.where(observed, -1, x0)

    def mean(self, losses: Tensor, target: Tensor, observed: Tensor | None) -> Tensor:
        """(B,) from the losses of positions (B, L), in which it is linear."""
        return losses.mean(1)

    def mask_logit_loss(self, out: LazyLogits, target: Tensor) -> Tensor | None:
        """(B, L): what a logit of the mask adds to the losses; None for nothing."""
        return None

    def loss(self, out, x0, xt, keys, observed=None):
        target, out = self.target(x0, xt, observed), LazyLogits.wrap(out)
        losses, added = out.cross_entropy(target, self.columns), self.mask_logit_loss(out, target)
        return self.mean(losses if added is None else losses + added, target, observed)

    def loss_sum(self, weigh, proportional, out, x0, xt, keys, observed):
        if not (proportional and LazyLogits.wrap(out).sums_at_once()):
            return super().loss_sum(weigh, proportional, out, x0, xt, keys, observed)
        target = self.target(x0, xt, observed)
        ones = torch.ones(target.shape, device=target.device)
        row_weight = (weigh(self.mean(ones, target, observed)) / target.shape[1])[:, None] * ones
        total, losses = out.cross_entropy_sum(target, self.columns, row_weight)
        if (added := self.mask_logit_loss(out, target)) is not None:
            total, losses = total + (row_weight * added).sum(), losses + added.detach()
        return total, self.mean(losses, target, observed)


class Masked(Discrete):
    """Absorbing diffusion: states 0 … K−1 and the mask, index K. Networks predict log p(x₀) over the K real states.

    Args:
        loss_on: positions in the loss: "all" (official) or "masked".
        balanced: weights the masked positions by (n + 1)/k, for k masked of the n that are not observed: the mean of
            the ELBO's weight over the times at which k are masked. Has the expectation of the ELBO's weight 1/t with
            less variance; takes loss_on="masked" and no further weight.
        mask_logit: how a head with K + 1 outputs is read. None: the head has K outputs.
            "ignored" (official text+image): p is normalized over the K real states, and the mask logit m only adds
            log(1 + eᵐ) to the loss. "kept" (official tables): p is normalized over K + 1 outputs, and the probability
            of the mask lowers the reverse rate.
        pad_id, attend_pads: with attend_pads=False, attention skips keys whose current token is pad_id.
    """

    def __init__(
        self,
        length: int,
        states: int,
        schedule: LogLinear,
        t_min: float = 1e-5,
        loss_on: str = "all",
        mask_logit: str | None = None,
        pad_id: int | None = None,
        attend_pads: bool = True,
        balanced: bool = False,
    ):
        super().__init__(length, states, schedule, t_min)
        if loss_on not in ("all", "masked"):
            raise ValueError(f"loss_on must be all or masked, got {loss_on!r}")
        if balanced and loss_on != "masked":
            raise ValueError("weighting balanced is for loss_on: masked")
        if mask_logit not in (None, "ignored", "kept"):
            raise ValueError(f"mask_logit must be null, ignored or kept, got {mask_logit!r}")
        if not attend_pads and pad_id is None:
            raise ValueError("attend_pads: false needs a pad_id")
        self.loss_on, self.mask_logit, self.balanced = loss_on, mask_logit, balanced
        self.pad_id, self.attend_pads = pad_id, attend_pads

    @property
    def mask_id(self) -> int:
        return self.states

    def prior(self, n, keys, uniforms=None):
        return torch.full((n, *self.shape), self.mask_id, dtype=torch.int64, device=keys.device)

    def transition(self, x, s, t, keys):
        return kernels.mask_perturb(x, self._transition_prob(s, t), keys, self.mask_id)

    def key_mask(self, x):
        return None if self.attend_pads else x != self.pad_id

    @property
    def columns(self):
        return self.states + (self.mask_logit == "kept")

    def target(self, x0, xt, observed):
        target = x0 if self.loss_on == "all" else torch.where(xt == self.mask_id, x0, -1)
        return super().target(target, xt, observed)

    def mean(self, losses, target, observed):
        if not self.balanced:
            return losses.mean(1)
        free = losses.shape[1] if observed is None else (~observed).sum(1)
        return losses.mean(1) * (free + 1) / (target >= 0).sum(1).clamp(min=1)

    def mask_logit_loss(self, out, target):
        if self.mask_logit != "ignored":
            return None
        return torch.where(target < 0, 0.0, torch.nn.functional.softplus(out.column(self.states)))

    def elbo_weight(self, t):
        return self.schedule.reverse_rate(t)


class Uniform(Discrete):
    """Uniform diffusion: a noised position holds any of the K states. Networks predict x₀."""

    def __init__(self, length: int, states: int, schedule: LogLinear, t_min: float = 1e-3):
        super().__init__(length, states, schedule, t_min)

    def prior(self, n, keys, uniforms=None):
        if uniforms is not None:
            return (uniforms * self.states).long()
        tokens = torch.zeros(n, *self.shape, dtype=torch.int64, device=keys.device)
        return kernels.uniform_perturb(tokens, torch.ones(n, device=keys.device), keys, self.states)

    def transition(self, x, s, t, keys):
        return kernels.uniform_perturb(x, self._transition_prob(s, t), keys, self.states)

    def odds(self, t: Tensor) -> Tensor:
        """a K/(1 − a) with a = e^{−s}: the odds of the clean state against any other state, minus 1."""
        return self.states / torch.expm1(self.schedule.total(t))

    def elbo_weight(self, t):
        raise ValueError("weighting elbo is not defined for the uniform process: choose none or learned")
