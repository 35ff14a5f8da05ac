"""With the exact score (see `conftest.Toy`), samplers converge to the true distribution, at their order in N.

Every χ² and Kolmogorov–Smirnov test fails a correct sampler with probability 1e-4 (`fits.alarm`).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from anystate.diffusion import Gaussian, Linear, Masked, Space, Uniform, time_grid
from anystate.sample import Condition, Sampler, sample

N_PAIRS = 3000
GAUSSIAN = {
    "heun": (Sampler("heun"), 64),
    "euler": (Sampler("euler"), 128),
    "euler_sde": (Sampler("euler_sde"), 128),
    "dpmpp_2m": (Sampler("dpmpp_2m", "logsnr"), 48),
}
MASKED = ["tau_leap", "euler", "ancestral", "first_hitting"]


def many(toy, *args, n: int = N_PAIRS, **kwargs):
    """Samples of the toy space, in one batch."""
    return sample(toy.net, toy.space, *args, n=n, batch_size=n, **kwargs)


def mixture_normal(toy, image, posterior):
    """(2 B,) image coordinates, mapped by the distribution function of their mixture to standard normals."""
    z = (image.double()[:, None] - toy.mean) / toy.std[:, None]
    return torch.special.ndtri((posterior[..., None] * torch.special.ndtr(z)).sum(1).clamp(1e-12, 1 - 1e-12)).flatten()


def one_hot_texts(toy, tokens):
    return torch.nn.functional.one_hot(toy.index(tokens), len(toy.texts)).double()


# The true distribution, jointly and under every kind of condition


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("heun", "ancestral"),
        ("heun", "tau_leap"),
        ("heun", "first_hitting"),
        ("euler", "euler"),
        ("euler_sde", "tau_leap"),
        ("dpmpp_2m", "ancestral"),
    ],
)
def test_joint_sampling_draws_true_pairs(toy, fits, image, text):
    sampler, steps = GAUSSIAN[image]
    pairs = many(toy, steps=steps, samplers={"image": sampler, "text": Sampler(text)})
    assert fits.counts(toy.counts(pairs["text"]), toy.prob)
    assert fits.normal(toy.standardized(pairs))


def test_too_few_steps_fail_the_tests(toy, fits):
    """The tests above can fail: eight steps of Algorithm 5 are not enough."""
    pairs = many(toy, steps=8, samplers={"text": Sampler("ancestral")})
    assert not fits.counts(toy.counts(pairs["text"]), toy.prob)


def test_joint_error_falls_with_steps(toy):
    """Total variation distance of 20,000 texts: 0.10, 0.02, then the sampling noise, 0.008 ± 0.002."""
    errors, n = [], 20_000
    for steps in (4, 16, 64):
        share = toy.counts(many(toy, n=n, steps=steps)["text"]) / n
        errors.append(0.5 * (share - toy.prob).abs().sum().item())
    assert errors[0] > 2 * errors[1], errors
    assert errors[1] > errors[2], errors
    assert errors[2] < 0.016, errors


def test_joint_sampling_with_uniform_text(make_toy, fits):
    toy = make_toy(process=Uniform, t_min=1e-3, delta=1e-3)
    for method in ("tau_leap", "euler"):
        pairs = many(toy, steps=128, samplers={"text": Sampler(method)})
        assert fits.counts(toy.counts(pairs["text"]), toy.prob), method
        assert fits.normal(toy.standardized(pairs)), method


@pytest.mark.parametrize("image", GAUSSIAN)
def test_images_given_text(toy, fits, image):
    sampler, steps = GAUSSIAN[image]
    texts = toy.draw(N_PAIRS)["text"]
    pairs = many(toy, {"text": texts}, steps=steps, samplers={"image": sampler})
    assert torch.equal(pairs["text"], texts)
    assert fits.normal(toy.standardized(pairs))


@pytest.mark.parametrize("text", MASKED)
def test_text_given_images(toy, fits, text):
    images = toy.draw(N_PAIRS)["image"]
    pairs = many(toy, {"image": images}, steps=32, samplers={"text": Sampler(text)})
    posterior = toy.posterior({"image": images}, {"image": torch.zeros(N_PAIRS)})
    assert torch.equal(pairs["image"], images)
    assert fits.calibrated(one_hot_texts(toy, pairs["text"]), posterior)


def test_uniform_text_given_images(make_toy, fits):
    toy = make_toy(process=Uniform, t_min=1e-3, delta=1e-3)
    images = toy.draw(N_PAIRS)["image"]
    pairs = many(toy, {"image": images}, steps=128)
    posterior = toy.posterior({"image": images}, {"image": torch.zeros(N_PAIRS)})
    assert fits.calibrated(one_hot_texts(toy, pairs["text"]), posterior)


def test_images_given_half_masked_text(toy, fits):
    """The condition stays at its time: the image follows the mixture over the texts with these unmasked tokens."""
    level = 0.5
    pairs = many(toy, {"text": (toy.draw(N_PAIRS)["text"], level)}, steps=64)
    hidden = (pairs["text"] == toy.states).double().mean().item()
    assert abs(hidden - level) < 4 * 0.5 / math.sqrt(2 * N_PAIRS)  # 4σ: 1 seed in 16,000
    posterior = toy.posterior({"text": pairs["text"]}, {"text": torch.full((N_PAIRS,), level)})
    assert fits.normal(mixture_normal(toy, pairs["image"], posterior))


def test_text_given_half_noised_images(toy, fits):
    level = 0.3
    images = toy.draw(N_PAIRS)["image"]
    pairs = many(toy, {"image": (images, level)}, steps=32)
    assert not torch.equal(pairs["image"], images)
    posterior = toy.posterior({"image": pairs["image"]}, {"image": torch.full((N_PAIRS,), level)})
    assert fits.calibrated(one_hot_texts(toy, pairs["text"]), posterior)
    clean = toy.posterior({"image": images}, {"image": torch.zeros(N_PAIRS)})
    assert not fits.calibrated(one_hot_texts(toy, pairs["text"]), clean)


@pytest.mark.parametrize("text", ["tau_leap", "ancestral", "first_hitting"])
def test_text_observed_at_a_noise_time_and_image(toy, fits, text):
    """One text is masked to a time and its masked tokens are sampled: a mixture over the patterns of the mask."""
    time, start = 0.6, torch.tensor([0, 2])
    x = start.expand(N_PAIRS, 2)
    condition = Condition(x, time, mask=torch.ones_like(x, dtype=torch.bool))
    pairs = many(toy, {"text": condition}, steps=48, samplers={"text": Sampler(text)})
    p_masked = (1.0 - 1e-5) * time
    law = torch.zeros_like(toy.prob)
    for pattern in itertools.product((False, True), repeat=2):
        left = torch.where(torch.tensor(pattern), toy.states, start)[None]
        share = math.prod(p_masked if masked else 1 - p_masked for masked in pattern)
        law += share * toy.posterior({"text": left}, {"text": torch.full((1,), time)})[0]
    assert fits.counts(toy.counts(pairs["text"]), law)
    assert fits.normal(toy.standardized(pairs))


def test_images_observed_at_a_noise_time_keep_their_distribution(toy, fits):
    """Images of fixed texts, noised to time 0.2 and denoised: other images, with the distribution of their texts."""
    true = toy.draw(N_PAIRS)
    images, observed = true["image"], torch.ones(N_PAIRS, 2, dtype=torch.bool)
    pairs = many(toy, {"image": Condition(images, 0.2, observed), "text": true["text"]}, steps=64)
    assert torch.equal(pairs["text"], true["text"])
    assert fits.normal(toy.standardized(pairs))
    moved = (pairs["image"] - images).norm(dim=1)
    assert moved.mean() > 0.2
    assert moved.mean() < 0.7 * (images - images.roll(1, 0)).norm(dim=1).mean()


# Order in the number of steps


def true_flow(toy, x, tokens, text_time: float, steps: int = 512):
    """The probability-flow ODE from 1 to 0 by RK4 in float64, from the score; its error is 2e-8 at 512 steps."""

    def drift(x, t):
        times = {
            m: torch.full((len(x),), value, dtype=torch.float64) for m, value in (("image", t), ("text", text_time))
        }
        beta = toy.space["image"].schedule.beta(times["image"])[:, None]
        return -beta * (x + toy.score({"image": x, "text": tokens}, times))

    x, h = x.double(), 1.0 / steps
    for k in range(steps):
        t = 1.0 - k * h
        a = drift(x, t)
        b = drift(x - 0.5 * h * a, t - 0.5 * h)
        c = drift(x - 0.5 * h * b, t - 0.5 * h)
        d = drift(x - h * c, max(t - h, 0.0))
        x = x - h / 6.0 * (a + 2 * b + 2 * c + d)
    return x


def slope(steps, errors) -> float:
    """Least-squares order of error ∝ steps^−order."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (steps, errors))
    x, y = x - x.mean(), y - y.mean()
    return -((x * y).sum() / (x * x).sum()).item()


