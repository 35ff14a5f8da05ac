"""Normalization and packing of q, k, v, forward and backward."""

import pytest
import torch

from anystate.kernels import Packing, qk_norm_pack, reference


@pytest.fixture(autouse=True)
def runs(small_blocks):
    small_blocks("qk_norm", PROGRAMS=3, ELEMENTS=64)


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


@pytest.fixture
def mask(device):
    """Samples without padding, with padding at the end, with padding in between, and without any key."""
    mask = torch.ones(4, 9, dtype=torch.bool, device=device)
    mask[1, 5:], mask[2, ::3], mask[3] = False, False, False
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_keys_and_values(dtype, mask, random, check_gradients):
    """k and v of attended positions come first, in order; gradients of the rows after them count as zero."""
    packing, n = Packing.of(mask), 2
    inputs = [random(4, length, 48, dtype=dtype) for length in (5, 4)] + [random(2, 8) for _ in range(2 * n)]
    lists = lambda p: (p[:n], p[n : 2 * n], p[2 * n :], 2, packing)  # noqa: E731
    check_gradients(
        lambda *p: qk_norm_pack(*lists(p), backend="triton"), lambda *p: reference.qk_norm_pack(*lists(p)), inputs
    )
    plain, packed = (qk_norm_pack(*lists(inputs)[:4], p, backend="triton") for p in (None, packing))
    assert torch.equal(packed[0], plain[0])
    for ours, theirs in zip(packed[1:], plain[1:], strict=True):
        count = int(mask.sum())
        assert torch.equal(ours.flatten(0, 1)[:count], theirs[mask])
        assert not ours.flatten(0, 1)[count:].any()


def test_gradients_that_kernels_leave_unwritten_are_not_read(mask, random):
    packing = Packing.of(mask)
    x, gammas = random(4, 9, 48).requires_grad_(), [random(2, 8).requires_grad_() for _ in range(2)]
    q, k, v = qk_norm_pack([x], gammas[:1], gammas[1:], 2, packing, backend="triton")
    grads = [torch.ones_like(q) for _ in range(3)]
    for grad in grads[1:]:
        grad.flatten(0, 1)[int(mask.sum()) :] = torch.nan
    torch.autograd.backward([q, k, v], grads)
    assert all(value.grad.isfinite().all() for value in (x, *gammas))
    assert not x.grad[~mask][:, 16:].any()


def test_packings_of_another_shape_are_refused(mask, random):
    x, gamma = random(4, 8, 48), random(2, 8)
    with pytest.raises(ValueError, match=r"^packing: must have shape \(4, 8\)"):
        qk_norm_pack([x], [gamma], [gamma], 2, Packing.of(mask))


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
