"""Training times and sampling grids. Kolmogorov–Smirnov tests reject a correct sampler for 1 seed in 10,000."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare, kstest
from scipy.stats.qmc import discrepancy

from anystate import kernels
from anystate.diffusion import Cosine, Gaussian, Linear, LogLinear, Masked, ScaledLinear, TimeSampler, time_grid
from anystate.kernels import Draw, Rng

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


THREE = {m: Masked(1, 2, LogLinear(), 1e-3) for m in "abc"}
SUBSETS = [set(names) for k in range(3) for names in itertools.combinations("abc", k)]  # all but the whole


def patterns(times: TimeSampler, n: int, space=THREE, **options) -> list[set[str]]:
    """The clean conditions of each sample, which are at t_min."""
    t, loss_mask = draw(times, n, space=space, **options)
    for m, process in space.items():
        assert bool(((t[m] == process.t_min) == (loss_mask[m] == 0)).all())
    return [{m for m in space if loss_mask[m][i] == 0} for i in range(n)]


def occur(found: list[set[str]], shares: dict[str, float]) -> bool:
    """χ² test of how often each set of conditions, written as a+b, occurs; others must not. Alarm 1 in 10,000."""
    counts = {names: sum(f == set(names.split("+")) - {""} for f in found) for names in shares}
    expected = [share * len(found) for share in shares.values()]
    return sum(counts.values()) == len(found) and chisquare(list(counts.values()), expected).pvalue > 1e-4


def test_several_modalities_are_conditions_together():
    prob = {"a+b": 0.2, "a": 0.1, "b+c": 0.15, "c": 0.05}
    found = patterns(TimeSampler(condition_prob=prob), 20_000)
    assert occur(found, {**prob, "": 0.5})
    assert not occur(found, {"a+b": 0.15, "a": 0.15, "b+c": 0.15, "c": 0.05, "": 0.5})


@pytest.mark.parametrize("prob", [0.4, 1.0])
def test_random_conditions_are_any_part_but_the_whole(prob):
    """Every proper subset of three modalities, the empty one too, has a share of prob/7."""
    shares = {"+".join(sorted(names)): prob / 7 + (1 - prob) * (not names) for names in SUBSETS}
    assert occur(patterns(TimeSampler(subset_prob=prob), 20_000), shares)


def test_random_conditions_beside_given_ones():
    """Both may be set: the random parts come from the samples to which no `condition_prob` applies."""
    times = TimeSampler(condition_prob={"a": 0.3, "b+c": 0.2}, subset_prob=0.35)
    shares = {"+".join(sorted(names)): 0.05 for names in SUBSETS}
    shares |= {"a": 0.35, "b+c": 0.25, "": 0.2}
    assert occur(patterns(times, 20_000), shares)


def test_processes_of_a_modality_are_conditions_together():
    """The numbers and categories of a row are one of two modalities: neither, or one of the two, a third each."""
    space = {m: Masked(1, 2, LogLinear(), 1e-3) for m in ("num", "cat", "text")}
    times = TimeSampler(subset_prob=1.0, groups=(("num", "cat"), ("text",)))
    assert occur(patterns(times, 9_000, space=space), {"": 1 / 3, "num+cat": 1 / 3, "text": 1 / 3})


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"condition_prob": {"a": 0.25}}, ()),
        ({"condition_prob": {"a+b": 0.2, "b": 0.1, "b+c": 0.3}}, ()),
        ({"subset_prob": 0.7}, ()),
        ({"subset_prob": 0.5, "condition_prob": {"a+c": 0.25, "c": 0.2}}, ()),
        ({"subset_prob": 1.0}, (("a", "b"), ("c",))),
    ],
)
def test_share_of_conditions_is_that_of_a_count(options, groups):
    """The formula by which logged losses are divided, within 4σ for each modality, and exactly over all subsets."""
    times, n = TimeSampler(**options, groups=groups), 20_000
    found = patterns(times, n)
    parts = [set(names) for names in groups] or [{m} for m in THREE]
    chosen = [set().union(*some) for k in range(len(parts)) for some in itertools.combinations(parts, k)]
    for m in THREE:
        share = times.condition_share(m, len(THREE))
        given = sum(p for names, p in times.condition_prob.items() if m in names.split("+"))
        assert share == pytest.approx(given + times.subset_prob * sum(m in s for s in chosen) / len(chosen))
        counted = sum(m in f for f in found) / n
        assert abs(counted - share) <= 4 * math.sqrt(share * (1 - share) / n)
    assert all(times.without_conditions().condition_share(m, 3) == 0.0 for m in THREE)
    assert not any(patterns(times.without_conditions(), 100))


def test_conditions_of_single_modalities_are_drawn_as_before():
    """Bit for bit: u between 0 and p₁ makes the first modality of the space a condition, up to p₁ + p₂ the next."""
    prob, rng = {"c": 0.2, "a": 0.3}, Rng.for_batch(5, 2000).at(3)
    u = kernels.uniform(rng.keys("all", Draw.CONDITIONED), 1)[:, 0].double()
    expected = {"a": (u > 0) & (u <= 0.3), "b": u < 0, "c": (u > 0.3) & (u <= 0.3 + 0.2)}
    free, _ = TimeSampler()(THREE, rng)
    for more in ({}, {"a+b": 0.25}):  # sets of several come after those of one
        t, loss_mask = TimeSampler(condition_prob=prob | more)(THREE, rng)
        others = (u > 0.5) & (u <= 0.75) if more else u < 0
        for m in THREE:
            conditioned = expected[m] | (others if m in "ab" else u < 0)
            assert torch.equal(loss_mask[m] == 0, conditioned)
            assert torch.equal(t[m], torch.where(conditioned, THREE[m].t_min, free[m]))


def test_random_conditions_do_not_depend_on_the_number_of_ranks():
    times = TimeSampler(condition_prob={"a+b": 0.2}, subset_prob=0.6)
    whole = patterns(times, 60, step=4)
    assert patterns(times, 25, step=4) + patterns(times, 35, step=4, start=25) == whole
    assert patterns(times, 60, step=5) != whole


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
        {"condition_prob": {"image": 0.6, "image+text": 0.6}},
        {"condition_prob": {"image": 0.6}, "subset_prob": 0.5},
        {"time_skew": {"text": 0.5}},
    ):
        with pytest.raises(ValueError, match="times"):
            TimeSampler(**options)
    with pytest.raises(ValueError, match="unknown modality 'sound'"):
        draw(TimeSampler(condition_prob={"sound": 0.5}))
    with pytest.raises(ValueError, match=r"condition_prob names unknown modality 'sound'; there are image, text"):
        draw(TimeSampler(condition_prob={"text+sound": 0.5}))
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
