"""Noise schedules: how much of the data is left at time t, 0 = clean and 1 = noise.

Gaussian schedules are variance preserving: x_t = α x₀ + σ ε, α = e^{−B(t)}, σ² = 1 − e^{−2B(t)}, B = ∫₀ᵗ β.
Discrete schedules give the total noise s(t) = ∫₀ᵗ s′, so a position is untouched with probability e^{−s}.

Times are tensors of any shape; float64 is advised, and everything is written so that it keeps its digits at
both ends (expm1 and log1p forms, polynomials without cancellation).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class GaussianSchedule(abc.ABC):
    """A variance-preserving schedule; subclasses give β, B and the inverse of B."""

    @abc.abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Drift coefficient β(t) = B′(t)."""

    @abc.abstractmethod
    def integral(self, t: Tensor) -> Tensor:
        """B(t) = ∫₀ᵗ β."""

    @abc.abstractmethod
    def inverse(self, b: Tensor) -> Tensor:
        """The time at which the integral is b."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-2.0 * self.integral(t)))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one integral."""
        b = self.integral(t)
        return torch.exp(-b), torch.sqrt(-torch.expm1(-2.0 * b))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(α²/σ²) = −log(e^{2B} − 1)."""
        return -torch.log(torch.expm1(2.0 * self.integral(t)))

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`: B = ½ log(1 + e^{−λ})."""
        return self.inverse(0.5 * torch.logaddexp(torch.zeros_like(log_snr), -log_snr))


class Linear(GaussianSchedule):
    """β(t) = scale · (β₀ + t (β₁ − β₀)); scale ½ is `linear_half` of the official table code."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, scale: float = 1.0):
        if not 0.0 < beta_min <= beta_max:
            raise ValueError(f"linear schedule needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.b0, self.slope = scale * beta_min, scale * (beta_max - beta_min)

    def beta(self, t):
        return self.b0 + self.slope * t

    def integral(self, t):
        return t * (self.b0 + 0.5 * self.slope * t)

    def inverse(self, b):
        return 2.0 * b / (self.b0 + torch.sqrt(self.b0**2 + 2.0 * self.slope * b))


class ScaledLinear(GaussianSchedule):
    """β(t) = c (√b₀ (1−t) + √b₁ t)²: latent diffusion's schedule over `1000` steps, c = 500."""

    def __init__(self, b0: float = 0.00085, b1: float = 0.012, scale: float = 500.0):
        if not 0.0 < b0 <= b1:
            raise ValueError(f"scaled_linear schedule needs 0 < b0 <= b1, got {b0} and {b1}")
        self.scale, self.root, self.delta = scale, math.sqrt(b0), math.sqrt(b1) - math.sqrt(b0)

    def beta(self, t):
        return self.scale * (self.root + self.delta * t) ** 2

    def integral(self, t):
        r, d = self.root, self.delta
        return self.scale * t * (r * r + t * (r * d + t * (d * d / 3.0)))

    def inverse(self, b):
        if self.delta == 0.0:
            return b / (self.scale * self.root**2)
        excess = 3.0 * self.delta * b / self.scale  # (r + d t)³ − r³
        grown = torch.pow(self.root**3 + excess, 1.0 / 3.0)
        return excess / (self.delta * (grown**2 + grown * self.root + self.root**2))


class Cosine(GaussianSchedule):
    """α(t) = cos(κ π t / 2), with κ < 1 so that α(1) stays positive (arXiv 2102.09672)."""

    def __init__(self, end: float = 0.995):
        if not 0.0 < end < 1.0:
            raise ValueError(f"cosine schedule needs 0 < end < 1, got {end}")
        self.rate = end * math.pi / 2.0

    def beta(self, t):
        return self.rate * torch.tan(self.rate * t)

    def integral(self, t):
        sin2 = torch.sin(self.rate * t) ** 2
        return torch.where(sin2 < 0.5, -0.5 * torch.log1p(-sin2), -torch.log(torch.cos(self.rate * t)))

    def inverse(self, b):
        return torch.asin(torch.sqrt(-torch.expm1(-2.0 * b))) / self.rate


