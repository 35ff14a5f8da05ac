"""Schedules against their defining equations, at both ends and in both precisions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anystate.diffusion import GAUSSIAN_SCHEDULES, Cosine, Linear, LogLinear, LogSNR, ScaledLinear

ENDS = torch.tensor([1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.37, 0.5, 0.73, 0.9, 0.99, 0.999, 1.0], dtype=torch.float64)


def as_function(schedule):
    """A schedule's log-SNR as a plain function of numpy times."""
    return LogSNR(lambda t: schedule.log_snr(torch.from_numpy(t)).numpy())


SCHEDULES = {
    **{name: make() for name, make in GAUSSIAN_SCHEDULES.items()},
    "log_snr_of_cosine": as_function(Cosine()),
    "log_snr_of_linear": as_function(Linear()),
    "log_snr_straight": LogSNR(lambda t: 12.0 - 24.0 * t),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def relative(actual, expected) -> float:
    return ((actual.double() - expected).abs() / expected.abs()).max().item()


def test_integral_is_the_integral_of_beta(schedule):
    """B' = β by central differences, whose own error is about h² = 1e-10."""
    t = ENDS[ENDS < 1.0]
    h = 1e-5 * t
    slope = (schedule.integral(t + h) - schedule.integral(t - h)) / (2.0 * h)
    assert relative(slope, schedule.beta(t)) < 1e-6
    assert schedule.integral(torch.zeros(1, dtype=torch.float64)).item() == 0.0


def test_inverses_return_the_time(schedule):
    assert relative(schedule.inverse(schedule.integral(ENDS)), ENDS) < 1e-10
    assert relative(schedule.time_of_log_snr(schedule.log_snr(ENDS)), ENDS) < 1e-10


def test_variance_is_preserved_and_log_snr_is_the_ratio(schedule):
    alpha, sigma = schedule.alpha(ENDS), schedule.sigma(ENDS)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(ENDS), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.log_snr(ENDS), 2.0 * torch.log(alpha / sigma), rtol=1e-12, atol=1e-12)
    assert bool((schedule.log_snr(ENDS).diff() < 0).all())


def test_gaussian_closed_forms_at_both_ends():
    """Values worked out by hand: B from its Taylor polynomial near 0, and exact at 1."""
    one, tiny = torch.ones(1, dtype=torch.float64), torch.full((1,), 1e-5, dtype=torch.float64)
    b = {
        "linear": (0.1 + 19.9 / 2, 1e-6 + 9.95e-10),
        "linear_half": ((0.1 + 19.9 / 2) / 2, (1e-6 + 9.95e-10) / 2),
        # ∫(r + d t)² = r² t + r d t² + d² t³/3
        "scaled_linear": (
            500 / 3 * (0.012 + math.sqrt(0.00085 * 0.012) + 0.00085),
            500 * (0.00085e-5 + math.sqrt(0.00085) * (math.sqrt(0.012) - math.sqrt(0.00085)) * 1e-10 + 2.16e-18),
        ),
        # −log cos x = x²/2 + x⁴/12 …
        "cosine": (-math.log(math.sin(0.0025 * math.pi)), 0.5 * (0.995 * math.pi / 2 * 1e-5) ** 2),
    }
    for name, (at_one, near_zero) in b.items():
        schedule = GAUSSIAN_SCHEDULES[name]()
        assert schedule.integral(one).item() == pytest.approx(at_one, rel=1e-11), name
        assert schedule.integral(tiny).item() == pytest.approx(near_zero, rel=1e-9), name
        assert schedule.sigma(tiny).item() == pytest.approx(math.sqrt(2 * near_zero) * (1 - near_zero / 2), rel=1e-9)
        assert schedule.alpha(one).item() == pytest.approx(math.exp(-at_one), rel=1e-11), name


