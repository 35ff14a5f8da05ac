"""adaLN modulation and the gated residual, forward and backward."""

import pytest
import torch

from anystate.kernels import adaln_modulate, gated_residual, reference

SHAPES = [(2, 9, 32), (3, 7, 24), (1, 1, 5)]


@pytest.fixture(autouse=True)
def blocks(small_blocks):
    """Tiles of a few rows, several runs per sample."""
    small_blocks("adaln", TILE=64, PROGRAMS=6)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "float16 float32", "float32 bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_adaln(shape, dtypes, plus_one, random, check_gradients):
    dtype, scale_dtype = (getattr(torch, name) for name in dtypes.split())
    rows = (shape[0], shape[2])
    check_gradients(
        lambda *parts: adaln_modulate(*parts, 1e-5, plus_one, backend="triton"),
        lambda *parts: reference.adaln_modulate(*parts, 1e-5, plus_one),
        [random(*shape, dtype=dtype), random(*rows, dtype=scale_dtype), random(*rows, dtype=scale_dtype)],
    )


@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "float32 bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual(shape, dtypes, random, check_gradients):
    dtype, branch_dtype = (getattr(torch, name) for name in dtypes.split())
    check_gradients(
        lambda *parts: gated_residual(*parts, backend="triton"),
        reference.gated_residual,
        [random(*shape, dtype=dtype), random(*shape, dtype=branch_dtype), random(shape[0], shape[2], dtype=dtype)],
    )


def test_slices_need_no_copy_and_transposes_work(random):
    """Scale, shift and gate are slices of one projection; x is a slice of a sequence."""
    sequence, modulation = random(2, 12, 24), random(2, 72)
    scale, shift, gate = modulation.chunk(3, -1)
    for x in (sequence[:, 3:9], sequence[:, ::2], random(2, 24, 6).transpose(1, 2)):
        ours, theirs = adaln_modulate(x, scale, shift, backend="triton"), reference.adaln_modulate(x, scale, shift)
        assert (ours - theirs).abs().max() < 1e-5
        ours, theirs = gated_residual(x, x * 2, gate, backend="triton"), reference.gated_residual(x, x * 2, gate)
        assert (ours - theirs).abs().max() < 1e-5


def test_expanded_upstream_gradient(random):
    """The upstream gradient of `sum()` has stride 0."""
    x, gate = random(2, 5, 8).requires_grad_(), random(2, 8).requires_grad_()
    gated_residual(x, x.detach(), gate, backend="triton").sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert (gate.grad - x.detach().sum(1)).abs().max() < 1e-5


def test_empty_sequence(random):
    x, rows = random(2, 0, 8).requires_grad_(), random(2, 8).requires_grad_()
    adaln_modulate(x, rows, rows, backend="triton").sum().backward()
    assert not rows.grad.any()


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    x, scale, shift = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 4), (2, 4)))
    assert torch.autograd.gradcheck(lambda *p: reference.adaln_modulate(*p, plus_one=True), (x, scale, shift))
    assert torch.autograd.gradcheck(reference.gated_residual, (x, (2 * x).detach().requires_grad_(), scale))
