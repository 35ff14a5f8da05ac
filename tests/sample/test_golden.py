"""Deterministic trajectories of the samplers against those of the official code."""

from __future__ import annotations

import pytest
import torch

from anystate.diffusion import Guidance
from anystate.model.official.text_image import load_official
from anystate.sample import sample


@pytest.mark.parametrize("case", ["plain", "guided", "guided_partial"])
def test_heun_trajectory(golden, close, case):
    """Text to image with the official noise and, where guided, the official noisy conditions in their order."""
    g, facts = golden.below(f"sampler/{case}/"), golden.config["facts"][f"sampler_{case}"]
    space, model = golden.official_space(), load_official(golden.below("weights/"))[0]
    conditions = iter(g.get("perturbed_tokens", []))
    space["text"].transition = lambda *_: next(conditions)
    # the official interval is open, ours closed: shrink it, so that only times strictly inside count
    inside = [t for t in g["time_grid"].tolist() if facts["guidance_left"] < t < facts["guidance_right"]]
    guidance = Guidance(facts["cfg_scale"], facts["guidance_final_time"], (min(inside) - 1e-6, max(inside) + 1e-6))
    calls = []

    def net(x, t, mask=None, outputs=None):
        calls.append(list(outputs))
        return model(x, t, mask, outputs)

    _, states = sample(
        net,
        space,
        {"text": g["cond"]},
        steps=facts["steps"],
        guidance=guidance,
        uniforms={"image": torch.special.ndtr(g["noise"].double())},
        trajectory=True,
    )
    assert len(calls) == facts["model_calls"]
    assert calls == [["image"]] * len(calls)
    assert next(conditions, None) is None
    for i, (state, expected) in enumerate(zip(states, g["traj64"], strict=True)):
        close(state["image"], expected, 1e-4 * expected.abs().max().item(), f"entry {i}")
        assert torch.equal(state["text"], g["cond"])
