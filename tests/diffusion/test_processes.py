"""Noising, losses and weightings against their formulas. Statistical bounds are 4σ per number (1 seed in 16,000)
or p > 1e-4, unless a test says otherwise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, kstest

from anystate.diffusion import (
    Cosine,
    Gaussian,
    Linear,
    LogLinear,
    Masked,
    ScaledLinear,
    Space,
    TimeSampler,
    Uniform,
    Weighting,
)
from anystate.kernels import Draw, LazyLogits, Rng, normal
from anystate.kernels.backend import use_backend

N = 20_000


def keys(n: int, draw: Draw = Draw.NOISE, seed: int = 0) -> torch.Tensor:
    return Rng.for_batch(seed, n).keys("x", draw)


def times(value: float, n: int = N) -> torch.Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def rand(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(n: int, length: int, states: int) -> torch.Tensor:
    return torch.randint(states, (n, length), generator=torch.Generator().manual_seed(0))


# Noising


@pytest.mark.parametrize("schedule", [ScaledLinear(), Linear(), Cosine()])
@pytest.mark.parametrize("t", [1e-5, 0.3, 1.0])
def test_gaussian_perturbation(schedule, t):
    """(x_t − α x₀)/σ is standard normal and independent of x₀."""
    process, x0 = Gaussian((3,), schedule), 2.0 + rand(N, 3)
    xt = process.perturb(x0, times(t), keys(N)).double()
    alpha, sigma = schedule.alpha(times(t, 1)), schedule.sigma(times(t, 1))
    z = (xt - alpha * x0) / sigma
    if t > 1e-3:  # below, float32 data cannot hold x_t − α x₀ to the last digits
        assert kstest(z.flatten().numpy(), "norm").pvalue > 1e-4
        assert torch.corrcoef(torch.stack([z.flatten(), x0.flatten().double()]))[0, 1].abs() < 4 / math.sqrt(3 * N)
    assert abs(z.std().item() - 1) < 4 / math.sqrt(6 * N)
    assert abs(z.mean().item()) < 4 / math.sqrt(3 * N) + 1e-3


@pytest.mark.parametrize("levels", [(0.2, 0.5), (0.2, 1.0), (0.5, 0.5)])
def test_gaussian_transitions_compose(levels):
    """perturb(s) then transition(s → t) is distributed as perturb(t)."""
    s, t = levels
    process, x0 = Gaussian((2,), Linear()), rand(N, 2)
    xs = process.perturb(x0, times(s), keys(N, Draw.CONDITION))
    xt = process.transition(xs, times(s), times(t), keys(N, Draw.GUIDANCE))
    z = (xt.double() - process.schedule.alpha(times(t, 1)) * x0) / process.schedule.sigma(times(t, 1))
    assert kstest(z.flatten().numpy(), "norm").pvalue > 1e-4
    assert torch.equal(xs, xt) == (s == t)


@pytest.mark.parametrize("t", [1e-5, 0.1, 0.7, 1.0])
def test_masked_share(t):
    process, x0 = Masked(5, 7, LogLinear(1e-3)), tokens(N, 5, 7)
    xt = process.perturb(x0, times(t), keys(N))
    hidden = xt == process.mask_id
    p = (1 - 1e-3) * t
    assert abs(hidden.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / (5 * N)) + 1e-12
    assert torch.equal(torch.where(hidden, x0, xt), x0)
    if 0.01 < t < 1:  # positions are independent of each other: χ² of the number hidden against the binomial
        from scipy.stats import binom

        counts = torch.bincount(hidden.sum(1), minlength=6)
        assert chisquare(counts.numpy(), N * binom.pmf(range(6), 5, p)).pvalue > 1e-4


def test_times_differ_between_samples_of_a_batch():
    """A batch with its own time per row: each row of 5,000 positions has its own masked share."""
    process, t = Masked(5000, 3, LogLinear()), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    xt = process.perturb(torch.zeros(3, 5000, dtype=torch.int64), t, keys(3))
    share = (xt == 3).double().mean(1)
    assert ((share - t).abs() < 4 * torch.sqrt(t * (1 - t) / 5000)).all()


@pytest.mark.parametrize("levels", [(0.2, 0.5), (0.3, 1.0), (0.4, 0.4), (0.0, 0.6)])
def test_masked_transitions_compose(levels):
    s, t = levels
    process, x0 = Masked(4, 3, LogLinear(1e-3)), tokens(N, 4, 3)
    xs = process.perturb(x0, times(s), keys(N, Draw.CONDITION))
    xt = process.transition(xs, times(s), times(t), keys(N, Draw.GUIDANCE))
    p = (1 - 1e-3) * t
    assert abs((xt == 3).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / (4 * N))
    assert bool((xt[xs == 3] == 3).all())


@pytest.mark.parametrize("t", [0.2, 0.6, 1.0])
def test_uniform_perturbation(t):
    """χ² of all K states: e^{−s} more on the clean one, (1 − e^{−s})/K on every one."""
    process, k, delta = Uniform(3, 5, LogLinear(1e-3)), 5, 1e-3
    x0 = torch.full((N, 3), 2)
    xt = process.perturb(x0, times(t), keys(N))
    kept = 1 - (1 - delta) * t
    expected = torch.full((k,), (1 - kept) / k, dtype=torch.float64)
    expected[2] += kept
    assert chisquare(torch.bincount(xt.flatten(), minlength=k).numpy(), (3 * N * expected).numpy()).pvalue > 1e-4


def test_uniform_transitions_compose():
    process, k = Uniform(3, 5, LogLinear(1e-3)), 5
    x0 = torch.full((N, 3), 2)
    direct = process.perturb(x0, times(0.6), keys(N))
    halfway = process.perturb(x0, times(0.25), keys(N, Draw.CONDITION))
    composed = process.transition(halfway, times(0.25), times(0.6), keys(N, Draw.GUIDANCE))
    table = torch.stack([torch.bincount(x.flatten(), minlength=k) for x in (direct, composed)])
    assert chi2_contingency(table.numpy()).pvalue > 1e-4


def test_priors():
    gaussian = Gaussian((2, 3, 3), Linear()).prior(2000, keys(2000, Draw.PRIOR))
    assert gaussian.shape == (2000, 2, 3, 3)
    assert kstest(gaussian.flatten().numpy(), "norm").pvalue > 1e-4
    assert bool((Masked(4, 3, LogLinear()).prior(5, keys(5)) == 3).all())
    uniform = Uniform(4, 6, LogLinear()).prior(N, keys(N))
    assert chisquare(torch.bincount(uniform.flatten(), minlength=6).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("process", [Gaussian((4,), Linear()), Masked(4, 3, LogLinear()), Uniform(4, 3, LogLinear())])
def test_time_zero_is_clean(process):
    x = rand(50, 4) if isinstance(process, Gaussian) else tokens(50, 4, 3)
    assert torch.equal(process.perturb(x, times(0.0, 50), keys(50)), x)


# Losses


def test_gaussian_loss_regenerates_its_noise():
    """Zero for the true ε, the mean squared error for any other prediction; ε is (x_t − α x₀)/σ."""
    process, x0, t = Gaussian((2, 4, 4), Cosine()), rand(6, 2, 4, 4), torch.linspace(0.1, 1, 6, dtype=torch.float64)
    xt = process.perturb(x0, t, keys(6))
    alpha, sigma = (f(t).float()[:, None, None, None] for f in (process.schedule.alpha, process.schedule.sigma))
    eps = (xt - alpha * x0) / sigma
    torch.testing.assert_close(eps, normal(keys(6), 32).view_as(x0), rtol=0, atol=1e-5)
    assert process.loss(eps, x0, xt, keys(6)).max() < 1e-9
    prediction = rand(6, 2, 4, 4, seed=1)
    expected = (prediction - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(process.loss(prediction, x0, xt, keys(6)), expected, rtol=1e-4, atol=0)


def test_v_prediction_is_converted_to_epsilon():
    process, x0 = Gaussian((8,), Cosine(), prediction_type="v_prediction"), rand(6, 8)
    t = torch.linspace(0.01, 1, 6, dtype=torch.float64)
    eps, alpha, sigma = rand(6, 8, seed=1), process.schedule.alpha(t)[:, None], process.schedule.sigma(t)[:, None]
    xt = (alpha * x0 + sigma * eps).float()
    v = (alpha * eps - sigma * x0).float()
    torch.testing.assert_close(process.to_prediction(v, xt, t), eps, rtol=0, atol=1e-5)


class TestCrossEntropy:
    """Losses of discrete processes for every kind of head, against float64 by hand, from tensors and lazy logits."""

    length, states, n = 5, 4, 7

    def setup_method(self):
        self.x0 = tokens(self.n, self.length, self.states)
        self.xt = torch.where(rand(self.n, self.length) > 0, self.states, self.x0)
        self.hidden = self.xt == self.states

    def head(self, columns: int) -> LazyLogits:
        return LazyLogits(rand(self.n, self.length, 8, seed=1), rand(columns, 8, seed=2), rand(columns, seed=3))

    def by_hand(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        log_p = torch.log_softmax(values[..., :columns].double(), -1)
        return -log_p.gather(-1, self.x0[..., None]).squeeze(-1)

    def check(self, process, columns: int, expected) -> None:
        for out in (self.head(columns), self.head(columns).values()):
            loss = process.loss(out, self.x0, self.xt, None)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)

    def test_all_positions(self):
        rows = self.by_hand(self.head(4).values(), 4)
        self.check(Masked(self.length, self.states, LogLinear()), 4, rows.mean(1))

    def test_masked_positions(self):
        rows = self.by_hand(self.head(4).values(), 4) * self.hidden
        self.check(Masked(self.length, self.states, LogLinear(), loss_on="masked"), 4, rows.sum(1) / self.length)

    @pytest.mark.parametrize("loss_on", ["all", "masked"])
    def test_mask_logit_ignored(self, loss_on):
        values = self.head(5).values().double()
        rows = self.by_hand(values, 4) + torch.log1p(values[..., 4].exp())
        rows = rows * self.hidden if loss_on == "masked" else rows
        process = Masked(self.length, self.states, LogLinear(), loss_on=loss_on, mask_logit="ignored")
        self.check(process, 5, rows.mean(1))

    @pytest.mark.parametrize("loss_on", ["all", "masked"])
    def test_mask_logit_kept(self, loss_on):
        rows = self.by_hand(self.head(5).values(), 5)
        rows = rows * self.hidden if loss_on == "masked" else rows
        self.check(Masked(self.length, self.states, LogLinear(), loss_on=loss_on, mask_logit="kept"), 5, rows.mean(1))

    def test_uniform(self):
        self.xt = self.x0
        self.check(Uniform(self.length, self.states, LogLinear()), 4, self.by_hand(self.head(4).values(), 4).mean(1))


SUMS = {
    "all": lambda n, k: Masked(n, k, LogLinear()),
    "masked": lambda n, k: Masked(n, k, LogLinear(), loss_on="masked"),
    "ignored": lambda n, k: Masked(n, k, LogLinear(), mask_logit="ignored"),
    "masked and ignored": lambda n, k: Masked(n, k, LogLinear(), loss_on="masked", mask_logit="ignored"),
    "kept": lambda n, k: Masked(n, k, LogLinear(), mask_logit="kept"),
    "balanced": lambda n, k: Masked(n, k, LogLinear(), loss_on="masked", balanced=True),
    "uniform": lambda n, k: Uniform(n, k, LogLinear()),
}
WEIGHTED = [(name, kind) for name in list(SUMS)[:5] for kind in ("none", "elbo", "learned")]
WEIGHTED += [("balanced", "balanced"), ("uniform", "none"), ("uniform", "learned")]


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "logits"])
@pytest.mark.parametrize("partly", [False, True], ids=["free", "observed"])
@pytest.mark.parametrize(("name", "weighting"), WEIGHTED)
def test_weighted_sums_do_not_depend_on_when_gradients_are_computed(name, weighting, partly, lazy, monkeypatch):
    """Sum, losses and gradients with the kernels, which compute gradients in the forward pass where the weights are
    known, and with the reference, which equals the formula bit for bit."""
    n, length, states = 3, 4, 5
    process = SUMS[name](length, states)
    weigh = Weighting(process, weighting, 0.3)
    x0, masked = tokens(n, length, states), rand(n, length) > 0
    masked[1] = False
    xt = torch.where(masked, states, x0) if isinstance(process, Masked) else tokens(n, length, states)
    observed = (rand(n, length, seed=5) > 0.5) & ~masked if partly else None
    t, mask = torch.tensor([0.3, 0.9, 0.5], dtype=torch.float64), torch.tensor([1.0, 1.0, 0.0])
    parts = [rand(n, length, 8, seed=1), rand(states + 1, 8, seed=2), rand(states + 1, seed=3)]
    at_once = []
    sums = LazyLogits.cross_entropy_sum
    monkeypatch.setattr(LazyLogits, "cross_entropy_sum", lambda *args: at_once.append(1) or sums(*args))
    results = {}
    for backend in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in parts]
        out = LazyLogits(*leaves) if lazy else LazyLogits(*leaves).values()
        with use_backend(backend):
            total, loss = weigh.sum(t, mask, out, x0, xt, None, observed)
            plain = process.loss(out, x0, xt, None, observed)
        assert not loss.requires_grad
        results[backend] = [total, loss, *torch.autograd.grad(0.7 * total, leaves)]
        if backend == "reference":
            assert torch.equal(loss, plain)
            assert torch.equal(total, (weigh(plain, t) * mask).sum())
            assert not at_once
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-5)
    assert len(at_once) == (lazy and weigh.kind != "learned")


def test_sums_without_gradients_compute_none(monkeypatch):
    process = Masked(4, 5, LogLinear())
    monkeypatch.setattr(LazyLogits, "cross_entropy_sum", None)
    out = LazyLogits(rand(3, 4, 8).requires_grad_(), rand(5, 8), rand(5))
    with torch.no_grad(), use_backend("triton"):
        total, loss = Weighting(process).sum(times(0.5, 3), torch.ones(3), out, *[tokens(3, 4, 5)] * 2, None, None)
    torch.testing.assert_close(total, loss.sum())


def test_space_losses_evaluate_the_network_at_each_modality_s_time():
    """The network is evaluated at x_t with the time conditioning, and the loss uses the noise of x_t."""
    space = Space({"image": Gaussian((2,), Cosine(), time_conditioning="log_snr"), "text": Masked(4, 3, LogLinear())})
    x0 = {"image": rand(9, 2), "text": tokens(9, 4, 3)}
    rng = Rng.for_batch(5, 9)
    t, _ = TimeSampler()(space, rng)
    seen = {}

    def net(x, time, mask=None, outputs=None):
        seen.update(x=x, time=time, outputs=outputs)
        alpha, sigma = (f(t["image"])[:, None] for f in (space["image"].schedule.alpha, space["image"].schedule.sigma))
        truth = (x["image"] - alpha * x0["image"]) / sigma
        return {"image": truth + 2.0, "text": torch.zeros(9, 4, 3)}

    losses = space.losses(net, x0, t, rng)
    torch.testing.assert_close(losses["image"].float(), torch.full((9,), 4.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(losses["text"], torch.full((9,), math.log(3)))
    assert all(torch.equal(value, space.perturb(x0, t, rng)[m]) for m, value in seen["x"].items())
    torch.testing.assert_close(seen["time"]["text"], t["text"].float())
    torch.testing.assert_close(seen["time"]["image"], (space["image"].schedule.log_snr(t["image"]) / 8).float())
    assert list(space.losses(net, x0, t, rng, ["text"])) == ["text"]
    assert seen["outputs"] == ["text"]


@pytest.mark.parametrize("weight", ["elbo", "balanced"])
def test_elbo_weighted_masked_loss_is_the_entropy(weight):
    """With the exact network, ∫ (1/t) E[Σ masked −log p(x₀)] dt is the entropy of the text (two correlated tokens).

    100,000 low-discrepancy times; the bound is 4 standard errors of the mean.
    """
    n, prob = 100_000, torch.softmax(2.0 * rand(3, 3).double(), 1) / 3
    rows = torch.multinomial(prob.flatten(), n, True, generator=torch.Generator().manual_seed(1))
    x0 = torch.stack([rows // 3, rows % 3], 1)
    process = Masked(2, 3, LogLinear(1e-9), t_min=1e-6, loss_on="masked", balanced=weight == "balanced")

    def net(x, t, mask=None, outputs=None):
        a, b = x["text"].T
        fits = lambda token, axis: torch.cat([torch.eye(3), torch.ones(1, 3)])[token].unsqueeze(axis).double()  # noqa: E731
        joint = prob * fits(a, 2) * fits(b, 1)
        marginals = torch.stack([joint.sum(2), joint.sum(1)], 1)
        return {"text": torch.log(marginals.clamp(min=1e-30))}

    space, rng = Space({"text": process}), Rng.for_batch(0, n)
    t, _ = TimeSampler()(space, rng)
    loss = space.losses(net, {"text": x0}, t, rng)["text"]
    terms = 2 * Weighting(process, weight)(loss, t["text"]).double()
    entropy = -(prob * prob.log()).sum().item()
    assert abs(terms.mean().item() - entropy) < 4 * terms.std().item() / math.sqrt(n)
    assert terms.std().item() / math.sqrt(n) < 0.03


def test_balanced_positions_have_the_mean_weight_of_all_times():
    """The mean of the ELBO's weight 1/t over the times at which a pattern of masks occurs is (n + 1)/k: by integrating
    over t, for every pattern of 4 positions, of which one may be observed."""
    process = Masked(4, 3, LogLinear(), loss_on="masked", balanced=True)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    x0, logits = tokens(1, 4, 3), rand(1, 4, 3)
    rows = torch.nn.functional.cross_entropy(logits[0], x0[0], reduction="none")
    for pattern in itertools.product([False, True], repeat=4):
        masked = torch.tensor([pattern])
        for observed in (None, torch.tensor([[True, False, False, False]]) & ~masked):
            n = 4 if observed is None else int((~observed).sum())
            k = int(masked.sum())
            chance = t**k * (1 - t) ** (n - k)
            weight = float((chance / t).mean() / chance.mean()) if k else 0.0
            xt = torch.where(masked, process.mask_id, x0)
            loss = process.loss(logits, x0, xt, keys(1), observed)
            torch.testing.assert_close(float(loss), weight * float((rows * masked[0]).sum() / 4), rtol=1e-4, atol=1e-7)


# Weightings

T = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)


def test_weighting_none():
    loss = rand(50).abs()
    torch.testing.assert_close(Weighting(Gaussian((2,), Linear()), "none", 0.3)(loss, T), 0.3 * loss)


@pytest.mark.parametrize("schedule", [Linear(), ScaledLinear(), Cosine()])
def test_gaussian_elbo_weight_is_half_the_slope_of_log_snr(schedule):
    t = T.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    torch.testing.assert_close(Weighting(Gaussian((2,), schedule), "elbo").weight(T), -0.5 * slope, rtol=1e-10, atol=0)


def test_masked_elbo_weight_is_one_over_t():
    torch.testing.assert_close(Weighting(Masked(2, 3, LogLinear()), "elbo").weight(T), 1 / T)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight(gamma):
    schedule = Cosine()
    snr = (schedule.alpha(T) / schedule.sigma(T)) ** 2
    expected = torch.clamp(snr, max=gamma) / snr
    torch.testing.assert_close(Weighting(Gaussian((2,), schedule), "min_snr", gamma=gamma).weight(T), expected)
    assert expected.min() < 0.1
    assert expected.max() == 1.0


def test_learned_weighting_converges_to_the_loss():
    """Minimizing loss/eᵘ + u drives eᵘ to the loss at every time; at the start it is the loss itself."""
    weighting = Weighting(Gaussian((2,), Linear()), "learned", scale=2.0)
    loss = (0.5 + 2.0 * T**2).float()
    torch.testing.assert_close(weighting(loss, T), 2.0 * loss)
    optimizer = torch.optim.Adam(weighting.parameters(), 0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        weighting(loss, T).mean().backward()
        optimizer.step()
    with torch.no_grad():
        u = weighting(torch.zeros(50), T) / 2.0
    assert ((u.exp() - loss).abs() / loss).max() < 0.1
    clean = torch.autograd.grad(weighting(loss.requires_grad_(), T).sum(), loss)[0]
    torch.testing.assert_close(clean, 2.0 * torch.exp(-u))


def test_invalid_weightings_are_refused():
    for process, kind, message in (
        (Gaussian((2,), Linear()), "magic", "weighting must be one of"),
        (Masked(2, 3, LogLinear()), "min_snr", "min_snr is for Gaussian"),
        (Uniform(2, 3, LogLinear()), "elbo", "not defined for the uniform process"),
    ):
        with pytest.raises(ValueError, match=message):
            Weighting(process, kind)


# Checks


SPACE = Space({"image": Gaussian((1, 2, 2), Linear()), "text": Masked(3, 4, LogLinear())})
BAD = {
    "unknown": ({"sound": torch.zeros(1, 3)}, "unknown modality 'sound'; this space has image, text"),
    "size": ({"image": torch.zeros(1, 1, 2, 3)}, r"image: expected samples of shape \(1, 2, 2\), got \(1, 2, 3\)"),
    "no batch": ({"text": torch.zeros(3, dtype=torch.int64)}, r"text: expected samples of shape \(3,\), got \(\)"),
    "integers": ({"image": torch.zeros(1, 1, 2, 2, dtype=torch.int64)}, "image: expected a floating tensor"),
    "floats": ({"text": torch.zeros(1, 3)}, "text: expected int64 tokens, got torch.float32"),
    "mask": ({"text": torch.tensor([[0, 1, 4]])}, r"text: tokens must lie in \[0, 4\), got 0 to 4"),
    "negative": ({"text": torch.tensor([[0, 1, -1]])}, r"text: tokens must lie in \[0, 4\), got -1 to 1"),
    "batch sizes": (
        {"image": torch.zeros(2, 1, 2, 2), "text": torch.zeros(3, 3, dtype=torch.int64)},
        "modalities differ in batch size: .*2.*3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_data_outside_the_space_is_refused(case):
    x, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        SPACE.check(x)


def test_data_inside_the_space_passes():
    SPACE.check({"image": torch.zeros(2, 1, 2, 2), "text": torch.tensor([[0, 3, 1], [2, 2, 2]])})


def test_impossible_processes_are_refused():
    for make in (
        lambda: Masked(0, 3, LogLinear()),
        lambda: Masked(3, 0, LogLinear()),
        lambda: Masked(3, 3, LogLinear(), loss_on="some"),
        lambda: Masked(3, 3, LogLinear(), mask_logit="other"),
        lambda: Masked(3, 3, LogLinear(), attend_pads=False),
        lambda: Gaussian((2,), Linear(), time_conditioning="clock"),
        lambda: Gaussian((2,), Linear(), prediction_type="x"),
        lambda: Space({}),
    ):
        with pytest.raises(ValueError):
            make()


def test_key_masks_are_passed_to_the_network():
    """Keys whose current token is the pad are hidden; a pad that has become a mask is attended to."""
    hiding = Masked(4, 5, LogLinear(), pad_id=0, attend_pads=False)
    x = {"text": torch.tensor([[1, 5, 0, 0], [0, 2, 5, 3]])}
    seen = []

    def net(x, t, mask=None, outputs=None):
        seen.append(mask)
        return {}

    Space({"text": hiding}).evaluate(net, x, {"text": times(0.5, 2)})
    assert torch.equal(seen[0]["text"], torch.tensor([[True, True, False, False], [False, True, True, True]]))
    Space({"text": Masked(4, 5, LogLinear(), pad_id=0)}).evaluate(net, x, {"text": times(0.5, 2)})
    assert seen[1] is None


def test_network_input_of_times_below_t_min():
    seen = {}
    space = Space({"image": Gaussian((2,), Cosine(), 1e-2), "text": Masked(3, 3, LogLinear(), 1e-2)})
    x = {"image": rand(2, 2), "text": tokens(2, 3, 3)}
    space.evaluate(lambda x, t, **_: seen.update(t) or {}, x, {m: torch.tensor([0.0, 0.5]).double() for m in x})
    torch.testing.assert_close(seen["text"], torch.tensor([1e-2, 0.5]))
    torch.testing.assert_close(seen["image"], Cosine().sigma(torch.tensor([1e-2, 0.5]).double()).float())
