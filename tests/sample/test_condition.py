"""Masks of conditions against the exact distributions of toy spaces.

Statistical tests (`fits`) fail a correct sampler with probability 1e-4 each.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from anystate.diffusion import Gaussian, Linear, LogLinear, Masked, Space, Uniform
from anystate.sample import SAMPLERS, Condition, Sampler, sample

N = 3000
METHODS = list(SAMPLERS[Masked])


def one_hot_texts(toy, tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(toy.index(tokens), len(toy.texts)).double()


def random_texts(n: int, length: int) -> Tensor:
    """Uniformly random texts: the mean of their conditional distributions is not the toy's distribution."""
    return torch.randint(3, (n, length), generator=torch.Generator().manual_seed(6))


def random_mask(n: int, length: int) -> Tensor:
    """(n, length): masks in which some tokens are observed, but not all, in every pattern."""
    patterns = [p for p in itertools.product((False, True), repeat=length) if any(p) and not all(p)]
    index = torch.randint(len(patterns), (n,), generator=torch.Generator().manual_seed(2))
    return torch.tensor(patterns)[index]


def posterior_of(toy, tokens: Tensor, observed: Tensor, images: Tensor | None = None) -> Tensor:
    """(B, S): the exact distribution of texts given their observed tokens and, if there are, their images."""
    x = {"text": torch.where(observed, tokens, toy.states)}
    x |= {} if images is None else {"image": images}
    return toy.posterior(x, {m: torch.zeros(len(tokens)) for m in x})


# Masked process: exact


@pytest.mark.parametrize("method", METHODS)
def test_infilling_follows_the_conditional_distribution(make_toy, fits, method):
    """Texts of three tokens, of which one or two are observed; observed tokens are unchanged."""
    toy = make_toy(length=3)
    tokens, observed = random_texts(N, 3), random_mask(N, 3)
    options = {"steps": 64, "batch_size": N, "samplers": {"text": Sampler(method)}}
    out = sample(toy.net, toy.text_only(), {"text": Condition(tokens, mask=observed)}, **options)["text"]
    assert torch.equal(out[observed], tokens[observed])
    assert not torch.equal(out, tokens)
    assert fits.calibrated(one_hot_texts(toy, out), posterior_of(toy, tokens, observed))


def test_infilling_test_rejects_a_wrong_distribution(make_toy, fits):
    """The same samples do not follow the distribution given only the first observed token of each text."""
    toy = make_toy(length=3)
    tokens, observed = random_texts(N, 3), random_mask(N, 3)
    options = {"steps": 64, "batch_size": N}
    out = sample(toy.net, toy.text_only(), {"text": Condition(tokens, mask=observed)}, **options)["text"]
    fewer = observed & (observed.cumsum(1) == 1)
    assert not fits.calibrated(one_hot_texts(toy, out), posterior_of(toy, tokens, fewer))


@pytest.mark.parametrize("method", METHODS)
def test_infilling_with_an_image_as_condition(toy, fits, method):
    images, tokens, observed = toy.draw(N)["image"], random_texts(N, 2), random_mask(N, 2)
    conditions = {"image": images, "text": Condition(tokens, mask=observed)}
    options = {"steps": 32, "batch_size": N, "samplers": {"text": Sampler(method)}}
    out = sample(toy.net, toy.space, conditions, **options)
    assert torch.equal(out["image"], images)
    assert torch.equal(out["text"][observed], tokens[observed])
    assert fits.calibrated(one_hot_texts(toy, out["text"]), posterior_of(toy, tokens, observed, images))
    assert not fits.calibrated(one_hot_texts(toy, out["text"]), posterior_of(toy, tokens, observed))


@pytest.mark.parametrize("method", METHODS)
def test_infilling_with_a_sampled_image(toy, fits, method):
    """The text follows its distribution given the observed token, the image that of the text."""
    tokens, observed = random_texts(N, 2), random_mask(N, 2)
    options = {"steps": 64, "batch_size": N, "samplers": {"text": Sampler(method)}}
    out = sample(toy.net, toy.space, {"text": Condition(tokens, mask=observed)}, **options)
    assert torch.equal(out["text"][observed], tokens[observed])
    assert fits.calibrated(one_hot_texts(toy, out["text"]), posterior_of(toy, tokens, observed))
    assert fits.normal(toy.standardized(out))


