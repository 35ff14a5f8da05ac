"""Sampler steps of Gaussian modalities against the reference and float64."""

import pytest
import torch

from anystate import kernels
from anystate.kernels import reference

STEPS = ("heun_predict", "heun_correct", "sde_step", "dpmpp_2m", "dpmpp_2m first order")


def call(step, x, x_hat, eps, scalars, keys, **guidance):
    a, b, c, d, e = scalars
    arguments = {
        "heun_predict": (x, eps, a, b, c),
        "heun_correct": (x, x_hat, eps, a, b, c),
        "sde_step": (x, eps, a, b, c, keys),
        "dpmpp_2m": (x, eps, x_hat, a, b, d, e, a),
        "dpmpp_2m first order": (x, eps, None, a, b, d, e, None),
    }[step]
    name = step.split()[0]
    ours = getattr(kernels, name)(*arguments, **guidance, backend="triton")
    theirs = getattr(reference, name)(*arguments, **guidance)
    return (ours, theirs) if isinstance(ours, tuple) else ((ours,), (theirs,))


@pytest.mark.parametrize("guided", [None, 2.5, "rows"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_the_reference(step, guided, dtype, random, keys):
    shape = (3, 5, 7)
    x, x_hat = random(*shape), random(*shape)
    eps, uncond = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    positive = [random(3).abs().double() + 0.5 for _ in range(4)]
    scalars = [positive[0], positive[1].float(), -positive[2], positive[3], random(3)]
    weight = random(3).abs() if guided == "rows" else guided
    guidance = {} if guided is None else {"uncond": uncond, "guidance": weight}
    for ours, theirs in zip(*call(step, x, x_hat, eps, scalars, keys(3), **guidance), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("step", STEPS)
def test_half_precision_state_and_transposed_input(step, random, keys):
    x = random(2, 1030, 2, dtype=torch.bfloat16).transpose(1, 2)
    scalars = [torch.full((2,), value, device=x.device) for value in (0.5, 0.7, -0.1, 0.9, 0.2)]
    for ours, theirs in zip(*call(step, x, x + 1, x * 2, scalars, keys(2)), strict=True):
        assert ours.dtype == theirs.dtype
        # at most one rounding
        assert (ours - theirs).abs().max() <= 2.0**-7 * theirs.abs().max()


def test_scalar_arguments(random, keys):
    x = random(2, 6)
    ours = kernels.heun_predict(x, x, 0.5, torch.tensor(0.7), -0.1, backend="triton")
    assert (ours - reference.heun_predict(x, x, 0.5, 0.7, -0.1)).abs().max() < 1e-6


def test_empty_batch(random, keys):
    x, rows = random(0, 6), random(0)
    assert kernels.sde_step(x, x, rows, rows, rows, keys(0), backend="triton").shape == (0, 6)


def test_correcting_with_the_first_drift_changes_nothing(random):
    """With f₂ = f₁ the corrector equals the predictor."""
    x, eps = random(2, 9), random(2, 9)
    beta, sigma, dt = (torch.full((2,), value, device=x.device) for value in (0.0, 0.5, -0.1))
    x_hat = kernels.heun_predict(x, eps, beta, sigma, dt, backend="triton")
    assert torch.equal(x_hat, kernels.heun_correct(x, x_hat, eps, beta, sigma, dt, backend="triton"))
