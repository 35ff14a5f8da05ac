"""Distributions of the reference's samples; other tests compare the kernels with the reference draw for draw.

Bounds are set for a false-alarm rate of about 10⁻⁶ over seeds.
"""

import math

import pytest
import torch

from anystate.kernels import Draw, Rng, reference

stats = pytest.importorskip("scipy.stats", reason="scipy, which comes with scikit-learn, is not installed")

ALARM = 1e-6
N, L = 1000, 100  # 10⁵ positions


def assert_distribution(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """χ² of token counts against probabilities (states + 1,)."""
    counts = tokens.flatten().bincount(minlength=len(probabilities)).double()
    expected = probabilities * tokens.numel()
    statistic = ((counts - expected).square() / expected).sum().item()
    assert stats.chi2.sf(statistic, len(probabilities) - 1) > ALARM, f"χ² = {statistic:.1f}: {counts / expected}"


def keys(seed: int, n: int = N) -> torch.Tensor:
    return Rng.for_batch(seed, n).keys("text", Draw.STEP)


def logits(states: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(states, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("mask_logit", [False, True])
@pytest.mark.parametrize("rule", ["tau", "euler", "ancestral", "last"])
def test_tau_leap_follows_its_closed_form(rule, mask_logit, guided):
    """A masked position becomes v with probability P(move) c(v)/Σc."""
    states, rate, w = 7, 0.6, 1.7
    row, other = logits(states + 1), logits(states + 1, 1)
    columns = states + mask_logit
    score = torch.log_softmax(row[:columns].double(), 0)[:states]
    if guided:
        score = w * score + (1 - w) * torch.log_softmax(other[:columns].double(), 0)[:states]
    c = score.exp()
    r = rate * c.sum()
    move = {"tau": r * torch.exp(-r), "euler": r.clamp(max=1), "ancestral": torch.tensor(rate), "last": torch.ones(())}
    move = move[rule].double()
    law = torch.cat([move * c / c.sum(), (1 - move)[None]])
    tokens = reference.tau_leap(
        row.expand(N, L, -1),
        torch.full((N, L), states),
        torch.full((N,), rate, dtype=torch.float64),
        keys(1),
        states,
        rule,
        mask_logit,
        other.expand(N, L, -1) if guided else None,
        w,
    )
    if rule == "last":
        assert (tokens < states).all()
        law, tokens = law[:-1], tokens
    assert_distribution(tokens, law)


@pytest.mark.parametrize("rule", ["tau", "euler", "last"])
def test_uniform_process_follows_its_closed_form(rule):
    """The rate from x to v ≠ x is (s′/K) [odds p(v) + 1 − p(x) odds/(1 + odds)]."""
    states, rate, odds, x = 5, 0.05, 4.0, 2
    row = logits(states)
    p = torch.softmax(row.double(), 0)
    c = rate * (odds * p + 1 - p[x] * odds / (1 + odds))
    c[x] = 0
    r = c.sum()
    move = r * torch.exp(-r) if rule == "tau" else r.clamp(max=1)
    law = move * c / r
    law[x] = 1 - move
    tokens = reference.tau_leap_uniform(
        row.expand(N, L, -1),
        torch.full((N, L), x),
        torch.full((N,), rate),
        torch.full((N,), odds),
        keys(2),
        rule,
    )
    assert_distribution(tokens, p if rule == "last" else law)


def test_a_rare_token_is_drawn_at_its_rate():
    """With p = 1e-5 and 4·10⁶ draws, 40 hits are expected."""
    p, n = 1e-5, 4_000_000
    row = torch.tensor([math.log(p), math.log1p(-p)])
    hits = 0
    for batch in range(4):
        k = Rng.for_batch(3, 1000, start=1000 * batch).keys("text", Draw.STEP)
        rows = torch.cartesian_prod(torch.arange(1000), torch.arange(n // 4000))
        hits += (reference.sample_categorical(row.expand(len(rows), -1), k, rows) == 0).sum().item()
    assert min(stats.poisson.cdf(hits, n * p), stats.poisson.sf(hits - 1, n * p)) > ALARM / 2, hits


def test_no_temperature_shift():
    """First two moments of log p of the samples agree with the exact ones, for a long-tailed distribution."""
    states, n = 512, 20_000
    row = 4.0 * logits(states)
    log_p = torch.log_softmax(row.double(), 0)
    rows = torch.cartesian_prod(torch.arange(200), torch.arange(n // 200))
    drawn = log_p[reference.sample_categorical(row.expand(n, -1), keys(4, 200), rows)]
    p = log_p.exp()
    for power in (1, 2):
        exact = (p * log_p**power).sum()
        error = math.sqrt(((p * log_p ** (2 * power)).sum() - exact**2) / n)
        assert abs((drawn**power).mean() - exact) < 4.9 * error


def test_exponentials_reach_the_far_tail():
    """log E reaches log 2⁻³³, where a float32 Gumbel variable stops at log 2⁻²⁴."""
    words = torch.arange(4)
    assert reference.words_to_log_exponential(words)[0] < -22.8
    assert reference.words_to_log_exponential(words).diff().gt(0).all()