def test_log_snr_function_equals_its_closed_form():
    """Tabulated, so not to the last digit; but right at 1e-5, where a table even in t is off by half."""
    for closed in (Cosine(), Linear(), ScaledLinear()):
        table = as_function(closed)
        for quantity in ("integral", "alpha", "sigma", "inverse"):
            at = closed.integral(ENDS) if quantity == "inverse" else ENDS
            assert relative(getattr(table, quantity)(at), getattr(closed, quantity)(at)) < 1e-7, (closed, quantity)
        assert relative(table.beta(ENDS), closed.beta(ENDS)) < 1e-4


def test_log_snr_curve_below_its_table_and_with_a_finite_start():
    straight = SCHEDULES["log_snr_straight"]
    t = torch.tensor([1e-9, 1e-7, 1e-5], dtype=torch.float64)
    expected = 12.0 - 24.0 * t
    torch.testing.assert_close(straight.log_snr(t), expected, rtol=1e-4, atol=0)
    cosine = SCHEDULES["log_snr_of_cosine"]
    assert relative(cosine.sigma(t), Cosine().sigma(t)) < 1e-6


@pytest.mark.parametrize("name", GAUSSIAN_SCHEDULES)
@pytest.mark.parametrize("quantity", ["beta", "integral", "alpha", "sigma", "log_snr"])
def test_float32_times_keep_their_digits(name, quantity):
    """A float32 time is exact as a float64; what float32 arithmetic adds stays small at both ends.

    The cosine's angle near π/2 loses 1e-5 to its own rounding; nothing else may lose more than 1e-6.
    """
    schedule, t = GAUSSIAN_SCHEDULES[name](), ENDS.float()
    away = (t < 0.05) | (t > 0.7)  # log-SNR crosses zero between, where relative error means nothing
    f = getattr(schedule, quantity)
    assert relative(f(t)[away], f(t.double())[away]) < (1e-5 if name == "cosine" else 1e-6)


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_log_linear_identities(delta):
    s, t = LogLinear(delta), ENDS
    prob = (1 - delta) * t
    torch.testing.assert_close(s.prob(t), prob, rtol=1e-15, atol=0)
    torch.testing.assert_close(-torch.expm1(-s.total(t)), prob, rtol=1e-13, atol=0)
    h = 1e-6 * t[t < 1]
    slope = (s.total(t[t < 1] + h) - s.total(t[t < 1] - h)) / (2 * h)
    torch.testing.assert_close(s.rate(t[t < 1]), slope, rtol=1e-5, atol=0)
    torch.testing.assert_close(s.reverse_rate(t), s.rate(t) / torch.expm1(s.total(t)), rtol=1e-10, atol=0)
    torch.testing.assert_close(s.inverse_prob(prob), t, rtol=1e-14, atol=0)
    assert s.total(t)[-1].item() == pytest.approx(-math.log(delta), rel=1e-12)
    assert s.rate(t)[-1].item() == pytest.approx((1 - delta) / delta, rel=1e-12)
    assert s.total(torch.zeros(1)).item() == 0.0


def test_log_linear_keeps_float32_times():
    """1 − (1 − 1e-5) t in float32 is 0.14% off at t = 1 (official code): here it is not."""
    s, t = LogLinear(1e-5), ENDS.float()
    for f in (s.total, s.rate, s.prob, s.reverse_rate):
        assert relative(f(t), f(t.double())) < 3e-7


def test_bad_schedules_are_refused():
    for make in (
        lambda: Linear(beta_min=0.0),
        lambda: Linear(beta_min=2.0, beta_max=1.0),
        lambda: ScaledLinear(b0=-1.0),
        lambda: Cosine(end=1.0),
        lambda: LogLinear(0.0),
        lambda: LogLinear(1.0),
        lambda: LogSNR(lambda t: t),
        lambda: LogSNR(lambda t: np.where(t > 0.5, np.nan, -t)),
    ):
        with pytest.raises(ValueError):
            make()
