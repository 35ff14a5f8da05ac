"""Padded text whose attended keys are packed once per evaluation, against attention with a mask."""

import functools
import importlib

import pytest
import torch
from torch import Tensor

from anystate.kernels import Packing
from anystate.model import MMDiT, Patches, Tokens
from anystate.model.compilation import compile_net

N, LENGTH, STATES = 3, 6, 5
attention = importlib.import_module("anystate.kernels.attention")


def probabilities(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor):
    """(rows of the queries, rows of the keys, softmax of their scores (H, Q, L)) of every sequence."""
    for i in range(len(cu_q) - 1):
        rows, columns = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        yield rows, columns, torch.softmax(torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * q.shape[-1] ** -0.5, -1)


@torch.library.custom_op("anystate_tests::packed", mutates_args=())
def packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Attention of packed sequences."""
    return torch.cat([torch.einsum("hqk,khd->qhd", p, v[keys]) for _, keys, p in probabilities(q, k, cu_q, cu_k)])


@torch.library.custom_op("anystate_tests::packed_backward", mutates_args=())
def packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves not-a-number in the gradients of rows behind the attended ones."""
    dq, dk, dv = (torch.full(x.shape, torch.nan) for x in (q, k, v))
    for rows, keys, p in probabilities(q, k, cu_q, cu_k):
        dp = torch.einsum("qhd,khd->hqk", grad[rows], v[keys])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[keys])
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, q[rows])
        dv[keys] = torch.einsum("hqk,qhd->khd", p, grad[rows])
    return dq, dk, dv


packed.register_fake(lambda q, *_: q.new_empty(q.shape))
packed_backward.register_fake(lambda grad, *x: tuple(value.new_empty(value.shape) for value in x[:3]))
packed.register_autograd(
    lambda ctx, grad: (*packed_backward(grad.contiguous(), *ctx.saved_tensors), *[None] * 4),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5]),
)


@pytest.fixture
def made(monkeypatch):
    """Attention with a key mask runs `packed`, as on a GPU; the packings that are made."""
    made, of = [], Packing.of
    monkeypatch.setattr(Packing, "of", staticmethod(lambda *mask: made.append(mask[0].shape) or of(*mask)))
    monkeypatch.setattr(attention, "use_triton", lambda *_, **__: True)
    monkeypatch.setitem(attention.FUNCTIONS, "packed", functools.partial(attention.varlen_attention, packed))
    monkeypatch.setattr(attention, "candidates", lambda *kind: ("packed",) if kind[-1] else ("sdpa",))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def network(qk_norm: bool) -> MMDiT:
    text = Tokens(length=LENGTH, states=STATES, width=32, single_stream_depth=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MMDiT({"text": text, "image": Patches(channels=1, size=4, patch=2, width=24)}, 3, 2, 16, qk_norm=qk_norm)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return net


def data() -> tuple[dict, dict, dict]:
    """Padding at the end, in between, and of all text of a sample but one position."""
    rng = torch.Generator().manual_seed(1)
    x = {"text": torch.randint(STATES, (N, LENGTH), generator=rng), "image": torch.randn(N, 1, 4, 4, generator=rng)}
    mask = torch.ones(N, LENGTH, dtype=torch.bool)
    mask[0, 4:], mask[1, ::2], mask[2, :-1] = False, False, False
    return x, {m: torch.rand(N, generator=rng) for m in x}, {"text": mask}


def outputs_and_gradients(net: MMDiT, outputs=None) -> tuple[list[Tensor], list[Tensor]]:
    out = net(*data(), outputs)
    out = [value if isinstance(value, Tensor) else value.values()[..., :STATES] for value in out.values()]
    loss = sum((value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum() for value in out)
    return out, torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


@pytest.mark.parametrize("way", ["eager", "compiled", "checkpointed"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_outputs_and_gradients_are_those_of_a_mask(qk_norm, way, made):
    """For the joint sequence and for the text alone a packing is made once, whatever the number of blocks."""
    nets = [network(qk_norm) for _ in range(2)]
    if way == "compiled":
        compile_net(nets[0], torch.device("cuda"), backend="aot_eager")
    nets[0].activation_checkpointing = way == "checkpointed"
    ours = outputs_and_gradients(nets[0])
    assert made == [(N, LENGTH + 4), (N, LENGTH)]
    attention.candidates = lambda *kind: ("sdpa",)
    theirs = outputs_and_gradients(nets[1])
    assert len(made) == 2
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for (name, _), a, b in zip(nets[0].named_parameters(), ours[1], theirs[1], strict=True):
        assert a is not None, name
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-5, name


@pytest.mark.parametrize("compiled", [False, True])
def test_sampling_batches_of_any_size(compiled, made):
    """One compilation serves all sizes above 1; single positions take the plain mask."""
    net, (x, t, mask) = network(True).eval(), data()
    if compiled:
        compile_net(net, torch.device("cuda"), dynamic=True, backend="aot_eager")
    with torch.no_grad():
        full = net(x, t, mask)["text"].values()
        for n in (1, 2):
            part = net(*({m: value[:n] for m, value in part.items()} for part in (x, t, mask)))["text"].values()
            torch.testing.assert_close(part, full[:n], rtol=1e-4, atol=1e-4)
        if not compiled:
            index = torch.tensor([1, LENGTH + 3])
            few = net(x, t, mask, ["text"], positions={"text": index})["text"].values()
            torch.testing.assert_close(few.flatten(0, 1)[index], full.flatten(0, 1)[index], rtol=1e-4, atol=1e-4)


def test_without_a_fused_kernel_the_mask_reaches_attention_unchanged(monkeypatch):
    monkeypatch.setattr(Packing, "of", staticmethod(lambda *_: pytest.fail("packed")))
    seen = []
    joint_attention = attention.joint_attention
    monkeypatch.setattr(
        "anystate.kernels.joint_attention",
        lambda q, k, v, key_mask=None: seen.append(key_mask) or joint_attention(q, k, v, key_mask),
    )
    x, t, mask = data()
    network(True)(x, t, mask)
    assert torch.equal(seen[0][:, :LENGTH], mask["text"])
    assert seen[3] is mask["text"]
