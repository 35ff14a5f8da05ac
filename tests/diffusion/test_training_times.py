"""Training times and sampling grids. Kolmogorov–Smirnov tests reject a correct sampler for 1 seed in 10,000."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest
from scipy.stats.qmc import discrepancy

from anystate.diffusion import Cosine, Gaussian, Linear, LogLinear, Masked, ScaledLinear, TimeSampler, time_grid
from anystate.kernels import Rng

SPACE = {"image": Gaussian((2,), Cosine(), 1e-3), "text": Masked(3, 4, LogLinear(), 1e-3)}


def draw(times: TimeSampler, n: int = 256, seed: int = 0, step: int = 0, space=SPACE, start: int = 0):
    return times(space, Rng.for_batch(seed, n, start).at(step))


def uniform(t: torch.Tensor, t_min: float = 1e-3) -> bool:
    return kstest(((t - t_min) / (1 - t_min)).numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("low_discrepancy", [False, True])
@pytest.mark.parametrize("kind", ["decoupled", "unified"])
def test_each_time_is_uniform(kind, low_discrepancy):
    """Over a batch, and for one sample over many steps, also with low discrepancy."""
    times = TimeSampler(kind, low_discrepancy)
    batch, loss_mask = draw(times, 4000)
    over_steps = [draw(times, 8, step=k)[0] for k in range(800)]
    for m in SPACE:
        assert uniform(batch[m])
        assert uniform(torch.stack([t[m][5] for t in over_steps]))
        assert bool((loss_mask[m] == 1).all())
        assert batch[m].dtype == torch.float64
        assert batch[m].min() >= 1e-3
        assert batch[m].max() <= 1.0


def test_unified_times_are_equal_and_decoupled_ones_independent():
    for spread in (False, True):
        t, _ = draw(TimeSampler("unified", spread))
        assert torch.equal(t["image"], t["text"])
        t, _ = draw(TimeSampler("decoupled", spread), 4000)
        corner = ((t["image"] < 0.5) & (t["text"] < 0.5)).double().mean()  # ¼ if independent; 4σ
        assert abs(corner - 0.25) < 4 * math.sqrt(0.1875 / 4000)


@pytest.mark.parametrize("names", [1, 2, 3])
def test_discrepancy_is_lower_than_that_of_independent_times(names):
    """Centered L2 discrepancy of a batch, joint over the modalities, averaged over 20 steps: below half of iid's."""
    space = {f"m{i}": Masked(1, 2, LogLinear(), 1e-6) for i in range(names)}

    def mean_discrepancy(times):
        points = (torch.stack(list(draw(times, 128, step=k, space=space)[0].values()), 1) for k in range(20))
        return sum(discrepancy(p.clamp(0, 1).numpy(), method="CD") ** 0.5 for p in points) / 20

    assert mean_discrepancy(TimeSampler()) < 0.5 * mean_discrepancy(TimeSampler(low_discrepancy=False))


def test_low_discrepancy_lowers_the_variance_of_a_mean():
    """Batch mean of a loss-like function of both times, over 300 steps: at least 5 times less variance, no bias."""

    def means(times):
        drawn = (draw(times, 64, step=k)[0] for k in range(300))
        return torch.stack([(torch.exp(-3 * t["image"]) + t["text"] ** 2 * t["image"]).mean() for t in drawn])

    spread, chance = means(TimeSampler()), means(TimeSampler(low_discrepancy=False))
    assert 5 * spread.var() < chance.var()
    truth = (1 - math.exp(-3)) / 3 + 1 / 6
    assert abs(spread.mean() - truth) < 4 * spread.std() / math.sqrt(300) + 1e-3  # 1e-3: times start at t_min


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_times_do_not_depend_on_the_number_of_ranks(low_discrepancy):
    """The times of a batch's rows do not depend on which rank holds them, conditions included."""
    times = TimeSampler(low_discrepancy=low_discrepancy, condition_prob={"image": 0.3, "text": 0.2})
    whole = draw(times, 100, seed=3, step=7)
    parts = [draw(times, b - a, seed=3, step=7, start=a) for a, b in ((0, 30), (30, 31), (31, 100))]
    for m in SPACE:
        for i in range(2):
            assert torch.equal(torch.cat([part[i][m] for part in parts]), whole[i][m])


def test_steps_and_seeds_differ():
    a, b, c = (draw(TimeSampler(), step=s, seed=seed)[0]["image"] for s, seed in ((0, 0), (1, 0), (0, 1)))
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