@pytest.mark.parametrize("method", METHODS)
def test_tokens_observed_at_a_noise_time(make_toy, fits, method):
    """Observed tokens are noised to t once; those that become masks are sampled: a mixture over mask patterns."""
    toy, n, t = make_toy(length=3), 20_000, 0.4
    start, observed = torch.tensor([0, 2, 1]), torch.tensor([True, True, False])
    condition = Condition(start.expand(n, 3), t, mask=observed.expand(n, 3))
    options = {"steps": 64, "batch_size": n, "samplers": {"text": Sampler(method)}}
    out = sample(toy.net, toy.text_only(), {"text": condition}, **options)["text"]
    p_masked = (1.0 - toy.space["text"].schedule.delta) * t
    law = torch.zeros_like(toy.prob)
    for masked in itertools.product((False, True), repeat=2):
        left = observed & ~torch.tensor([*masked, False])
        law += (
            math.prod(p_masked if m else 1 - p_masked for m in masked) * posterior_of(toy, start[None], left[None])[0]
        )
    assert fits.counts(toy.counts(out), law)


def test_values_outside_the_mask_are_not_used(toy):
    """Not even where they are no valid data: mask tokens in texts, NaN in images."""
    tokens, observed = toy.draw(64)["text"], random_mask(64, 2)
    images = toy.draw(64)["image"]
    for process, x, invalid in (("text", tokens, toy.states), ("image", images, math.nan)):
        other = torch.where(observed, x, torch.full_like(x, invalid))
        a, b = (sample(toy.net, toy.space, {process: Condition(v, mask=observed)}, steps=4) for v in (x, other))
        assert all(torch.equal(a[m], b[m]) for m in a)


# Gaussian modalities: the replacement method, and networks that see what is observed

CORRELATION = 0.8
PLANE = Space({"x": Gaussian((2,), Linear(), 1e-3, time_conditioning="time")})


class CorrelatedGaussian:
    """The exact network of a 2-D Gaussian with unit variances and a correlation.

    observes: with it, the network is called with `observed`, here always the first coordinate, and predicts ε of the
    exact conditional distribution given that coordinate.
    """

    def __init__(self, observes: tuple[str, ...] = ()):
        self.observes = observes

    def __call__(self, x, t, mask=None, outputs=None, observed=None):
        x, schedule = x["x"].double(), PLANE["x"].schedule
        alpha, sigma = (f(t["x"].double())[:, None] for f in (schedule.alpha, schedule.sigma))
        if observed is None:
            covariance = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
            noisy = (alpha**2)[..., None] * covariance + (sigma**2)[..., None] * torch.eye(2)
            return {"x": sigma * torch.linalg.solve(noisy, x[..., None])[..., 0]}
        assert torch.equal(observed["x"], torch.tensor([True, False]).expand(x.shape))
        variance = alpha**2 * (1 - CORRELATION**2) + sigma**2
        return {"x": sigma * (x - alpha * CORRELATION * x[:, :1]) / variance}


def second_coordinate(net: CorrelatedGaussian, method: str, grid: str, steps: int, n: int = 20_000) -> Tensor:
    """(n,) samples given that the first coordinate is 1, standardized by mean 0.8 and standard deviation 0.6."""
    mask = torch.tensor([[True, False]]).expand(n, 2)
    options = {"steps": steps, "batch_size": n, "samplers": {"x": Sampler(method, grid)}}
    out = sample(net, PLANE, {"x": Condition(torch.ones(n, 2), mask=mask)}, **options)["x"].double()
    assert bool((out[:, 0] == 1.0).all())
    return (out[:, 1] - CORRELATION) / math.sqrt(1 - CORRELATION**2)