@pytest.mark.parametrize(
    ("method", "times", "order"),
    [
        ("heun", "linear", 2),
        ("euler", "linear", 1),
        ("dpmpp_2m", "logsnr", 2),
        ("dpmpp_2m", "rho", 2),
        ("heun", "logsnr", 2),
    ],
)
def test_order_on_the_probability_flow(toy, method, times, order):
    """Same initial noise; half-masked texts, so that the flow is not linear; the fitted slope is the order ± 0.15."""
    n = 32
    tokens = torch.tensor([[0, 1]]).expand(n, 2)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    steps, errors, truth = (128, 256, 512), [], None
    for count in steps:
        out = sample(
            toy.net,
            toy.space,
            {"text": (tokens, 0.5)},
            steps=count + 1,
            samplers={"image": Sampler(method, times)},
            uniforms={"image": torch.special.ndtr(noise.double())},
        )
        truth = true_flow(toy, noise, out["text"], 0.5) if truth is None else truth  # texts are masked the same way
        errors.append((out["image"] - truth).square().mean().sqrt().item())
    assert 0.25 < (out["text"] == toy.states).double().mean() < 0.75
    assert abs(slope(steps, errors) - order) < 0.15, errors
    assert errors[-1] < (5e-4 if order == 2 else 3e-3)


