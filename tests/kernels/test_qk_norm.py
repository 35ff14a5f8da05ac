"""Normalization and packing of q, k, v, forward and backward."""

import pytest
import torch

from anystate.kernels import qk_norm_pack, reference


@pytest.fixture(autouse=True)
def runs(small_blocks):
    small_blocks("qk_norm", PROGRAMS=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width", "lengths"), [(2, 8, (4, 3)), (3, 5, (1, 2, 4)), (1, 16, (5,))])
def test_forward_and_gradients(heads, width, lengths, dtype, random, check_gradients):
    n = len(lengths)
    inputs = [random(2, length, 3 * heads * width, dtype=dtype) for length in lengths]
    inputs += [random(heads, width) for _ in range(2 * n)]
    check_gradients(
        lambda *p: qk_norm_pack(p[:n], p[n : 2 * n], p[2 * n :], heads, backend="triton"),
        lambda *p: reference.qk_norm_pack(p[:n], p[n : 2 * n], p[2 * n :], heads),
        inputs,
    )


def test_slices_and_an_empty_stream(random):
    x, gammas = random(2, 9, 48), [random(2, 8)] * 2
    qkv = [x[:, 1:6], x[:, :0]]
    ours = qk_norm_pack(qkv, gammas, gammas, 2, backend="triton")
    for a, b in zip(ours, reference.qk_norm_pack(qkv, gammas, gammas, 2), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_zero_vectors(random):
    """For ‖q‖ = 0 the result is 0 and the gradient is finite."""
    x, gamma = torch.zeros_like(random(1, 2, 48)).requires_grad_(), random(2, 8)
    q, _, _ = qk_norm_pack([x], [gamma], [gamma], 2, backend="triton")
    q.sum().backward()
    assert not q.any()
    assert x.grad.isfinite().all()


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    parts = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 12), (2, 2), (2, 2))]
    assert torch.autograd.gradcheck(lambda x, gq, gk: reference.qk_norm_pack([x], [gq], [gk], 2), parts)
