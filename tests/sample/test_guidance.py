"""Noisy guidance against formulas evaluated with the exact network."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from anystate.diffusion import Gaussian, Guidance, Linear, LogLinear, Masked, Space, time_grid
from anystate.sample import Condition, Sampler, sample

N = 16


def noise(n: int = N) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(5))


def uniforms() -> dict[str, torch.Tensor]:
    """The uniforms from which images get the initial noise `noise()`."""
    return {"image": torch.special.ndtr(noise().double())}


def batches(toy) -> list[int]:
    return [call.batch for call in toy.calls]


@pytest.mark.parametrize("method", ["heun", "euler"])
def test_final_time_one_is_classifier_free_guidance(make_toy, method):
    """Image given text: every update from its formula, with the fully masked text in the second branch. δ = 1e-9, so
    that no token stays unmasked at time 1. float32 updates against float64: within 1e-4."""
    toy, w, steps = make_toy(delta=1e-9), 3.0, 12
    text = toy.draw(N)["text"]
    masks = torch.full_like(text, toy.states)
    schedule, times = toy.space["image"].schedule, time_grid(toy.space["image"], steps)

    def drift(x, t):
        at = {"image": t.expand(N), "text": torch.full((N,), 1e-5)}
        conditional = toy.net({"image": x, "text": text}, at, outputs=["image"])["image"]
        unconditional = toy.net({"image": x, "text": masks}, {**at, "text": torch.ones(N)}, outputs=["image"])["image"]
        eps = w * conditional + (1 - w) * unconditional
        return -schedule.beta(t) * (x - eps / schedule.sigma(t))

    x = noise().double()
    expected = [x]
    for t, after in itertools.pairwise(times):
        f = drift(x, t)
        ahead = x + (after - t) * f
        if method == "heun" and after > 0:
            ahead = x + 0.5 * (after - t) * (f + drift(ahead, after))
        x = ahead
        expected.append(x)
    _, states = sample(
        toy.net,
        toy.space,
        {"text": text},
        steps=steps,
        guidance=w,
        uniforms=uniforms(),
        samplers={"image": Sampler(method)},
        trajectory=True,
    )
    for state, x in zip(states, expected, strict=True):
        torch.testing.assert_close(state["image"].double(), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["ancestral", "tau_leap", "first_hitting"])
def test_guided_token_follows_the_mixed_log_probabilities(make_toy, fits, method):
    """One token given an image follows softmax(w log p(v|x) + (1 − w) log p(v)). False alarms: 1 seed in 10,000."""
    toy, w, n = make_toy(length=1), 2.0, 10_000
    image = torch.tensor([[0.4, -0.6]]).expand(n, 2)
    out = sample(
        toy.net, toy.space, {"image": image}, steps=4, guidance=w, batch_size=n, samplers={"text": Sampler(method)}
    )
    posterior = toy.posterior({"image": image[:1]}, {"image": torch.zeros(1)})[0]
    mixed = w * posterior.log() + (1 - w) * toy.prob.log()
    counts = toy.counts(out["text"])
    assert fits.counts(counts, torch.softmax(mixed, 0))
    assert not fits.counts(counts, posterior)


def test_guided_tau_leap_uses_the_true_total(make_toy):
    """After one of four updates a share 1 − R e^{−R} is still masked, R = (h/t) Σ p^w q^{1−w}; 4σ: 1 seed in 16,000."""
    toy, w, n = make_toy(length=1), 2.0, 10_000
    image = torch.tensor([[1.5, -1.5]]).expand(n, 2)
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    _, states = sample(
        toy.net,
        toy.space,
        {"image": image},
        steps=4,
        guidance=w,
        batch_size=n,
        samplers={"text": Sampler("tau_leap", times)},
        trajectory=True,
    )
    posterior = toy.posterior({"image": image[:1]}, {"image": torch.zeros(1)})[0]
    total = (w * posterior.log() + (1 - w) * toy.prob.log()).exp().sum().item()
    assert total > 1.3  # the test distinguishes it from 1
    r = 0.25 * total
    left = (states[1]["text"] == toy.states).double().mean().item()
    p = 1 - r * math.exp(-r)
    assert abs(left - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("final_time", [0.5, 0.2])
def test_a_condition_already_that_noisy_is_not_noised_further(toy, final_time):
    """Both branches are the same then, so guidance has no effect."""
    conditions = {"text": (toy.draw(N)["text"], 0.5)}
    plain = sample(toy.net, toy.space, conditions, steps=8)
    guided = sample(toy.net, toy.space, conditions, steps=8, guidance=Guidance(4.0, final_time))
    assert toy.calls[-1].batch == 2 * N
    torch.testing.assert_close(guided["image"], plain["image"], rtol=0, atol=1e-5)
    stronger = sample(toy.net, toy.space, conditions, steps=8, guidance=Guidance(4.0, 1.0))
    assert (stronger["image"] - plain["image"]).abs().max() > 0.1


@pytest.mark.parametrize("time", [0.0, 0.3])
def test_second_branch_sees_the_condition_noised_to_the_final_time(toy, time):
    """Masked shares within 4σ, 1 seed in 16,000 each; masked tokens stay masked; both branches have their times."""
    n = 4000
    guidance = Guidance(2.0, 0.6)
    out = sample(toy.net, toy.space, {"text": (toy.draw(n)["text"], time)}, steps=2, batch_size=n, guidance=guidance)
    assert len(toy.calls) == 3
    seen = []
    for call in toy.calls:
        first, second = call.x["text"].chunk(2)
        times = call.t["text"].double()
        assert torch.equal(first, out["text"])
        torch.testing.assert_close(times[:n], torch.full((n,), max(time, 1e-5)).double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(times[n:], torch.full((n,), 0.6).double(), rtol=1e-6, atol=0)
        assert torch.equal(*call.x["image"].chunk(2))
        assert torch.equal(*call.t["image"].chunk(2))
        assert bool((second[first == toy.states] == toy.states).all())
        share = (second == toy.states).double().mean().item()
        assert abs(share - 0.6) < 4 * math.sqrt(0.24 / (2 * n))
        seen.append(second)
    assert not torch.equal(seen[0], seen[1])  # afresh each time
    assert not torch.equal(seen[1], seen[2])


def test_gaussian_condition_is_noised_further_from_its_time(toy):
    """Image condition at time 0.1, noised further to 0.25: mean and variance in the second branch; 4σ bounds."""
    n = 4000
    image = torch.tensor([[1.0, -2.0]]).expand(n, 2)
    sample(toy.net, toy.space, {"image": (image, 0.1)}, steps=1, batch_size=n, guidance=Guidance(2.0, 0.25))
    (call,) = toy.calls
    alpha, sigma = toy.alpha_sigma(torch.tensor(0.25))
    z = (call.x["image"][n:].double() - alpha * image) / sigma
    assert z.mean(0).abs().max() < 4 / math.sqrt(n)
    assert (z.var(0) - 1).abs().max() < 4 * math.sqrt(2 / n)
    first = call.x["image"][:n].double() - toy.alpha_sigma(torch.tensor(0.1))[0] * image
    correlation = torch.corrcoef(torch.stack([first.flatten(), z.flatten()]))[0, 1]
    expected = alpha / toy.alpha_sigma(torch.tensor(0.1))[0] * toy.alpha_sigma(torch.tensor(0.1))[1] / sigma
    assert abs(correlation - expected) < 4 / math.sqrt(2 * n)  # more noise on top of the same noise


def test_scale_one_makes_no_second_branch(toy):
    sample(toy.net, toy.space, {"text": toy.draw(N)["text"]}, steps=4, guidance=Guidance(1.0, 0.5))
    assert batches(toy) == [N] * 7


def test_interval_is_closed_at_both_ends(toy):
    """Heun at 1, 0.75, 0.5, 0.25: an update is guided, in both its evaluations, if its time lies in the interval."""
    conditions = {"text": toy.draw(N)["text"]}
    samplers = {"image": Sampler("heun", torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))}
    expected = {
        (0.5, 0.75): [1, 1, 2, 2, 2, 2, 1],
        (0.0, 1.0): [2] * 7,
        (1.0, 1.0): [2, 2, 1, 1, 1, 1, 1],
        (0.0, 0.25): [1, 1, 1, 1, 1, 1, 2],
        (0.3, 0.4): [1] * 7,
    }
    for interval, branches in expected.items():
        toy.calls.clear()
        sample(toy.net, toy.space, conditions, steps=4, guidance=Guidance(3.0, 1.0, interval), samplers=samplers)
        assert batches(toy) == [N * b for b in branches], interval


def test_guidance_outside_its_interval_changes_nothing(toy):
    conditions = {"text": toy.draw(N)["text"]}
    samplers = {"image": Sampler("heun", torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))}
    options = {"steps": 4, "samplers": samplers, "trajectory": True}
    _, plain = sample(toy.net, toy.space, conditions, **options)
    _, guided = sample(toy.net, toy.space, conditions, guidance=Guidance(3.0, 1.0, (0.0, 0.5)), **options)
    for k in range(3):
        assert torch.equal(plain[k]["image"], guided[k]["image"])
    assert not torch.allclose(plain[3]["image"], guided[3]["image"], atol=1e-3)


def test_joint_guidance_changes_gaussian_modalities_only(toy):
    """From a half-observed text: the text is sampled as without guidance, the image by the combined ε. The first
    update, at time 1, has equal branches; the second one noises the observed token to a mask."""
    text = torch.tensor([[0, toy.states]]).expand(N, 2)
    conditions = {"text": Condition(text, mask=text != toy.states)}
    options = {"steps": 3, "uniforms": uniforms(), "trajectory": True}
    plain, guided = (sample(toy.net, toy.space, conditions, guidance=w, **options)[1] for w in (1.0, 3.0))
    for k in (1, 2):
        assert torch.equal(plain[k]["text"], guided[k]["text"])
    assert (plain[2]["image"] - guided[2]["image"]).abs().max() > 0.05
    assert batches(toy) == [N] * 5 + [2 * N] * 5
    assert [call.outputs for call in toy.calls[5:]] == [["image", "text"], ["image"]] * 2 + [["image", "text"]]
    second = toy.calls[7].x["text"][N:]
    assert bool((second == toy.states).double().mean() > 0.99)


def three_way() -> tuple[Space, object]:
    """A condition c that shifts a picture and a text: ε = x/2 − c, log p ∝ (c, 0, −c)."""
    space = Space(
        {
            "picture": Gaussian((2,), Linear(), 1e-3, time_conditioning="time"),
            "text": Masked(4, 3, LogLinear(), 1e-3),
            "c": Gaussian((1,), Linear(), 1e-3, time_conditioning="time"),
        }
    )

    def net(x, t, mask=None, outputs=None):
        c = x["c"]
        logits = (c * torch.tensor([1.0, 0.0, -1.0]))[:, None].expand(-1, 4, 3)
        predictions = {"picture": 0.5 * x["picture"] - c, "text": logits, "c": torch.zeros_like(c)}
        return {m: predictions[m] for m in outputs}

    return space, net


def test_conditional_sampling_guides_all_that_is_generated():
    """c = 1, second branch c ~ N(0, 1): guidance at w = 4 shifts the picture's first ε by about 3 (1 − c_σ) and makes
    the first token likelier: 0.67 → above 0.8."""
    space, net = three_way()
    n = 500
    runs = {
        w: sample(
            net,
            space,
            {"c": torch.ones(n, 1)},
            steps=1,
            guidance=w,
            batch_size=n,
            samplers={"picture": Sampler("euler")},
        )
        for w in (1.0, 4.0)
    }
    assert (runs[1.0]["picture"] - runs[4.0]["picture"]).abs().mean() > 0.5
    plain, guided = ((runs[w]["text"] == 0).double().mean().item() for w in (1.0, 4.0))
    assert abs(plain - math.e / (math.e + 1 + 1 / math.e)) < 0.05
    assert guided > plain + 0.1


def test_each_modality_may_have_its_own_scale():
    """{name: w}: the picture as with w, the text as without guidance; scales without effect are refused if all are."""
    space, net = three_way()
    conditions, samplers = {"c": torch.ones(64, 1)}, {"picture": Sampler("euler")}
    plain, both, one = (
        sample(net, space, conditions, steps=1, guidance=Guidance(w), samplers=samplers)
        for w in (1.0, 4.0, {"picture": 4.0})
    )
    assert torch.equal(one["picture"], both["picture"])
    assert torch.equal(one["text"], plain["text"])
    assert not torch.equal(both["text"], plain["text"])
    joint = {"n": 2, "steps": 1, "samplers": samplers}
    scales = {"picture": 4.0}, {"picture": 4.0, "text": 2.0}
    one, both = (sample(net, space, guidance=Guidance(w), **joint) for w in scales)
    assert torch.equal(one["text"], both["text"])
    with pytest.raises(ValueError, match="guidance needs a condition"):
        sample(net, space, guidance=Guidance({"text": 4.0}), **joint)  # without effect
    with pytest.raises(ValueError, match="guidance: unknown modality 'sound'"):
        sample(net, space, conditions, steps=1, guidance=Guidance({"sound": 4.0}))


def test_second_branch_keeps_what_is_not_a_condition():
    space, net = three_way()
    seen = []

    def spy(x, t, mask=None, outputs=None):
        seen.append((x, t))
        return net(x, t, mask, outputs)

    text = Condition(torch.zeros(N, 4, dtype=torch.int64), 0.5, mask=torch.ones(N, 4, dtype=torch.bool))
    sample(spy, space, {"c": torch.ones(N, 1), "text": text}, steps=2, guidance=3.0)
    for x, t in seen:
        for m in ("picture", "text"):
            assert torch.equal(*x[m].chunk(2))
            assert torch.equal(*t[m].chunk(2))
        assert not torch.equal(*x["c"].chunk(2))


@pytest.mark.parametrize(
    "bad",
    [
        {"interval": (0.8, 0.2)},
        {"interval": (-0.1, 0.5)},
        {"interval": (0.5, 1.1)},
        {"final_time": 0.0},
        {"final_time": 1.5},
    ],
)
def test_bad_guidance_is_refused(bad):
    with pytest.raises(ValueError, match="guidance"):
        Guidance(2.0, **bad)
