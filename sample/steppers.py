"""One reverse step of one modality, for every sampler.

A stepper walks its own grid of times t₀ > t₁ > … > t_N = 0. `step` makes update k from the network's answer at
t_k; a stepper that sets `second` gets one more answer, at its own predicted point, for `correct`. Both branches
of guidance arrive together and are mixed inside the kernels.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..diffusion.processes import Gaussian, Masked, Process, Uniform
from ..diffusion.training_times import grid
from ..kernels import Draw, LazyLogits, Rng


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How one modality is sampled: the rule of its steps and the grid of its times.

    kind: heun, euler, euler_sde, dpmpp_2m for Gaussian; tau_leap, euler, ancestral, first_hitting for masked;
    tau_leap, euler for uniform modalities. None is the process's default (the first of each).
    grid: linear, rho or logsnr (see `diffusion.grid`), or the times themselves, (N + 1,) falling to 0 from where the
    modality starts, 1 or its given level.
    shares: first_hitting only, (B, L) float64 in [0, 1): a position that is revealed gets the state at this share of
    the cumulative distribution, instead of an independent draw.
    """

    kind: str | None = None
    grid: str | Tensor = "linear"
    shares: Tensor | None = None

    def stepper(self, name: str, process: Process, x: Tensor, steps: int, start: float, rng: Rng) -> Stepper:
        """The stepper of modality `name`, which begins as x at time `start`."""
        kinds = KINDS[type(process)]
        kind = self.kind or next(iter(kinds))
        if kind not in kinds:
            raise ValueError(f"{name}: sampler must be one of {', '.join(kinds)}, got {kind!r}")
        if isinstance(self.grid, str):
            times = grid(process, steps, self.grid, start)
        else:
            times = torch.as_tensor(self.grid, dtype=torch.float64)
            whole = times.shape == (steps + 1,) and times[-1] == 0 and bool((times.diff() <= 0).all())
            if not whole or abs(float(times[0]) - start) > 1e-6:
                raise ValueError(f"{name}: a grid of {steps} steps needs {steps + 1} times falling from {start:g} to 0")
        made = kinds[kind](name, process, times, x, rng, kind)
        if self.shares is not None:
            if kind != "first_hitting" or self.shares.shape != x.shape:
                raise ValueError(
                    f"{name}: shares are for first_hitting and of the shape of its tokens, {tuple(x.shape)}"
                )
            made.shares = self.shares.to(x.device)
        return made


class Stepper:
    """What all steppers share: the grid, the name under which random numbers are drawn, and the clock.

    times: (N + 1,) float64 on the CPU, so that control flow never waits for the device.
    """

    second = False

    def __init__(self, name: str, process: Process, times: Tensor, x: Tensor, rng: Rng, kind: str):
        self.name, self.process, self.kind, self.rng = name, process, kind, rng
        self.nominal = times.tolist()
        self.times = times.to(x.device)
        self.n = len(x)

    def time(self, k: int) -> Tensor:
        """(B,) float64: the time at which update k asks the network."""
        return self.times[k].expand(self.n)

    def keys(self, k: int) -> Tensor:
        return self.rng.at(k).keys(self.name, Draw.STEP)

    def step(self, k: int, x: Tensor, out, uncond, guidance: float) -> Tensor:
        raise NotImplementedError

    def places(self, k: int) -> Tensor | None:
        """(B, L) bool, all that update k can change; None where that may be anything."""
        return None

    def is_last(self, k: int) -> bool:
        return self.nominal[k + 1] == 0.0

    def moves(self, k: int) -> bool:
        """Whether update k changes anything (a grid may stand still)."""
        return self.nominal[k] > self.nominal[k + 1]


class OdeStepper(Stepper):
    """Probability-flow ODE: `euler`, or `heun` with its corrector (but not into t = 0, where the drift is singular)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.second = self.kind == "heun"

    def coefficients(self, at: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) β and σ at grid point `at`, and dt of update k."""
        t, schedule = self.time(at), self.process.schedule
        return schedule.beta(t), schedule.sigma(t), self.time(k + 1) - self.time(k)

    def step(self, k, x, out, uncond, guidance):
        beta, sigma, dt = self.coefficients(k, k)
        return kernels.heun_predict(x, out, beta, sigma, dt, uncond, guidance)

    def correct(self, k: int, x: Tensor, x_hat: Tensor, out, uncond, guidance: float) -> Tensor:
        beta, sigma, dt = self.coefficients(k + 1, k)
        return kernels.heun_correct(x, x_hat, out, beta, sigma, dt, uncond, guidance)


class SdeStepper(OdeStepper):
    """Euler–Maruyama on the reverse SDE; the last step adds no noise, so samples are clean."""

    def step(self, k, x, out, uncond, guidance):
        beta, sigma, dt = self.coefficients(k, k)
        noise = 0.0 if self.is_last(k) else 1.0
        return kernels.sde_step(x, out, beta, sigma, dt, self.keys(k), uncond, guidance, noise)