@pytest.mark.parametrize(("method", "grid", "error"), [("heun", "linear", 0.276), ("euler_sde", "linear", 0.196)])
def test_error_of_the_replacement_method(fits, method, grid, error):
    """The Kolmogorov distance from the exact conditional distribution does not vanish with the number of steps.

    Measured with n = 20,000 (± 0.01), mean and standard deviation instead of 0.8 and 0.6: heun, 50 and 200 steps:
    distance 0.276 and 0.276, 0.34 and 0.82; euler_sde: 0.192 and 0.199, 0.51 and 0.78 and 0.50 and 0.76. New noise in
    every step instead of the same changes the distances by less than 0.01. If the condition is not used it is 0.42.
    """
    for steps in (50, 200):
        z = second_coordinate(CorrelatedGaussian(), method, grid, steps).sort().values
        cdf, n = torch.special.ndtr(z), len(z)
        steps_up = torch.arange(n + 1, dtype=torch.float64) / n
        distance = torch.maximum((steps_up[1:] - cdf).abs(), (cdf - steps_up[:-1]).abs()).max().item()
        assert abs(distance - error) < 0.03, steps
        assert not fits.normal(z)


@pytest.mark.parametrize(("method", "grid"), [("heun", "linear"), ("euler_sde", "linear"), ("dpmpp_2m", "logsnr")])
def test_a_network_that_observes_is_exact(fits, method, grid):
    assert fits.normal(second_coordinate(CorrelatedGaussian(("x",)), method, grid, 200))


def test_observed_elements_are_clean_at_every_evaluation():
    seen, n = [], 8
    net = CorrelatedGaussian(("x",))

    def spy(x, t, **options):
        seen.append(x["x"][:, 0])
        return net(x, t, **options)

    spy.observes = ("x",)
    mask = torch.tensor([[True, False]]).expand(n, 2)
    sample(spy, PLANE, {"x": Condition(torch.full((n, 2), 1.5), mask=mask)}, steps=4)
    assert len(seen) == 7
    assert all(bool((first == 1.5).all()) for first in seen)


@pytest.mark.parametrize("method", list(SAMPLERS[Gaussian]))
def test_observed_elements_of_images_are_unchanged(toy, method):
    true, observed = toy.draw(64), random_mask(64, 2)
    conditions = {"image": Condition(true["image"], mask=observed), "text": true["text"]}
    out = sample(toy.net, toy.space, conditions, steps=8, samplers={"image": Sampler(method)})["image"]
    assert torch.equal(out[observed], true["image"][observed])
    assert (out[~observed] - true["image"][~observed]).abs().min() > 0


@pytest.mark.parametrize("method", list(SAMPLERS[Gaussian]))
def test_images_observed_at_a_noise_time(toy, fits, method):
    """At grid times ≥ t the state is the image noised to the grid time, with one noise; below t it is sampled."""
    true, n = toy.draw(N), N
    times = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.1, 0.0], dtype=torch.float64)
    conditions = {"image": Condition(true["image"], 0.3, torch.ones(n, 2, dtype=torch.bool)), "text": true["text"]}
    options = {"steps": 5, "batch_size": n, "samplers": {"image": Sampler(method, times)}, "trajectory": True}
    out, states = sample(toy.net, toy.space, conditions, **options)
    alpha, sigma = toy.alpha_sigma(times)
    noise = [(states[k]["image"].double() - alpha[k] * true["image"]) / sigma[k] for k in range(5)]
    assert fits.normal(noise[0].flatten())
    for k in (1, 2, 3):
        torch.testing.assert_close(noise[k], noise[0], rtol=0, atol=1e-4)
    assert (noise[4] - noise[0]).abs().max() > 0.1
    assert (out["image"] - true["image"]).abs().mean() > 0.1


# Uniform process: the replacement method


@pytest.mark.parametrize("method", list(SAMPLERS[Uniform]))
def test_observed_tokens_of_uniform_diffusion(make_toy, fits, method):
    """Observed tokens are unchanged. The others are approximate: total variation from the exact distribution
    0.12 ± 0.005 at 64 and at 256 steps, n = 20,000; 0.24 if the observed token is not used."""
    toy, n = make_toy(process=Uniform, t_min=1e-3, delta=1e-3), 20_000
    tokens, observed = torch.zeros(n, 2, dtype=torch.int64), torch.tensor([[True, False]]).expand(n, 2)
    options = {"steps": 64, "batch_size": n, "samplers": {"text": Sampler(method)}}
    out = sample(toy.net, toy.text_only(), {"text": Condition(tokens, mask=observed)}, **options)["text"]
    assert bool((out[:, 0] == 0).all())
    law = torch.where(toy.texts[:, 0] == 0, toy.prob, 0.0)
    distance = 0.5 * (toy.counts(out) / n - law / law.sum()).abs().sum().item()
    assert 0.09 < distance < 0.15