def test_dpmpp_extrapolates_over_uneven_steps():
    """With x̂₀ linear in λ = log(α/σ), every update after the first uses x̂₀ at the middle of its step."""
    process = Gaussian((2,), Linear(), 1e-3, time_conditioning="log_snr")
    times = torch.tensor([1.0, 0.7, 0.6, 0.2, 0.001, 0.0], dtype=torch.float64)
    alpha, sigma = process.schedule.alpha(times), process.schedule.sigma(times)
    lam = torch.log(alpha / sigma)

    def net(x, t, mask=None, outputs=None):
        log_snr = 8.0 * t["image"].double()[:, None]
        x0 = 0.3 + 0.05 * log_snr
        return {"image": (x["image"] - torch.sigmoid(log_snr).sqrt() * x0) / torch.sigmoid(-log_snr).sqrt()}

    samplers = {"image": Sampler("dpmpp_2m", times)}
    _, states = sample(net, Space({"image": process}), n=4, steps=5, samplers=samplers, trajectory=True)
    for k in range(4):
        at = lam[k] if k == 0 else (lam[k] + lam[k + 1]) / 2
        x0 = 0.3 + 0.1 * at
        gain = alpha[k + 1] * (1.0 - torch.exp(lam[k] - lam[k + 1]))
        expected = sigma[k + 1] / sigma[k] * states[k]["image"].double() + gain * x0
        torch.testing.assert_close(states[k + 1]["image"].double(), expected, rtol=0, atol=1e-3)
    last = torch.full((4, 2), (0.3 + 0.1 * lam[4]).item())
    torch.testing.assert_close(states[5]["image"], last, rtol=0, atol=1e-4)


