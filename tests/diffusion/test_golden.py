"""Schedules, preconditioned outputs, losses and guidance against the official implementation."""

from __future__ import annotations

import pytest
import torch

from anystate import kernels
from anystate.diffusion import Guidance, LogLinear, ScaledLinear
from anystate.kernels import Rng, reference
from anystate.model.official.text_image import load_official


@pytest.fixture(scope="module")
def model(golden):
    return load_official(golden.below("weights/"))[0]


def log_scores(logits, states: int, t):
    """The official text output: [log p over the real states, raw mask logit] − log(eˢ − 1)."""
    raw = logits.values().double()
    whole = torch.cat([torch.log_softmax(raw[..., :states], -1), raw[..., states:]], -1)
    return whole - torch.log(torch.expm1(LogLinear(1e-5).total(t)))[:, None, None]


def test_schedules_in_double_precision(golden):
    t = golden["schedule/t"].double()
    vp, masked = ScaledLinear(), LogLinear(1e-5)
    ours = {
        "beta": vp.beta(t),
        "beta_int": vp.integral(t),
        "scale": vp.alpha(t),
        "mean_coef": vp.alpha(t),
        "std": vp.sigma(t),
        "variance": vp.sigma(t) ** 2,
        "edm_sigma": vp.sigma(t) / vp.alpha(t),
        "diffusion": torch.sqrt(2 * vp.beta(t)),
        "sigma": masked.rate(t),
        "sigma_int": masked.total(t),
    }
    for name, value in ours.items():
        torch.testing.assert_close(value, golden[f"schedule64/{name}"], rtol=1e-6, atol=0, msg=name)
    shift = torch.log(torch.expm1(masked.total(t)))  # crosses zero at t = ½
    torch.testing.assert_close(shift, golden["schedule64/esigm1_log"], rtol=1e-6, atol=1e-6)


def test_probability_flow_drift(golden, close):
    t, vp = golden["schedule/t"].double(), ScaledLinear()
    x, score = golden["schedule/x"], golden["schedule/score"]
    sigma = vp.sigma(t)
    eps = -score * sigma.float()[:, None, None, None]
    ours = reference.ode_drift(x, eps, vp.beta(t), sigma)
    expected = golden["schedule64/drift_probability"]
    close(ours, expected, 1e-5 * expected.abs().max().item(), "drift")


@pytest.mark.parametrize("section", ["precond", "precond_pad"])
def test_preconditioned_outputs(golden, close, model, section):
    pad = golden.config["model_a"]["pad_id_used_for_masks"]
    options = {"pad_id": pad, "attend_pads": False} if section == "precond_pad" else {}
    space = golden.official_space(**options)
    x = {"text": golden[f"{section}/tokens"], "image": golden[f"{section}/x"]}
    t = {"text": golden[f"{section}/t_disc"].double(), "image": golden[f"{section}/t_cont"].double()}
    with torch.no_grad():
        out = space.evaluate(model, x, t)
    close(space["image"].time_conditioning(t["image"]), golden[f"{section}/image_time"], 1e-4, "time input")
    close(out["image"], golden[f"{section}/out_cont"], 1e-4, "image")
    close(log_scores(out["text"], space["text"].states, t["text"]), golden[f"{section}/out_disc64"], 1e-4, "text")


@pytest.mark.parametrize("modality", ["continuous", "discrete", "multimodal"])
def test_losses_given_the_official_draws(golden, close, model, modality):
    space = golden.official_space()
    g = golden.below(f"loss/{modality}/")
    t = {"text": g["t_disc"].double(), "image": g["t_cont"].double()}
    xt = {"text": g["perturbed_tokens"], "image": g["perturbed_image"]}

    vp, masked = space["image"].schedule, space["text"].schedule
    alpha, sigma = (f(t["image"]).float()[:, None, None, None] for f in (vp.alpha, vp.sigma))
    close(alpha * g["image"] + sigma * g["noise"], g["perturbed_image"], 5e-5 * 10, "perturbed image")
    hidden = g["u_mask"] < masked.prob(t["text"]).float()[:, None]
    assert torch.equal(torch.where(hidden, space["text"].mask_id, g["tokens"]), g["perturbed_tokens"])

    with torch.no_grad():
        out = space.evaluate(model, xt, t)
        text = space["text"].loss(out["text"], g["tokens"], xt["text"], None).mean()
    image = (out["image"] - g["noise"]).square().mean()  # eps_mse redraws its own noise, so the formula here
    if "cont_loss" in g:
        torch.testing.assert_close(image, g["cont_loss"][0], rtol=2e-5, atol=0)
    if "disc_loss" in g:
        torch.testing.assert_close(text, g["disc_loss"][0], rtol=2e-5, atol=0)


