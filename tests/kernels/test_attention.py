"""Attention: all usable implementations against float64, and the packing for variable-length functions."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from anystate.kernels import joint_attention, reference
from anystate.kernels.attention import (
    FUNCTIONS,
    candidates,
    drop_disabled,
    fixed_attention,
    packing_order,
    untraced,
    varlen_attention,
)

B, L, H, D = 3, 11, 2, 16


@pytest.fixture
def mask(device):
    """Samples with padding at the end, with padding in between, and without."""
    mask = torch.ones(B, L, dtype=torch.bool, device=device)
    mask[0, 6:], mask[1, ::3] = False, False
    return mask


def loop_attention(q, k, v, cu_q, cu_k, max_q, max_k):
    """Variable-length attention in PyTorch; like flash-attn it does not read the tail of k and v."""
    assert max_q == int(cu_q.diff().max())
    assert max_k == L
    out = []
    for i in range(len(cu_q) - 1):
        rows, columns = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        parts = (part.transpose(0, 1)[None] for part in (q[rows], k[columns], v[columns]))
        out.append(torch.nn.functional.scaled_dot_product_attention(*parts)[0].transpose(0, 1))
    return torch.cat(out), None


class PoisonTail(torch.autograd.Function):
    """Sets gradients of rows from `count` on to NaN, like a kernel that leaves them unwritten."""

    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.count :] = torch.nan
        return grad, None


def test_packing_order_brings_attended_positions_to_the_front(mask):
    order = packing_order(mask)
    attended = mask.flatten().nonzero().squeeze(1)
    assert torch.equal(order[: len(attended)], attended)
    assert torch.equal(order.sort().values, torch.arange(B * L, device=order.device))


@pytest.mark.parametrize("queries", [L, 4])
def test_varlen_attention_and_its_gradients(mask, random, queries):
    inputs = [random(B, length, H, D) for length in (queries, L, L)]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))

    def poisoned(q, k, v, *rest):
        count = int(mask.sum())
        return loop_attention(q, PoisonTail.apply(k, count), PoisonTail.apply(v, count), *rest)

    a, b = varlen_attention(poisoned, *ours, mask), reference.joint_attention(*theirs, mask)
    upstream = random(B, queries, H, D)
    a.backward(upstream)
    b.backward(upstream)
    # every query, also at masked positions
    assert (a - b).abs().max() < 1e-5
    for x, y in zip(ours, theirs, strict=True):
        assert (x.grad - y.grad).abs().max() < 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 4, L])
def test_few_queries_attend_to_all_keys(mask, random, queries, masked):
    """A query's result does not depend on the other queries, with `short_attention` too; k and v must match."""
    q, k, v = (random(B, L, H, D) for _ in range(3))
    key_mask = mask if masked else None
    chosen = torch.tensor([7, 0, 10, 3, 1, 2, 4, 5, 6, 8, 9], device=q.device)[:queries]
    few = joint_attention(q[:, chosen], k, v, key_mask)
    assert (few - reference.joint_attention(q.double(), k.double(), v.double(), key_mask)[:, chosen]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="v: must have shape"):
        joint_attention(q, k, v[:, 1:], key_mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_agrees(dtype, masked, mask, random, device, check_gradients):
    """In bfloat16 the order of summation differs between kernels, and their errors by tens of percent."""
    key_mask = mask if masked else None
    names = candidates(torch.device(device), dtype, D, masked)
    assert names[-1] == "sdpa"
    for name in names:
        check_gradients(
            lambda q, k, v, name=name: FUNCTIONS[name](q, k, v, key_mask),
            lambda q, k, v: reference.joint_attention(q, k, v, key_mask),
            [random(B, L, H, D, dtype=dtype) for _ in range(3)],
            factor=1.1 if dtype == torch.float32 else 2.0,
        )


class Foreign(torch.autograd.Function):
    """Attention in numpy, which torch.compile cannot trace, of packed sequences or, without cu_q and cu_k, a batch."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k):
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        return Foreign.loop(q, k, v, cu_q, cu_k)[0], None

    @staticmethod
    def backward(ctx, grad, _):
        return *Foreign.loop(*ctx.saved_tensors, grad)[1:], None, None

    @staticmethod
    def loop(q, k, v, cu_q, cu_k, grad=None):
        """The result, and the gradients of q, k and v for an upstream gradient."""
        if cu_q is None:
            cu = torch.arange(len(q) + 1) * q.shape[1]
            packed = [x if x is None else x.flatten(0, 1) for x in (q, k, v, grad)]
            return [x.view_as(q) for x in Foreign.loop(*packed[:3], cu, cu, packed[3])]
        arrays = [x.detach().cpu().numpy() for x in (q, k, v, q if grad is None else grad)]
        results = [np.zeros_like(x) for x in (arrays[0], *arrays[:3])]
        scale = q.shape[-1] ** -0.5
        for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            rows = slice(a, b), slice(c, d), slice(c, d), slice(a, b)
            q1, k1, v1, g1 = (x[r].swapaxes(0, 1) for x, r in zip(arrays, rows, strict=True))
            p = np.exp(scale * q1 @ k1.swapaxes(1, 2))
            p /= p.sum(-1, keepdims=True)
            ds = g1 @ v1.swapaxes(1, 2)
            ds = scale * p * (ds - (ds * p).sum(-1, keepdims=True))
            parts = p @ v1, ds @ k1, ds.swapaxes(1, 2) @ q1, p.swapaxes(1, 2) @ g1
            for result, part, r in zip(results, parts, (rows[0], *rows[:3]), strict=True):
                result[r] = part.swapaxes(0, 1)
        return [torch.from_numpy(x).to(q.device) for x in results]


def foreign(q, k, v, cu_q=None, cu_k=None, max_q=None, max_k=None):
    return Foreign.apply(q, k, v, cu_q, cu_k)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_that_cannot_be_traced_run_in_compiled_networks(masked, compiled, mask, random):
    """Forward and backward; compiled as an operation, without a graph break."""
    function = untraced(f"foreign_{masked}_{compiled}", foreign)
    torch._dynamo.reset()

    def attend(q, k, v):
        return varlen_attention(function, q, k, v, mask) if masked else fixed_attention(function, q, k, v, None)

    used = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    inputs, upstream = [random(B, L, H, D) for _ in range(3)], random(B, L, H, D)
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    results = used(*ours), reference.joint_attention(*theirs, mask if masked else None)
    for result in results:
        result.backward(upstream)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5)


def test_pads_are_not_attended(mask, random):
    q, k, v = (random(B, L, H, D) for _ in range(3))
    before = joint_attention(q, k, v, mask)
    k[~mask], v[~mask] = 100.0, 100.0
    assert torch.equal(joint_attention(q, k, v, mask), before)


def test_autocast_computes_in_its_dtype(mask, random, device):
    q, k, v = (random(B, L, H, D) for _ in range(3))
    with torch.autocast(device, torch.bfloat16):
        assert joint_attention(q, k, v, mask).dtype == torch.bfloat16


def test_implementations_can_be_disabled(monkeypatch):
    names = ("flash_varlen", "torch_varlen", "sdpa")
    monkeypatch.delenv("ANYSTATE_ATTENTION_WITHOUT", raising=False)
    assert drop_disabled(names) == names
    monkeypatch.setenv("ANYSTATE_ATTENTION_WITHOUT", "flash_varlen,torch_varlen,sdpa")
    assert drop_disabled(names) == ("sdpa",)
