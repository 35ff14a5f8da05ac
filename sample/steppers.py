"""The reverse step of one modality, for every sampler.

A stepper has a grid of times t₀ > t₁ > … > t_N = 0. `step` makes update k from the prediction at t_k; a stepper with
`has_corrector` gets a second prediction, at its own predicted point, for `correct`. With guidance both take the two
predictions, which the kernels combine.

`step` and `correct` may be captured as a CUDA graph that is replayed for other updates: k and its times are tensors on
the device, what they keep for the next update is written in place, and what the host decides is in `Stage` alone.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..diffusion.processes import Gaussian, Masked, Process, Uniform
from ..diffusion.time_grid import time_grid
from ..kernels import Draw, LazyLogits, Rng


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The sampler of one modality.

    Args:
        method: heun, euler, euler_sde or dpmpp_2m for Gaussian modalities; tau_leap, euler, ancestral or first_hitting
            for masked ones; tau_leap or euler for uniform ones. None is the process's default, the first of each.
        time_grid: linear, rho or logsnr (see `diffusion.time_grid`), or the times themselves, (N + 1,) from 1 down to
        0.
    """

    method: str | None = None
    time_grid: str | Tensor = "linear"

    def method_of(self, process: Process) -> str:
        """The method for a process: the one set, else the first that there is."""
        return self.method or next(iter(SAMPLERS[type(process)]))

    def stepper(self, name: str, process: Process, x: Tensor, steps: int, rng: Rng) -> Stepper:
        """The stepper of modality `name`, whose initial state at time 1 is x.

        Raises:
            ValueError: a method or a grid that the process does not have.
        """
        methods, method = SAMPLERS[type(process)], self.method_of(process)
        if method not in methods:
            raise ValueError(f"{name}: sampler must be one of {', '.join(methods)}, got {method!r}")
        if name in rng.uniforms and isinstance(process, Masked) and method != "first_hitting":
            raise ValueError(f"{name}: uniforms are for first_hitting, not for {method}")
        if isinstance(self.time_grid, str):
            times = time_grid(process, steps, self.time_grid)
        else:
            times = torch.as_tensor(self.time_grid, dtype=torch.float64)
            falling = times.shape == (steps + 1,) and bool((times.diff() <= 0).all())
            if not falling or times[-1] != 0 or abs(float(times[0]) - 1.0) > 1e-6:
                raise ValueError(f"{name}: a time grid of {steps} steps needs {steps + 1} times falling from 1 to 0")
        return methods[method](name, process, times, x, rng, method)


class Stage(NamedTuple):
    """What an update does that others of its modality do not: `last` ends at time 0, `first` has no predecessor."""

    last: bool = False
    first: bool = False


class Update(NamedTuple):
    """Update k of one modality.

    Args:
        k: 0-d int64 on the device.
        t: (B,) float64, its times before the update.
        coefficients: (B,) float64 each, see `Stepper.coefficients`.
        rng: the generator at step k.
    """

    k: Tensor
    t: Tensor
    coefficients: tuple[Tensor, ...]
    rng: Rng
    stage: Stage


