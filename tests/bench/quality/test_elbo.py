"""Likelihood bounds against distributions whose likelihood is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from anystate.bench.quality.elbo import bound, on_grid
from anystate.diffusion import Cosine, Gaussian, LogLinear, Masked, ScaledLinear, Space, Uniform

L, K = 4, 3


@pytest.fixture(scope="module")
def toy():
    """A random joint distribution over K^L sequences: (probabilities (K^L,), all sequences (K^L, L))."""
    p = torch.rand(K**L, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 2
    return p / p.sum(), torch.tensor(list(itertools.product(range(K), repeat=L)))


def exact_net(toy):
    """log p(x_i = v | the unmasked positions), by summing over all sequences."""
    p, every = toy

    def net(x, t, mask=None, outputs=None):
        tokens = x["text"]
        fits = ((tokens[:, None] == every) | (tokens[:, None] == K)).all(-1).double() * p  # (B, K^L)
        onehot = torch.nn.functional.one_hot(every, K).double()
        marginal = torch.einsum("bs,slk->blk", fits, onehot)
        return {"text": torch.log(marginal / marginal.sum(-1, keepdim=True)).clamp(min=-1e4)}

    return net


def draw(toy, n):
    p, every = toy
    return every[torch.multinomial(p, n, replacement=True, generator=torch.Generator().manual_seed(0))]


def test_masked_bound_is_tight_for_the_exact_conditionals(toy):
    """With exact conditionals the bound equals the likelihood, for every order of unmasking."""
    space = Space({"text": Masked(L, K, LogLinear(1e-5), 1e-3)})
    x = draw(toy, 2000)
    index = (x * K ** torch.arange(L - 1, -1, -1)).sum(1)
    truth = float(-torch.log2(toy[0][index]).mean()) / L
    got = bound(exact_net(toy), space, {"text": x}, "text", repeats=16)
    assert got.unit == "bits/token"
    assert got.error < 0.01
    assert abs(got.bits - truth) < 4 * got.error
    assert got.per_sample == pytest.approx(L * got.bits)


def test_masked_bound_of_a_uniform_model_is_its_cross_entropy(toy):
    """A model of independent uniform tokens: exactly log2 K a token."""
    space = Space({"text": Masked(L, K, LogLinear(1e-5), 1e-3)})

    def uniform(x, t, mask=None, outputs=None):
        return {"text": torch.zeros(*x["text"].shape, K)}

    got = bound(uniform, space, {"text": draw(toy, 4000)}, "text", repeats=8)
    assert abs(got.bits - math.log2(K)) < 4 * got.error
    assert got.error < 0.05


SPREAD = torch.tensor([0.5, 1.0, 1.7], dtype=torch.float64)


def gaussian_net(space, spread=SPREAD):
    """The exact ε̂ for independent N(0, spread²) data: σ x / (α² s² + σ²)."""
    schedule = space["x"].schedule

    def net(x, t, mask=None, outputs=None):
        time = t["x"].double()
        alpha, sigma = schedule.alpha(time)[:, None], schedule.sigma(time)[:, None]
        return {"x": sigma * x["x"].double() / (alpha**2 * spread**2 + sigma**2)}

    return net


@pytest.mark.parametrize("schedule", [Cosine(0.9999), ScaledLinear()], ids=["cosine", "scaled_linear"])
def test_gaussian_bound_is_tight_for_the_exact_score(schedule):
    """N(0, s²) data: the exact score gives the entropy, up to the error at the ends of the schedule."""
    space = Space({"x": Gaussian((3,), schedule, 1e-4, "time")})
    x = (torch.randn(6000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * SPREAD).float()
    truth = float((0.5 * torch.log2(2 * math.pi * SPREAD**2) + 0.5 / math.log(2) * (x / SPREAD) ** 2).mean())
    got = bound(gaussian_net(space), space, {"x": x}, "x", repeats=8)
    assert got.unit == "bits/dim (density)"
    assert got.error < 0.05
    assert abs(got.bits - truth) < 4 * got.error + 2e-3


def test_diffusion_term_has_its_closed_form():
    """A network that always predicts 0 has E|ε − ε̂|² = 1: ½ (λ(t_min) − λ(1)) nats a dimension, plus both ends."""
    space = Space({"x": Gaussian((3,), Cosine(), 1e-2, "time")})
    schedule, ends = space["x"].schedule, torch.tensor([1.0, 1e-2], dtype=torch.float64)
    x = torch.zeros(20000, 3)
    low, high = schedule.log_snr(ends)
    sigma1 = schedule.sigma(ends)[0]
    prior = 0.5 * (sigma1**2 - 1 - 2 * torch.log(sigma1))
    rest = 0.5 * math.log(2 * math.pi * math.e) - 0.5 * high
    truth = float(0.5 * (high - low) + prior + rest) / math.log(2)

    def zero(x, t, mask=None, outputs=None):
        return {"x": torch.zeros_like(x["x"])}

    got = bound(zero, space, {"x": x}, "x", repeats=8)
    assert abs(got.bits - truth) < 4 * got.error
    assert got.error < 0.05


def test_bits_of_discrete_levels():
    """4 equally likely levels per element and the exact posterior mean: 2 bits/dim by the discrete bound."""
    levels = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)
    space = Space({"x": Gaussian((2,), Cosine(0.9999), 1e-3, "time")})
    schedule = space["x"].schedule

    def net(x, t, mask=None, outputs=None):
        time, value = t["x"].double(), x["x"].double()
        alpha, sigma = schedule.alpha(time)[:, None], schedule.sigma(time)[:, None]
        weight = torch.softmax(-0.5 * ((value[..., None] - alpha[..., None] * levels) / sigma[..., None]) ** 2, -1)
        return {"x": (value - alpha * (weight @ levels)) / sigma}

    pick = torch.randint(4, (8000, 2), generator=torch.Generator().manual_seed(2))
    got = bound(net, space, {"x": levels[pick].float()}, "x", repeats=8, levels=4)
    assert got.unit == "bits/dim"
    assert abs(got.bits - 2.0) < 4 * got.error + 1e-3
    assert got.error < 0.05
    with pytest.raises(ValueError, match="not 3 equally spaced"):
        bound(net, space, {"x": levels[pick].float()}, "x", levels=3)


def test_conditional_and_marginal_bounds():
    """A caption that repeats the sign of the image: 1 bit marginally, 0 bits given the image."""
    space = Space({"x": Gaussian((1,), Cosine(), 1e-3, "time"), "text": Masked(1, 2, LogLinear(1e-5), 1e-3)})
    sign = torch.randint(2, (3000,), generator=torch.Generator().manual_seed(4))
    data = {"x": sign[:, None] * 2.0 - 1.0, "text": sign[:, None]}

    def net(x, t, mask=None, outputs=None):
        sure = torch.where(t["x"] < 0.01, 50.0, 0.0)[:, None, None]
        return {"text": torch.cat([-x["x"][..., None], x["x"][..., None]], -1) * sure}

    marginal = bound(net, space, data, "text", conditional=False, repeats=8)
    conditional = bound(net, space, data, "text", conditional=True, repeats=8)
    assert abs(marginal.bits - 1.0) < 4 * marginal.error + 1e-6
    assert conditional.bits < 1e-6


def test_invalid_arguments():
    space = Space({"text": Uniform(L, K, LogLinear())})
    with pytest.raises(ValueError, match="masked and Gaussian"):
        bound(None, space, {"text": torch.zeros(2, L, dtype=torch.int64)}, "text")
    space = Space({"text": Masked(L, K, LogLinear())})
    with pytest.raises(ValueError, match="at least 2 repeats"):
        bound(None, space, {"text": torch.zeros(2, L, dtype=torch.int64)}, "text", repeats=1)


def test_on_grid():
    assert on_grid(torch.tensor([-1.0, 0.0, 1.0]), 3)
    assert not on_grid(torch.tensor([-1.0, 0.1]), 3)
    assert not on_grid(torch.tensor([-1.0, 2.0]), 3)
