"""Attention: all usable implementations against float64, and the packing for variable-length functions."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from anystate.kernels import Packing, joint_attention, pack_keys, reference
from anystate.kernels.attention import FUNCTIONS, candidates, drop_disabled, varlen_attention

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


def test_packing_brings_attended_positions_to_the_front(mask, random):
    """In order, sample after sample; the others follow and hold zeros."""
    mask[2] = False  # a sample without keys
    packing = Packing.of(mask, queries=4)
    count, rows = int(mask.sum()), packing.rows.flatten()
    assert torch.equal(rows[mask.flatten()], torch.arange(count, device=rows.device, dtype=torch.int32))
    assert torch.equal(rows.sort().values, torch.arange(B * L, device=rows.device, dtype=torch.int32))
    assert torch.equal(packing.attended(), mask)
    assert packing.cu_k.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert packing.cu_q.tolist() == [0, 4, 8, 12]
    assert all(part.dtype == torch.int32 and part._base is None for part in packing)
    x = random(B, L, H, D)
    packed = packing.pack(x).flatten(0, 1)
    assert torch.equal(packed[:count], x[mask])
    assert not packed[count:].any()
    assert torch.equal(packing.unpack(packed.view_as(x)), x * mask[..., None, None])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("queries", [L, 4])
def test_varlen_attention_and_its_gradients(mask, random, queries, packed):
    """Gradients of the tail that the function leaves unwritten have no influence."""
    inputs = [random(B, length, H, D) for length in (queries, L, L)]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))

    def poisoned(q, k, v, *rest):
        count = int(mask.sum())
        return loop_attention(q, PoisonTail.apply(k, count), PoisonTail.apply(v, count), *rest)

    def attend(q, k, v):
        packing = Packing.of(mask, queries)
        keys = (packing.pack(k), packing.pack(v), packing) if packed else (k, v, mask)
        return varlen_attention(poisoned, q, *keys)

    a, b = attend(*ours), reference.joint_attention(*theirs, mask)
    upstream = random(B, queries, H, D)
    a.backward(upstream)
    b.backward(upstream)
    # every query, also at masked positions
    assert (a - b).abs().max() < 1e-5
    for x, y in zip(ours, theirs, strict=True):
        assert (x.grad - y.grad).abs().max() < 1e-5


def test_no_rows_are_added_up(mask, random):
    """Packing is compiled to stores and loads of rows, forward and backward, without accumulation and cumulative sums
    in the backward pass."""
    graphs = {}

    def keep(name):
        return lambda module, _: graphs.setdefault(name, module) and make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    packed = torch.compile(lambda x, packing: packing.pack(x), fullgraph=True, backend=backend)
    x, packing = random(B, L, H, D).requires_grad_(), Packing.of(mask)
    packed(x, packing).sum().backward()
    assert torch.equal(x.grad, mask[..., None, None].expand_as(x).float())
    for graph in graphs.values():
        called = [node for node in graph.graph.nodes if node.op == "call_function"]
        assert not any("cumsum" in str(node.target) for node in called)
        puts = [node for node in called if "index_put" in str(node.target)]
        assert not any(True in node.args for node in puts)  # accumulate
    assert len(graphs) == 2
    assert not [node for node in graphs["backward"].graph.nodes if "index_put" in str(node.target)]


def test_the_reference_takes_packed_keys(mask, random):
    q, k, v = (random(B, L, H, D) for _ in range(3))
    packing = Packing.of(mask)
    ours = joint_attention(q, packing.pack(k), packing.pack(v), packing, backend="reference")
    assert torch.equal(ours, reference.joint_attention(q, k * mask[..., None, None], v * mask[..., None, None], mask))
    with pytest.raises(ValueError, match=r"^q: must have the shape of packed keys"):
        joint_attention(q[:, :4], k, v, packing)


def test_masks_are_packed_only_for_functions_of_variable_lengths(mask, module, monkeypatch):
    attention = module("attention")
    assert pack_keys(mask, torch.bfloat16, D, backend="reference") is mask
    monkeypatch.setattr(
        attention, "candidates", lambda *kind: ("torch_varlen", "sdpa") if kind[1] == torch.bfloat16 else ("sdpa",)
    )
    assert pack_keys(mask, torch.bfloat16, D, backend="reference") is mask
    monkeypatch.setattr(attention, "use_triton", lambda *_, **__: True)
    assert isinstance(pack_keys(mask, torch.bfloat16, D), Packing)
    assert pack_keys(mask, torch.float32, D) is mask


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
