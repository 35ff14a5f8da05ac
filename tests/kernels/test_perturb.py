"""Perturbation: kernels draw for draw against the reference, and the probabilities of the reference."""

import math

import pytest
import torch

from anystate.kernels import Draw, Rng, gaussian_perturb, mask_perturb, reference, uniform_perturb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4, 16, 16), (2, 5, 7), (4, 1)])
def test_gaussian(shape, dtype, random, keys, close):
    x, alpha, sigma = random(*shape, dtype=dtype), random(shape[0]).double(), random(shape[0]).abs()
    k = keys(shape[0])
    exact = reference.gaussian_perturb(x.double(), alpha, sigma, k)
    ours = gaussian_perturb(x, alpha, sigma, k, backend="triton")
    close(ours, reference.gaussian_perturb(x, alpha, sigma, k), exact, slack=4e-6)


def test_gaussian_of_a_transposed_input(random, keys):
    x = random(3, 5, 8).transpose(1, 2)
    a = torch.ones(3, device=x.device)
    ours = gaussian_perturb(x, a, a, keys(3), backend="triton")
    assert (ours - reference.gaussian_perturb(x, a, a, keys(3))).abs().max() < 1e-5


@pytest.mark.parametrize("prob", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [1, 13])
def test_tokens(prob, length, tokens, keys):
    x = tokens(4, length, high=9)
    p = torch.full((4,), prob, dtype=torch.float64, device=x.device)
    for op, reference_op in ((mask_perturb, reference.mask_perturb), (uniform_perturb, reference.uniform_perturb)):
        assert torch.equal(op(x, p, keys(4), 9, backend="triton"), reference_op(x, p, keys(4), 9))
    if prob == 1.0:
        assert (mask_perturb(x, p, keys(4), 9, backend="triton") == 9).all()
    if prob == 0.0:
        assert torch.equal(mask_perturb(x, p, keys(4), 9, backend="triton"), x)


def test_a_single_state(tokens, keys):
    x = tokens(2, 5, high=1)
    assert torch.equal(uniform_perturb(x, torch.ones(2, device=x.device), keys(2), 1, backend="triton"), x)


def test_empty(keys, tokens, random):
    assert mask_perturb(tokens(3, 0, high=4), 0.5, keys(3), 4, backend="triton").shape == (3, 0)
    assert gaussian_perturb(random(0, 4), 1.0, 1.0, keys(0), backend="triton").shape == (0, 4)


def test_probability():
    """The share of noised tokens is within five standard errors."""
    keys = Rng.for_batch(1, 100).keys("text", Draw.NOISE)
    x = torch.zeros(100, 1000, dtype=torch.int64)
    masked = (reference.mask_perturb(x, torch.full((100,), 0.3), keys, 7) == 7).double().mean()
    assert abs(masked - 0.3) < 5 * math.sqrt(0.3 * 0.7 / x.numel())
    counts = reference.uniform_perturb(x, torch.ones(100), keys, 7).flatten().bincount(minlength=7)
    assert ((counts / x.numel() - 1 / 7).abs() < 5 * math.sqrt(6 / 49 / x.numel())).all()