class LogSNR(GaussianSchedule):
    """Any decreasing log-SNR curve λ(t) given as a function on (0, 1], tabulated in float64.

    log B, with B = ½ log(1 + e^{−λ}), is interpolated by a monotone cubic (PCHIP) in log t: a power law, which B is
    near t = 0, is then exact, β is continuous, and the inverse is found by Newton's method on the same curve. Below
    the first time of the table, 1e-6, the power law goes on; B(0) = 0 whatever λ(0) is.
    """

    FIRST = 1e-6

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], points: int = 4097):
        from scipy.interpolate import PchipInterpolator

        half = np.geomspace(self.FIRST, 0.5, points // 2)  # as dense towards 1 as towards 0
        t = np.concatenate([half, 1.0 - half[-2::-1], [1.0]])
        log_snr = np.asarray(function(t), dtype=np.float64)
        if not (np.all(np.isfinite(log_snr)) and np.all(np.diff(log_snr) < 0.0)):
            raise ValueError("log-SNR schedule must be finite and strictly decreasing on (0, 1]")
        log_t, log_b = np.log(t), np.log(0.5 * np.logaddexp(0.0, -log_snr))
        curve = PchipInterpolator(log_t, log_b)
        self._curve, self._slope = PiecewisePolynomial(curve), PiecewisePolynomial(curve.derivative())
        self._guess = PiecewisePolynomial(PchipInterpolator(log_b, log_t))
        self._first = float(log_t[0]), float(log_b[0]), float(curve.derivative()(log_t[0]))
        self._last = float(log_b[-1])

    @staticmethod
    def _apply(function, values: Tensor) -> Tensor:
        """A function of log values, exp'd; 0 goes to 0."""
        v = values.double()
        return (torch.exp(function(torch.log(v.clamp(min=1e-300)))) * (v > 0.0)).to(values)

    def _log_integral(self, log_t: Tensor) -> Tensor:
        start, _, slope = self._first
        return self._curve(log_t.clamp(min=start)) + slope * (log_t - start).clamp(max=0.0)

    def _log_inverse(self, log_b: Tensor) -> Tensor:
        start, value, slope = self._first
        log_t = self._guess(log_b.clamp(value, self._last))
        for _ in range(4):  # the two cubics differ between their nodes
            excess = self._curve(log_t) - log_b.clamp(min=value)
            log_t = (log_t - excess / self._slope(log_t)).clamp(start, 0.0)
        return log_t + (log_b - value).clamp(max=0.0) / slope

    def beta(self, t):
        def log_beta(log_t):
            return self._log_integral(log_t) + torch.log(self._slope(log_t.clamp(min=self._first[0]))) - log_t

        return self._apply(log_beta, t)

    def integral(self, t):
        return self._apply(self._log_integral, t)

    def inverse(self, b):
        return self._apply(self._log_inverse, b)


class PiecewisePolynomial:
    """scipy's, evaluated in float64 on the device of its argument, without waiting for it."""

    def __init__(self, polynomial):
        self.tables = {torch.device("cpu"): torch.from_numpy(np.stack([polynomial.x[:-1], *polynomial.c]))}

    def __call__(self, x: Tensor) -> Tensor:
        if x.device not in self.tables:
            self.tables[x.device] = next(iter(self.tables.values())).to(x.device)
        starts, *coefficients = self.tables[x.device].unbind()
        piece = (torch.searchsorted(starts, x.contiguous(), right=True) - 1).clamp(min=0)
        distance, value = x - starts[piece], torch.zeros_like(x)
        for coefficient in coefficients:
            value = value * distance + coefficient[piece]
        return value


class LogLinear:
    """s(t) = −log(1 − (1−δ) t), so a position is noised with probability (1−δ) t (official discrete schedule)."""

    def __init__(self, delta: float = 1e-5):
        if not 0.0 < delta < 1.0:
            raise ValueError(f"delta must lie in (0, 1), got {delta}")
        self.delta = delta

    def total(self, t: Tensor) -> Tensor:
        """s(t)."""
        return torch.where(t < 0.5, -torch.log1p(-(1.0 - self.delta) * t), -torch.log(self._untouched(t)))

    def rate(self, t: Tensor) -> Tensor:
        """s′(t)."""
        return (1.0 - self.delta) / self._untouched(t)

    def _untouched(self, t: Tensor) -> Tensor:
        """e^{−s} = 1 − (1−δ) t, written so that t = 1 keeps δ's digits."""
        return (1.0 - t) + self.delta * t

    def prob(self, t: Tensor) -> Tensor:
        """1 − e^{−s}: the probability that a position has been noised."""
        return (1.0 - self.delta) * t

    def reverse_rate(self, t: Tensor) -> Tensor:
        """s′/(eˢ − 1) = 1/t, the rate at which a masked position is revealed."""
        return 1.0 / t

    def inverse_prob(self, p: Tensor) -> Tensor:
        """The time at which a position has been noised with probability p."""
        return p / (1.0 - self.delta)


GAUSSIAN_SCHEDULES: dict[str, Callable[..., GaussianSchedule]] = {
    "scaled_linear": ScaledLinear,
    "linear": Linear,
    "linear_half": lambda **kwargs: Linear(scale=0.5, **kwargs),
    "cosine": Cosine,
}