@pytest.mark.parametrize("mode", ["continuous", "discrete", "multimodal"])
def test_noisy_guidance_given_the_official_draws(golden, close, model, mode):
    """continuous: the image guided by noised text; discrete: text by a noised image; multimodal: continuous, σ = 1."""
    space, c, g = golden.official_space(), golden.config["cfg"], golden.below(f"cfg/{mode}/")
    final_time = 1.0 if mode == "multimodal" else c["guidance_final_time"]
    condition, guided = ("image", "text") if mode == "discrete" else ("text", "image")
    x, t = {"text": g["tokens"], "image": g["x"]}, {"text": g["t_disc"].double(), "image": g["t_cont"].double()}

    def transition(value, s, later, keys):
        if condition == "text":
            prob = space["text"].schedule.prob(later.new_tensor(final_time))
            assert torch.equal(torch.where(g["u"] < prob, space["text"].mask_id, value), g["perturbed_tokens"])
            return g["perturbed_tokens"]
        vp, at = space["image"].schedule, later.new_tensor(final_time)
        return (vp.alpha(at) * value + vp.sigma(at) * g["noise"]).float()

    space[condition].transition = transition
    rng = Rng.for_batch(0, len(g["x"]))
    guidance = Guidance(c["scale"], final_time)
    t_condition = t[condition].clone()
    t[condition] = t[condition].clamp(max=final_time)  # officially the second branch's time is final_time even if s > σ
    with torch.no_grad():
        plain = space.evaluate(model, x, {**t, condition: t_condition})
        _, uncond = guidance.evaluate(space, model, x, t, ["image", "text"], [condition], rng)
    if guided == "image":
        ours = reference.guide(plain["image"], uncond["image"], c["scale"])
        close(ours, g["out_cont"], 1e-4, "guided image")
        close(log_scores(plain["text"], space["text"].states, t_condition), g["out_disc"], 2e-3, "text")
    else:
        states = space["text"].states
        both = [log_scores(out["text"], states, t["text"]) for out in (plain, uncond)]
        ours = c["scale"] * both[0] + (1 - c["scale"]) * both[1]
        close(ours[..., :states], g["out_disc"][..., :states], 2e-3, "guided text")
        close(plain["image"], g["out_cont"], 1e-4, "image")


@pytest.mark.parametrize(("section", "rule"), [("tau", "tau"), ("tau_model_like", "tau"), ("euler", "euler")])
def test_discrete_step_probabilities(golden, section, rule):
    """Our closed form equals the official one to 1e-5, and the official draws (20,000 a cell) agree with it.

    |z| < 4.5 for each of some 100 cells: a false alarm in 1 of 1,500 runs.
    """
    g, h = golden.below(f"{section}/"), golden.config["facts"]["tau_step_sizes"][section]
    states = g["score"].shape[-1] - 1
    masked, t = LogLinear(1e-5), g["t"].double()
    score = g["score"].double()[..., :states]
    masked_rows = g["x"] == states
    if section == "tau_model_like":  # Σp = 1: R = h/t
        ours = (h * masked.reverse_rate(t))[:, None].expand_as(g["rate"])
        torch.testing.assert_close(ours[masked_rows], g["rate"][masked_rows], rtol=1e-6, atol=0)
    else:  # float32 official rates are 2e-3 off at t = 1
        ours = (h * masked.rate(t))[:, None] * score.sum(-1)
        torch.testing.assert_close(ours[masked_rows], g["rate"][masked_rows], rtol=2e-3, atol=0)
    total = score.sum(-1)
    move = reference.move_probability(rule, g["rate"] / total, total)
    probs = torch.cat([score / total[..., None] * move[..., None], 1 - move[..., None]], -1)
    stay = torch.nn.functional.one_hot(g["x"], states + 1).double()
    probs = torch.where((g["x"] == states)[..., None], probs, stay)
    torch.testing.assert_close(probs, g["prob"], rtol=0, atol=1e-5)
    draws = golden.config["facts"][f"monte_carlo_{section}"]["draws"]
    spread = torch.sqrt(draws * probs * (1 - probs))
    cells = spread > 1e-9
    z = (g["counts"] - draws * probs)[cells] / spread[cells]
    assert z.abs().max() < 4.5


@pytest.mark.parametrize("section", ["tau", "tau_model_like"])
def test_our_draws_follow_the_official_probabilities(golden, section):
    """20,000 draws of `tau_leap` per cell against the golden probabilities; |z| < 4.5 as above."""
    g, h = golden.below(f"{section}/"), golden.config["facts"]["tau_step_sizes"][section]
    states, draws = g["score"].shape[-1] - 1, 20_000
    masked, t = LogLinear(1e-5), g["t"].double()
    score = g["score"][..., :states]
    total = score.sum(-1).double()
    for b in range(len(t)):
        # a position's total rate differs from 1/t in `tau`, so each position is its own sample with its own rate
        for position in range(score.shape[1]):
            if g["x"][b, position] != states:
                continue
            rate = (h * masked.rate(t[b]) * total[b, position]).expand(draws)
            logits = score[b, position].log().expand(draws, 1, states)
            tokens = torch.full((draws, 1), states)
            keys = Rng.for_batch(b * 100 + position, draws).keys("text", kernels.Draw.STEP)
            new = kernels.tau_leap(logits, tokens, rate, keys, states, "tau")
            counts = torch.bincount(new.flatten(), minlength=states + 1).double()
            probs = g["prob"][b, position]
            spread = torch.sqrt(draws * probs * (1 - probs)).clamp(min=1e-9)
            assert ((counts - draws * probs) / spread)[probs > 0].abs().max() < 4.5


@pytest.mark.parametrize("case", ["eps", "mid"])
def test_last_step_probabilities_are_the_normalized_scores(golden, close, case):
    """The official last step draws from weights proportional to the score: our `last` rule's law."""
    g = golden.below(f"denoise/{case}/")
    states = g["score"].shape[-1] - 1
    masked = g["x"] == states
    weights = g["probs"].double()[masked]
    ours = torch.softmax(g["score"].double()[..., :states].log(), -1)[masked]
    close(ours, weights / weights.sum(-1, keepdim=True), 1e-5, "denoise")