def test_conditioned_modalities():
    """Shares within 4σ; a clean condition is at t_min, without loss, at most one a sample; other times are uniform."""
    n, prob = 20_000, {"image": 0.25, "text": 0.5}
    t, loss_mask = draw(TimeSampler(condition_prob=prob), n)
    conditioned = {m: loss_mask[m] == 0 for m in SPACE}
    for m, share in prob.items():
        assert abs(conditioned[m].double().mean() - share) < 4 * math.sqrt(share * (1 - share) / n)
        assert bool((t[m][conditioned[m]] == SPACE[m].t_min).all())
        assert uniform(t[m][~conditioned[m]])
    assert not bool((conditioned["image"] & conditioned["text"]).any())
    _, loss_mask = draw(TimeSampler(condition_prob={"text": 1.0}), 50)
    assert bool((loss_mask["text"] == 0).all())
    assert bool((loss_mask["image"] == 1).all())


def test_time_skew():
    """1 − (1 − t)^(1/s) is uniform; the other modality's times stay uniform."""
    t, _ = draw(TimeSampler(time_skew={"image": 3.0}, low_discrepancy=False), 4000)
    assert uniform(1e-3 + (1 - 1e-3) * (1 - ((1 - t["image"]) / (1 - 1e-3)) ** (1 / 3)))
    assert not uniform(t["image"])
    assert t["image"].mean() > 0.7
    assert uniform(t["text"])


def test_bad_times_are_refused():
    for options in (
        {"draw": "both"},
        {"condition_prob": {"image": -0.1}},
        {"condition_prob": {"image": 0.6, "text": 0.6}},
        {"time_skew": {"text": 0.5}},
    ):
        with pytest.raises(ValueError, match="times"):
            TimeSampler(**options)
    with pytest.raises(ValueError, match="unknown modality 'sound'"):
        draw(TimeSampler(condition_prob={"sound": 0.5}))
    with pytest.raises(ValueError, match="unknown modality 'sound'"):
        draw(TimeSampler(time_skew={"sound": 2.0}))


# Grids


@pytest.mark.parametrize("schedule", [Linear(), ScaledLinear(), Cosine()])
@pytest.mark.parametrize("kind", ["linear", "rho", "logsnr"])
@pytest.mark.parametrize("start", [1.0, 0.4])
def test_time_grids_decrease_from_start_to_t_min_and_zero(schedule, kind, start):
    process = Gaussian((2,), schedule, 1e-3)
    for steps in (1, 2, 3, 50):
        times = time_grid(process, steps, kind, start)
        assert times.shape == (steps + 1,)
        assert times.dtype == torch.float64
        assert times[0] == start
        assert times[-1] == 0.0
        assert bool((times.diff() < 0).all())
        if steps > 1:
            assert times[-2].item() == pytest.approx(1e-3, rel=1e-12)


def test_spacing_of_time_grids():
    process = Gaussian((2,), Linear(), 1e-3)

    def uneven(values):
        return (values.diff() / values.diff().mean() - 1).abs().max()

    assert uneven(time_grid(process, 20)[:-1]) < 1e-9
    assert uneven(process.schedule.log_snr(time_grid(process, 20, "logsnr")[:-1])) < 1e-6
    for rho in (3.0, 7.0):
        noise = torch.exp(-process.schedule.log_snr(time_grid(process, 20, "rho", rho=rho)[:-1]) / 2)
        assert uneven(noise ** (1 / rho)) < 1e-6


def test_grid_from_below_t_min_is_one_update():
    process = Masked(3, 4, LogLinear(), 0.1)
    assert time_grid(process, 3, start=0.05).tolist() == [0.05, 0.0, 0.0, 0.0]
    assert time_grid(process, 3, start=0.0).tolist() == [0.0] * 4


def test_bad_grids_are_refused():
    gaussian, masked = SPACE["image"], SPACE["text"]
    for process, steps, kind, message in (
        (gaussian, 0, "linear", "steps must be at least 1, got 0"),
        (gaussian, -2, "linear", "steps must be at least 1, got -2"),
        (gaussian, 4, "cubic", "grid must be one of linear, rho, logsnr, got 'cubic'"),
        (masked, 4, "rho", "grid rho is for Gaussian"),
    ):
        with pytest.raises(ValueError, match=message):
            time_grid(process, steps, kind)