def chain_law(toy, steps: int, rule: str) -> torch.Tensor:
    """(S,) exact distribution of the text after `steps` updates, by products of transition matrices in float64.

    From the definitions: per position P(move) = R e^{−R} (tau) or min(R, 1), R the total reverse rate times h,
    target ∝ rate; positions are independent given the state; the last update draws x₀.
    """
    process, k_ = toy.space["text"], toy.states
    masked = isinstance(process, Masked)
    symbols = k_ + masked
    states = torch.tensor(list(itertools.product(range(symbols), repeat=toy.length)))
    law = torch.zeros(len(states), dtype=torch.float64)
    if masked:
        law[-1] = 1.0
    else:
        law[:] = 1.0 / len(states)
    here = torch.nn.functional.one_hot(states, symbols).double()  # (states, L, symbols)
    times = time_grid(process, steps).tolist()
    for t, after in itertools.pairwise(times):
        p = toy.token_probs(toy.posterior({"text": states}, {"text": torch.full((len(states),), t).double()}))
        if masked:
            p = torch.nn.functional.pad(p, (0, 1))
            rate = torch.where((states == k_)[..., None], p / t, 0.0)
            final = torch.where((states == k_)[..., None], p, here)
        else:
            kept = 1.0 - (1.0 - process.schedule.delta) * t
            q = kept * torch.eye(k_, dtype=torch.float64) + (1.0 - kept) / k_  # q[u, v] = P(v | clean u)
            ratio = q[None, None] / q[:, states].permute(1, 2, 0)[..., None]  # q(v|u) / q(x|u)
            rate = (1.0 - process.schedule.delta) / kept / k_ * (p[..., None] * ratio).sum(2)
            rate, final = torch.where(here > 0, 0.0, rate), p
        total = (t - after) * rate.sum(-1, keepdim=True)
        move = total * torch.exp(-total) if rule == "tau_leap" else total.clamp(max=1.0)
        following = (1.0 - move) * here + move * rate / rate.sum(-1, keepdim=True).clamp(min=1e-300)
        if after == 0.0:
            following = final
        transition = following[:, 0]
        for i in range(1, toy.length):
            transition = (transition[:, :, None] * following[:, i][:, None]).flatten(1)
        law = law @ transition
    clean = (states < k_).all(1)
    assert law[~clean].abs().sum() < 1e-12
    return law[clean]


@pytest.mark.parametrize("process", [Masked, Uniform])
@pytest.mark.parametrize("rule", ["tau_leap", "euler"])
def test_order_of_discrete_samplers(make_toy, process, rule):
    """Total variation of the exact chain from the truth: first order in 1/N, slope within 0.08 over N = 32 … 256."""
    toy = make_toy(process=process, **({} if process is Masked else {"t_min": 1e-3, "delta": 1e-3}))
    steps = (32, 64, 128, 256)
    errors = [0.5 * (chain_law(toy, n, rule) - toy.prob).abs().sum().item() for n in steps]
    assert abs(slope(steps, errors) - 1.0) < 0.08, errors
    assert errors[-1] < 5e-3


@pytest.mark.parametrize(
    ("process", "rule", "steps"),
    [
        (Masked, "tau_leap", 3),
        (Masked, "euler", 3),
        (Masked, "ancestral", 3),
        (Uniform, "tau_leap", 8),
        (Uniform, "euler", 5),
    ],
)
def test_samplers_follow_that_chain(make_toy, fits, process, rule, steps):
    """With few steps the chain is measurably wrong: 20,000 texts follow the chain and not the truth."""
    toy = make_toy(process=process, **({} if process is Masked else {"t_min": 1e-3, "delta": 1e-3}))
    n = 20_000
    texts = sample(toy.net, toy.text_only(), n=n, batch_size=n, steps=steps, samplers={"text": Sampler(rule)})["text"]
    counts = toy.counts(texts)
    assert fits.counts(counts, chain_law(toy, steps, rule))
    assert not fits.counts(counts, toy.prob)


# Few steps