# Allowed states

PROCESSES = [(process, method) for process in (Masked, Uniform) for method in SAMPLERS[process]]


@pytest.mark.parametrize(("process", "method"), PROCESSES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_allowed_states_are_never_violated(make_toy, process, method, guidance):
    """In joint and in conditional sampling, with guidance, and after few steps."""
    toy = make_toy(process=process, length=3, t_min=1e-3, delta=1e-3)
    allowed = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    images = toy.draw(500)["image"]
    for conditions, steps in itertools.product(({}, {"image": images}), (1, 4)):
        options = {"n": 500, "steps": steps, "guidance": guidance, "samplers": {"text": Sampler(method)}}
        tokens = sample(toy.net, toy.space, conditions, allowed_states={"text": allowed}, **options)["text"]
        assert bool(allowed[torch.arange(3), tokens].all())
        assert all(len(tokens[:, i].unique()) == allowed[i].sum() for i in range(3))


@pytest.mark.parametrize(("process", "method"), PROCESSES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_allowed_states_of_one_token_condition_on_the_set(make_toy, fits, process, method, guidance):
    """One token, one step from the network's prediction to data: exactly the distribution given the allowed set.

    With guidance, that of the combined log-probabilities.
    """
    toy, n = make_toy(length=1, process=process, t_min=1e-3, delta=1e-9), 10_000
    allowed, image = torch.tensor([[True, True, False]]), torch.tensor([[0.7, 0.2]])  # 99% is forbidden
    options = {"steps": 1, "guidance": guidance, "batch_size": n, "samplers": {"text": Sampler(method)}}
    out = sample(toy.net, toy.space, {"image": image.expand(n, 2)}, allowed_states={"text": allowed}, **options)["text"]
    log_p = toy.posterior({"image": image}, {"image": torch.zeros(1)})[0].log()
    combined = log_p if guidance == 1.0 else guidance * log_p + (1 - guidance) * toy.prob.log()
    law = torch.softmax(combined.masked_fill(~allowed[0], -torch.inf), 0)
    assert log_p[2].exp() > 0.98
    assert 0.05 < law[0] < 0.95
    counts = toy.counts(out)
    assert counts[2] == 0
    assert fits.counts(counts[:2], law[:2])


def test_allowed_states_with_uniforms(make_toy):
    """Evenly spaced points give every allowed state as often as its probability given the set says."""
    toy, n = make_toy(length=1), 3000
    u = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    options = {"steps": 1, "batch_size": n, "samplers": {"text": Sampler("first_hitting")}, "uniforms": {"text": u}}
    allowed = torch.tensor([[True, False, True]])
    counts = toy.counts(sample(toy.net, toy.text_only(), n=n, allowed_states={"text": allowed}, **options)["text"])
    law = torch.where(allowed[0], toy.prob, 0.0)
    assert (counts - n * law / law.sum()).abs().max() <= 1.01


# Guidance


def test_guidance_of_modalities_with_a_mask():
    """The second branch has the condition noised and keeps the observed tokens."""
    space = Space({"text": Masked(4, 3, LogLinear(), 1e-3), "c": Gaussian((1,), Linear(), 1e-3)})
    seen = []

    def net(x, t, mask=None, outputs=None):
        seen.append(x)
        return {"text": (x["c"] * torch.tensor([1.0, 0.0, -1.0]))[:, None].expand(-1, 4, 3)}

    tokens = torch.zeros(16, 4, dtype=torch.int64)
    observed = torch.tensor([True, False, False, True]).expand(16, 4)
    conditions = {"c": torch.ones(16, 1), "text": Condition(tokens, mask=observed)}
    sample(net, space, conditions, steps=3, guidance=3.0)
    for x in seen:
        first, second = x["text"].chunk(2)
        assert torch.equal(first, second)
        assert bool((first[observed] == 0).all())
        assert not torch.equal(*x["c"].chunk(2))