class Stepper:
    """Base of all steppers.

    Attributes:
        times: the grid as floats, so that control flow never waits for the device.
        has_corrector: whether `correct` follows `step`.
    """

    has_corrector = False

    def __init__(self, name: str, process: Process, times: Tensor, x: Tensor, rng: Rng, method: str):
        self.name, self.process, self.method = name, process, method
        self.times: list[float] = times.tolist()
        t, after = times[:-1], times[1:]
        self.table = torch.stack([t, after, *self.coefficients(t, after)]).to(x.device)
        self.n = len(x)

    def coefficients(self, t: Tensor, after: Tensor) -> tuple[Tensor, ...]:
        """(N,) float64 each, from the times before and after all N updates: what `step` and `correct` need of them.

        Computed once a batch, so that an update reads all that depends on its times with one launch.
        """
        return ()

    def at(self, k: Tensor) -> tuple[Tensor, ...]:
        """(B,) float64 each: the times before and after update k, 0-d int64, and its coefficients."""
        return self.table.index_select(1, k.expand(self.n)).unbind()

    def step(self, update: Update, x: Tensor, out, uncond, guidance: float) -> Tensor:
        """x after an update, from a prediction and, with guidance, the one under the noisier condition (else None)."""
        raise NotImplementedError

    def correct(self, update: Update, x: Tensor, x_hat: Tensor, out, uncond, guidance: float) -> Tensor:
        """x after an update, from its predicted point x_hat and the prediction there."""
        raise NotImplementedError

    def changed_positions(self, k: Tensor) -> Tensor | None:
        """(B, L) bool: the positions that update k can change; None if it can change all."""
        return None

    def stage(self, k: int) -> Stage | None:
        """What update k does that others do not; None if it changes nothing."""
        return Stage(last=self.times[k + 1] == 0.0) if self.is_active(k) else None

    def is_active(self, k: int) -> bool:
        """Whether update k changes anything: a grid may repeat a time."""
        return self.times[k] > self.times[k + 1]

    def tensors(self) -> list[Tensor]:
        """All that differs between batches of the same shape."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


class OdeStepper(Stepper):
    """Probability-flow ODE: `euler`, or `heun` with its corrector, except into t = 0, where the drift is singular."""

    process: Gaussian

    def __init__(self, *args):
        super().__init__(*args)
        self.has_corrector = self.method == "heun"

    def coefficients(self, t, after):
        schedule = self.process.schedule
        return after - t, schedule.beta(t), schedule.sigma(t), schedule.beta(after), schedule.sigma(after)

    def step(self, update, x, out, uncond, guidance):
        dt, beta, sigma, _, _ = update.coefficients
        return kernels.heun_predict(x, out, beta, sigma, dt, uncond, guidance)

    def correct(self, update, x, x_hat, out, uncond, guidance):
        dt, _, _, beta, sigma = update.coefficients
        return kernels.heun_correct(x, x_hat, out, beta, sigma, dt, uncond, guidance)


class SdeStepper(OdeStepper):
    """Euler–Maruyama on the reverse SDE; the last step adds no noise, so samples are clean."""

    def step(self, update, x, out, uncond, guidance):
        dt, beta, sigma, _, _ = update.coefficients
        keys, noise = update.rng.keys(self.name, Draw.STEP), 0.0 if update.stage.last else 1.0
        return kernels.sde_step(x, out, beta, sigma, dt, keys, uncond, guidance, noise)


class DpmStepper(Stepper):
    """DPM-Solver++(2M), arXiv 2211.01095: second order in log-SNR with one evaluation a step.

    The x₀-prediction of an update is kept in place for the next.
    """

    process: Gaussian

    def __init__(self, name, process, times, x, rng, method):
        super().__init__(name, process, times, x, rng, method)
        self.previous = torch.zeros_like(x)

    def coefficients(self, t, after):
        schedule, last = self.process.schedule, after == 0.0
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        width = 0.5 * (schedule.log_snr(after) - schedule.log_snr(t))
        decay = torch.where(last, 0.0, schedule.sigma(after) / sigma)
        gain = torch.where(last, 1.0, -schedule.alpha(after) * torch.expm1(-width))
        moving, mix = (t > after).nonzero()[:, 0], torch.zeros_like(t)
        mix[moving[1:]] = 0.5 * width[moving[1:]] / width[moving[:-1]]  # to that of the step before
        return alpha, sigma, decay, gain, torch.where(last, 0.0, mix)

    def stage(self, k):
        stage = super().stage(k)
        return stage and stage._replace(first=not any(self.is_active(i) for i in range(k)))

    def step(self, update, x, out, uncond, guidance):
        previous = None if update.stage.first else self.previous
        x, x0 = kernels.dpmpp_2m(x, out, previous, *update.coefficients, uncond, guidance)
        self.previous.copy_(x0)
        return x


class MaskedStepper(Stepper):
    """`tau_leap`, `euler` and `ancestral` on the absorbing process; the last step reveals all that is left."""

    process: Masked
    RULES: ClassVar = {"tau_leap": "tau", "euler": "euler", "ancestral": "ancestral"}

    def coefficients(self, t, after):
        return ((t - after) * self.process.schedule.reverse_rate(t),)

    def step(self, update, x, out, uncond, guidance):
        (rate,), rule = update.coefficients, "last" if update.stage.last else self.RULES[self.method]
        return self.leap(update, x, out, uncond, guidance, rate, rule)

    def leap(self, update: Update, x: Tensor, out, uncond, guidance: float, rate: Tensor, rule: str) -> Tensor:
        process, keys = self.process, update.rng.keys(self.name, Draw.STEP)
        other = None if uncond is None else LazyLogits.wrap(uncond)
        return LazyLogits.wrap(out).tau_leap(
            x, rate, keys, process.states, rule, process.mask_logit == "kept", other, guidance
        )


class FirstHittingStepper(MaskedStepper):
    """First-hitting sampling (arXiv 2409.02908): the times at which positions are unmasked are drawn beforehand.

    Position i is unmasked at T_i = U_i, the r-th of M masked ones in update ⌊r N / M⌋. With at least as many steps as
    masked positions no update unmasks two, each is unmasked at exactly its own time, and the sampler has no time
    discretization error; with fewer, an update unmasks a group at the time of its first member. Times therefore differ
    between samples. Updates that unmask nothing in any sample of the batch need no evaluation of the network.

    With `rng.uniforms` for the modality, a position that is unmasked gets the state at that point of the cumulative
    distribution instead of an independent draw.
    """

    def __init__(self, name, process, times, x, rng, method):
        super().__init__(name, process, times, x, rng, method)
        steps, length = len(times) - 1, x.shape[1]
        masked = x == process.mask_id
        count = masked.sum(1, keepdim=True).clamp(min=1)
        u = kernels.uniform(rng.keys(name, Draw.TIME), length).double()
        hits, order = torch.where(masked, self.times[0] * u, 0.0).sort(dim=1, descending=True, stable=True)
        self.group = torch.where(masked, order.argsort(1) * steps // count, steps)
        first = -(-torch.arange(steps + 1, device=x.device) * count // steps)  # rank of the first position of update k
        hits = torch.nn.functional.pad(hits, (0, 1)).gather(1, first)
        self.table = torch.stack([hits[:, :-1], hits[:, 1:]])
        self.active = set(self.group[masked].tolist())
        self.uniforms = rng.uniforms.get(name)

    def at(self, k):
        return self.table.index_select(2, k.view(1)).squeeze(2).unbind()

    def stage(self, k):
        return Stage() if k in self.active else None

    def changed_positions(self, k):
        return self.group == k

    def step(self, update, x, out, uncond, guidance):
        masked, now = x == self.process.mask_id, self.changed_positions(update.k)
        if self.uniforms is not None:
            if uncond is not None:
                out = guided_log_probs(out, uncond, guidance, self.process.states)
            return torch.where(now, LazyLogits.wrap(out).at_uniforms(self.uniforms, self.process.states, now), x)
        drawn = self.leap(update, torch.where(masked & ~now, 0, x), out, uncond, guidance, update.t, "last")
        return torch.where(now, drawn, x)


class UniformStepper(Stepper):
    """`tau_leap` and `euler` on the uniform process; the last step draws x₀ from the network."""

    process: Uniform

    def coefficients(self, t, after):
        return (t - after) * self.process.schedule.rate(t) / self.process.states, self.process.odds(t)

    def step(self, update, x, out, uncond, guidance):
        logits = guided_log_probs(out, uncond, guidance, self.process.states)
        rule = "last" if update.stage.last else {"tau_leap": "tau", "euler": "euler"}[self.method]
        keys = update.rng.keys(self.name, Draw.STEP)
        return kernels.tau_leap_uniform(logits, x, *update.coefficients, keys, rule)


def guided_log_probs(out, uncond, guidance: float, states: int) -> Tensor:
    """(B, L, K) log-probabilities, combined with those of the second branch of guidance if there is one.

    A state with probability 0 in the conditional branch keeps it: −∞ in both branches would combine to NaN.
    """
    log_p = LazyLogits.wrap(out).log_probs(states)
    if uncond is None:
        return log_p
    mixed = guidance * log_p + (1.0 - guidance) * LazyLogits.wrap(uncond).log_probs(states)
    return torch.where(log_p == -torch.inf, log_p, mixed)


SAMPLERS: dict[type[Process], dict[str, type[Stepper]]] = {
    Gaussian: {"heun": OdeStepper, "euler": OdeStepper, "euler_sde": SdeStepper, "dpmpp_2m": DpmStepper},
    Masked: {
        "tau_leap": MaskedStepper,
        "euler": MaskedStepper,
        "ancestral": MaskedStepper,
        "first_hitting": FirstHittingStepper,
    },
    Uniform: {"tau_leap": UniformStepper, "euler": UniformStepper},
}
