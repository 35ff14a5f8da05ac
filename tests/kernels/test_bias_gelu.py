"""Bias and GELU, forward and backward."""

import pytest
import torch

from anystate.kernels import bias_gelu, reference


@pytest.fixture(autouse=True)
def blocks(small_blocks):
    """Tiles of a few rows and features, several runs."""
    small_blocks("bias_gelu", ROWS=4, COLUMNS=16, PROGRAMS=6)


@pytest.mark.parametrize("compiled_forward", [False, True])
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 float32", "bfloat16 bfloat16", "float16 float16"])
@pytest.mark.parametrize("shape", [(2, 9, 32), (3, 7, 24), (1, 1, 5), (17, 40)])
def test_bias_gelu(shape, dtypes, compiled_forward, random, check_gradients):
    dtype, bias_dtype = (getattr(torch, name) for name in dtypes.split())
    check_gradients(
        lambda *parts: bias_gelu(*parts, compiled_forward, backend="triton"),
        reference.bias_gelu,
        [3.0 * random(*shape, dtype=dtype), random(shape[-1], dtype=bias_dtype)],
    )


def test_tails(device):
    """Far from 0 the result is z or 0, and the slope 1 or 0."""
    x = torch.tensor([[-1e4, -60.0, -9.0, 9.0, 60.0, 1e4]], device=device, requires_grad=True)
    y = bias_gelu(x, torch.zeros(6, device=device), backend="triton")
    y.sum().backward()
    torch.testing.assert_close(y, x.detach().clamp(min=0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad, (x.detach() > 0).float(), rtol=0, atol=1e-6)


def test_transposed_and_expanded_gradients(random):
    x, bias = random(2, 8, 6).transpose(1, 2).requires_grad_(), random(8).requires_grad_()
    bias_gelu(x, bias, backend="triton").sum().backward()
    found, bias.grad, x.grad = (x.grad, bias.grad), None, None
    reference.bias_gelu(x, bias).sum().backward()
    torch.testing.assert_close(found, (x.grad, bias.grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 3, 8)])
def test_empty_inputs(shape, random):
    x, bias = random(*shape).requires_grad_(), random(8).requires_grad_()
    bias_gelu(x, bias, backend="triton").sum().backward()
    assert not bias.grad.any()


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    parts = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4,))]
    assert torch.autograd.gradcheck(reference.bias_gelu, parts)
