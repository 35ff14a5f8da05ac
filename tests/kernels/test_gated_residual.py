"""The gated residual, forward and backward."""

import pytest
import torch

from anystate.kernels import gated_residual, reference

SHAPES = [(2, 9, 32), (3, 7, 24), (1, 1, 5), (1, 3, 300)]


@pytest.fixture(autouse=True)
def blocks(small_blocks):
    """Tiles of a few rows, several runs per sample."""
    small_blocks("row_tiles", TILE=64, PROGRAMS=6)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "float32 bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual(shape, dtypes, with_bias, random, check_gradients):
    dtype, branch_dtype = (getattr(torch, name) for name in dtypes.split())
    inputs = [random(*shape, dtype=dtype), random(*shape, dtype=branch_dtype), random(shape[0], shape[2], dtype=dtype)]
    inputs += [random(shape[2])] if with_bias else []
    check_gradients(lambda *parts: gated_residual(*parts, backend="triton"), reference.gated_residual, inputs)


def test_slices_need_no_copy_and_transposes_work(random):
    sequence, gate = random(2, 12, 24), random(2, 48)[:, 24:]
    for x in (sequence[:, 3:9], sequence[:, ::2], random(2, 24, 6).transpose(1, 2)):
        ours, theirs = gated_residual(x, x * 2, gate, backend="triton"), reference.gated_residual(x, x * 2, gate)
        assert (ours - theirs).abs().max() < 1e-5


def test_expanded_upstream_gradient(random):
    """The upstream gradient of `sum()` has stride 0."""
    x, gate = random(2, 5, 8).requires_grad_(), random(2, 8).requires_grad_()
    gated_residual(x, x.detach(), gate, backend="triton").sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert (gate.grad - x.detach().sum(1)).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 3, 8)])
def test_empty_inputs(shape, random):
    x, gate = random(*shape).requires_grad_(), random(shape[0], shape[2]).requires_grad_()
    bias = random(shape[2]).requires_grad_()
    gated_residual(x, x.detach(), gate, bias, backend="triton").sum().backward()
    assert not gate.grad.any()
    assert not bias.grad.any()


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    shapes = (2, 3, 4), (2, 3, 4), (2, 4), (4,)
    parts = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(reference.gated_residual, parts)