def test_tokens_at_given_uniforms_follow_the_distribution(make_toy, fits):
    """Independent uniforms give random texts; evenly spaced ones give every state as often as its probability says."""
    toy, n = make_toy(process=Masked), 20_000
    length = toy.text_only()["text"].shape[0]

    def texts(toy, u):
        options = {"steps": length, "samplers": {"text": Sampler("first_hitting")}, "uniforms": {"text": u}}
        return sample(toy.net, toy.text_only(), n=n, batch_size=n, **options)["text"]

    random = torch.rand(n, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert fits.counts(toy.counts(texts(toy, random)), toy.prob)
    single = make_toy(length=1)
    counts = single.counts(texts(single, (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n))
    assert (torch.as_tensor(counts).flatten() - n * torch.as_tensor(single.prob).flatten()).abs().max() <= 1.01


@pytest.mark.parametrize("method", ["tau_leap", "euler", "ancestral"])
def test_uniforms_of_masked_text_are_for_first_hitting(toy, method):
    options = {"n": 4, "samplers": {"text": Sampler(method)}, "uniforms": {"text": torch.full((4, 2), 0.5)}}
    with pytest.raises(ValueError, match=f"text: uniforms are for first_hitting, not for {method}"):
        sample(toy.net, toy.text_only(), steps=2, **options)


@pytest.mark.parametrize("method", ["ancestral", "first_hitting", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_token_is_exact_at_any_number_of_steps(make_toy, fits, method, steps):
    toy, n = make_toy(length=1), 10_000
    texts = sample(toy.net, toy.text_only(), n=n, batch_size=n, steps=steps, samplers={"text": Sampler(method)})["text"]
    assert fits.counts(toy.counts(texts), toy.prob)


@pytest.mark.parametrize("steps", [3, 7])
def test_first_hitting_is_exact_from_as_many_steps_as_tokens(make_toy, fits, steps):
    """Three correlated tokens; `ancestral` with as many steps is measurably wrong."""
    toy, n = make_toy(length=3), 20_000

    def counts(method):
        out = sample(toy.net, toy.text_only(), n=n, batch_size=n, steps=steps, samplers={"text": Sampler(method)})
        return toy.counts(out["text"])

    toy.calls.clear()
    assert fits.counts(counts("first_hitting"), toy.prob)
    assert len(toy.calls) == 3  # one evaluation a token, however many steps
    assert not fits.counts(counts("ancestral"), toy.prob)


@pytest.mark.parametrize("observed", [False, True])
def test_first_hitting_evaluates_at_the_hitting_times(make_toy, fits, observed):
    """The first of two masked tokens is unmasked at the larger of two uniforms on [0, 1], the second at the smaller.

    observed: the text has a third token, which is observed.
    """
    toy, n = make_toy(length=3 if observed else 2), 4000
    conditions = {}
    if observed:
        tokens = torch.tensor([[1, 0, 0]]).expand(n, 3)
        conditions["text"] = Condition(tokens, mask=torch.tensor([[True, False, False]]).expand(n, 3))
    options = {"batch_size": n, "steps": 5, "samplers": {"text": Sampler("first_hitting")}}
    sample(toy.net, toy.text_only(), conditions, n=n, **options)
    late, early = (call.t["text"].double() for call in toy.calls)
    assert fits.normal(torch.special.ndtri(late**2))
    assert fits.normal(torch.special.ndtri(1 - (1 - early) ** 2))
    assert bool((late >= early).all())


def test_first_hitting_counts_the_masked_tokens(make_toy, fits):
    """Two of three tokens are masked: two updates are enough, whatever the text's length; one is not."""
    toy, n = make_toy(length=3), 20_000
    tokens = torch.tensor([[1, toy.states, toy.states]])
    law = toy.posterior({"text": tokens}, {"text": torch.full((1,), 0.5)})[0]
    tokens = tokens.expand(n, 3)
    condition = Condition(tokens, mask=tokens != toy.states)

    def agrees(steps):
        options = {"batch_size": n, "steps": steps, "samplers": {"text": Sampler("first_hitting")}}
        counts = toy.counts(sample(toy.net, toy.text_only(), {"text": condition}, **options)["text"])
        assert counts[law == 0].sum() == 0
        return fits.counts(counts[law > 0], law[law > 0])

    assert agrees(2)
    assert not agrees(1)


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_no_mask_is_left(make_toy, method, steps):
    """From pure noise, and from a time below t_min, at which 60 of 4,000 tokens are masks."""
    toy, n = make_toy(t_min=0.05), 2000
    sampler = {"text": Sampler(method)}
    condition = Condition(toy.draw(n)["text"], 0.03, mask=torch.ones(n, 2, dtype=torch.bool))
    for conditions in (None, {"text": condition}, {"image": toy.draw(n)["image"]}):
        assert int(many(toy, conditions, n=n, steps=steps, samplers=sampler)["text"].max()) < toy.states