class DpmStepper(Stepper):
    """DPM-Solver++(2M), arXiv 2211.01095: second order in log-SNR with one evaluation a step."""

    previous: Tensor | None = None
    previous_width: Tensor | None = None

    def step(self, k, x, out, uncond, guidance):
        schedule, t, after = self.process.schedule, self.time(k), self.time(k + 1)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if self.is_last(k):
            decay, gain, mix, width = torch.zeros_like(t), torch.ones_like(t), torch.zeros_like(t), None
        else:
            width = 0.5 * (schedule.log_snr(after) - schedule.log_snr(t))
            decay, gain = schedule.sigma(after) / sigma, -schedule.alpha(after) * torch.expm1(-width)
            mix = torch.zeros_like(t) if self.previous_width is None else 0.5 * width / self.previous_width
        x, self.previous = kernels.dpmpp_2m(x, out, self.previous, alpha, sigma, decay, gain, mix, uncond, guidance)
        self.previous_width = width
        return x


class MaskedStepper(Stepper):
    """`tau_leap`, `euler` and `ancestral` on the absorbing process; the last step reveals all that is left."""

    RULES: ClassVar = {"tau_leap": "tau", "euler": "euler", "ancestral": "ancestral"}

    def step(self, k, x, out, uncond, guidance):
        t = self.time(k)
        rate = (t - self.time(k + 1)) * self.process.schedule.reverse_rate(t)
        return self.leap(k, x, out, uncond, guidance, rate, "last" if self.is_last(k) else self.RULES[self.kind])

    def leap(self, k, x, out, uncond, guidance, rate, rule) -> Tensor:
        process = self.process
        other = None if uncond is None else LazyLogits.wrap(uncond)
        return LazyLogits.wrap(out).tau_leap(
            x, rate, self.keys(k), process.states, rule, process.mask_logit == "kept", other, guidance
        )


class FirstHittingStepper(MaskedStepper):
    """First-hitting sampling (arXiv 2409.02908): the times at which positions are revealed are drawn beforehand.

    Position i is revealed at T_i = start · U_i, the r-th of M masked ones in update ⌊r N / M⌋. With at least as many
    steps as masked positions no update reveals two, each comes at exactly its own time, and the sampler has no time
    error; with fewer, an update reveals a group at the time of its first member. Times therefore differ between
    samples. Updates in which no sample of the batch reveals anything do not ask the network.
    """

    shares: Tensor | None = None

    def __init__(self, name, process, times, x, rng, kind):
        super().__init__(name, process, times, x, rng, kind)
        steps, length = len(times) - 1, x.shape[1]
        masked = x == process.mask_id
        count = masked.sum(1, keepdim=True).clamp(min=1)
        u = kernels.uniform(rng.keys(name, Draw.TIME), length).double()
        hits, order = torch.where(masked, self.nominal[0] * u, 0.0).sort(dim=1, descending=True, stable=True)
        self.group = torch.where(masked, order.argsort(1) * steps // count, steps)
        first = -(-torch.arange(steps + 1, device=x.device) * count // steps)  # rank of the first position of update k
        self.hits = torch.nn.functional.pad(hits, (0, 1)).gather(1, first)
        self.busy = set(self.group[masked].tolist())

    def time(self, k):
        return self.hits[:, k]

    def moves(self, k):
        return k in self.busy

    def places(self, k):
        return self.group == k

    def step(self, k, x, out, uncond, guidance):
        masked, now = x == self.process.mask_id, self.places(k)
        if self.shares is not None:
            return torch.where(now, self.at_shares(out, uncond, guidance), x)
        drawn = self.leap(k, torch.where(masked & ~now, 0, x), out, uncond, guidance, self.time(k), "last")
        return torch.where(now, drawn, x)

    def at_shares(self, out, uncond, guidance: float) -> Tensor:
        """(B, L): the states whose stretch of the cumulative distribution holds the shares."""
        total = torch.softmax(guided_log_probs(out, uncond, guidance, self.process.states), -1).double().cumsum(-1)
        return (total <= self.shares[..., None].double() * total[..., -1:]).sum(-1)


class UniformStepper(Stepper):
    """`tau_leap` and `euler` on the uniform process; the last step draws x₀ from the network."""

    def step(self, k, x, out, uncond, guidance):
        process, t = self.process, self.time(k)
        logits = guided_log_probs(out, uncond, guidance, process.states)
        rate = (t - self.time(k + 1)) * process.schedule.rate(t) / process.states
        rule = "last" if self.is_last(k) else {"tau_leap": "tau", "euler": "euler"}[self.kind]
        return kernels.tau_leap_uniform(logits, x, rate, process.odds(t), self.keys(k), rule)


def guided_log_probs(out, uncond, guidance: float, states: int) -> Tensor:
    """(B, L, K) log p of a network's answer, mixed with that of guidance's second branch if there is one."""
    log_p = LazyLogits.wrap(out).log_probs(states)
    return log_p if uncond is None else guidance * log_p + (1.0 - guidance) * LazyLogits.wrap(uncond).log_probs(states)


KINDS: dict[type[Process], dict[str, type[Stepper]]] = {
    Gaussian: {"heun": OdeStepper, "euler": OdeStepper, "euler_sde": SdeStepper, "dpmpp_2m": DpmStepper},
    Masked: {
        "tau_leap": MaskedStepper,
        "euler": MaskedStepper,
        "ancestral": MaskedStepper,
        "first_hitting": FirstHittingStepper,
    },
    Uniform: {"tau_leap": UniformStepper, "euler": UniformStepper},
}
