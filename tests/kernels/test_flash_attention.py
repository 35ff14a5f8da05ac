"""Versions of flash-attn, imitated in numpy: called by their private functions, in compiled networks too."""

import importlib
import sys
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch

from anystate.kernels import Packing, reference
from anystate.kernels.attention import fixed_attention, varlen_attention
from anystate.kernels.flash_attention import installed

B, L, H, D = 3, 11, 2, 16
HOPPER, BLACKWELL, AMPERE = (9, 0), (10, 0), (8, 0)


def sequences(x, cu):
    """Rows of every sequence, heads first."""
    return [x[a:b].swapaxes(0, 1) for a, b in pairwise(cu)]


def arrays(tensors, cu_q, cu_k):
    """numpy arrays with rows (ΣL, H, …), and cumulative lengths, also of a batch. Fails for fake and traced tensors."""
    assert not torch.compiler.is_compiling()
    batch, length = tensors[0].shape[:2]
    cus = [np.arange(batch + 1) * length if cu is None else cu.numpy() for cu in (cu_q, cu_k)]
    return [x.detach().numpy().reshape(-1, *x.shape[-2:]) for x in tensors], *cus


def forward(q, k, v, cu_q=None, cu_k=None):
    """The result, and the log-sum-exp of the scores as (H, ΣL), of a batch as (B, H, L)."""
    (q1, k1, v1), cu_q1, cu_k1 = arrays((q, k, v), cu_q, cu_k)
    out, lse = np.zeros_like(q1), np.zeros((q1.shape[1], len(q1)), np.float32)
    for i, (a, b) in enumerate(pairwise(cu_q1)):
        query, key, value = sequences(q1, cu_q1)[i], sequences(k1, cu_k1)[i], sequences(v1, cu_k1)[i]
        scores = q.shape[-1] ** -0.5 * query @ key.swapaxes(1, 2)
        lse[:, a:b] = np.log(np.exp(scores).sum(-1))
        out[a:b] = (np.exp(scores - lse[:, a:b, None]) @ value).swapaxes(0, 1)
    lse = torch.from_numpy(lse)
    lse = lse if cu_q is not None else lse.view(H, len(q), -1).transpose(0, 1)
    return torch.from_numpy(out).view_as(q), lse


def backward(dout, q, k, v, out, lse, cu_q=None, cu_k=None):
    """Gradients of q, k, v from the saved result and log-sum-exp; rows that no sequence holds are not a number."""
    (q1, k1, v1, o1, g1), cu_q1, cu_k1 = arrays((q, k, v, out, dout), cu_q, cu_k)
    lse = lse.numpy() if cu_q is not None else lse.transpose(0, 1).reshape(H, -1).numpy()
    dq, dk, dv = (np.full_like(x, np.nan) for x in (q1, k1, v1))
    scale = q.shape[-1] ** -0.5
    for i, ((a, b), (c, d)) in enumerate(zip(pairwise(cu_q1), pairwise(cu_k1), strict=True)):
        query, result, grad = (sequences(x, cu_q1)[i] for x in (q1, o1, g1))
        key, value = (sequences(x, cu_k1)[i] for x in (k1, v1))
        p = np.exp(scale * query @ key.swapaxes(1, 2) - lse[:, a:b, None])
        ds = scale * p * (grad @ value.swapaxes(1, 2) - (grad * result).sum(-1, keepdims=True))
        parts = ((dq, a, b, ds @ key), (dk, c, d, ds.swapaxes(1, 2) @ query), (dv, c, d, p.swapaxes(1, 2) @ grad))
        for into, start, end, part in parts:
            into[start:end] = part.swapaxes(0, 1)
    return tuple(torch.from_numpy(x).view_as(y) for x, y in ((dq, q), (dk, k), (dv, v)))


class Public(torch.autograd.Function):
    """What the public functions of a library run."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k):
        calls.append("public forward")
        out, lse = forward(q, k, v, cu_q, cu_k)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        return *backward(grad, *ctx.saved_tensors), None, None


calls: list[str] = []


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    return Public.apply(q, k, v, None, None)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, causal=False):
    """A version without largest lengths."""
    return Public.apply(q, k, v, cu_seqlens_q, cu_seqlens_k)


def module(name: str, **functions) -> ModuleType:
    made = ModuleType(name)
    vars(made).update({"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func})
    vars(made).update(functions)
    return made


def flash_attn_4() -> dict[str, ModuleType]:
    """The package exports its public functions, which are at home in its module `interface`."""

    def _flash_attn_fwd(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, max_seqlen_q=None, max_seqlen_k=None,
        page_table=None, softmax_scale=None, causal=False, return_lse=False, out=None,
    ):  # fmt: skip
        assert softmax_scale == D**-0.5
        assert not causal
        calls.append("forward")
        out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, cu_seqlens_q=None, cu_seqlens_k=None,
        deterministic=False,
    ):  # fmt: skip
        calls.append("backward")
        return backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)

    def public_of_interface(q, k, v):
        raise AssertionError("the private functions are called")

    public_of_interface.__module__ = "flash_attn.cute.interface"
    interface = module("flash_attn.cute.interface", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    cute = module("flash_attn.cute", flash_attn_func=public_of_interface)
    return {"flash_attn": ModuleType("flash_attn"), "flash_attn.cute": cute, "flash_attn.cute.interface": interface}


def first_flash_attn_4() -> dict[str, ModuleType]:
    """Its forward function returns the log-sum-exp only for tensors that require gradients."""

    def _flash_attn_fwd(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
        raise AssertionError("without the log-sum-exp there is no backward pass")

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False):
        raise AssertionError("not for packed sequences")

    cute = module("flash_attn.cute", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    return {"flash_attn": ModuleType("flash_attn"), "flash_attn.cute": cute}


def first_flash_attn_3() -> dict[str, ModuleType]:
    """Python functions, most of whose arguments are required; the gradients are returned and written."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, q_descale, softmax_scale, causal, window_size=(-1, -1), num_splits=1,
    ):  # fmt: skip
        assert (k_new, v_new, qv, out, seqused_k, page_table, causal) == (None,) * 6 + (False,)
        calls.append("forward")
        return *forward(q, k, v, cu_seqlens_q, cu_seqlens_k), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        calls.append("backward")
        grads = backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k)
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)
        return dq, dk, dv, torch.empty(0)

    functions = {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}
    return {"flash_attn_interface": module("flash_attn_interface", **functions)}


@torch.library.custom_op("anystate_tests::_flash_attn_forward", mutates_args=())
def operation_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    calls.append("forward")
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k)
    return out, lse, torch.empty(0), torch.empty(0)


@torch.library.custom_op("anystate_tests::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def operation_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    calls.append("backward")
    grads = backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)
    return torch.empty(0)


def flash_attn_3() -> dict[str, ModuleType]:
    """Operations of torch.library, which write the gradients."""
    functions = {"_flash_attn_forward": operation_forward, "_flash_attn_backward": operation_backward}
    return {"flash_attn_interface": module("flash_attn_interface", **functions)}


@pytest.fixture
def install(monkeypatch):
    """install(modules): these, and no other flash-attn, can be imported."""
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    import_module = importlib.import_module

    def only_stand_ins(name, *others):
        if name.startswith("flash_attn") and name not in sys.modules:
            raise ModuleNotFoundError(name)
        return import_module(name, *others)

    monkeypatch.setattr(importlib, "import_module", only_stand_ins)
    torch._dynamo.reset()
    calls.clear()
    yield lambda modules: [monkeypatch.setitem(sys.modules, name, made) for name, made in modules.items()]
    torch._dynamo.reset()


@pytest.fixture
def mask():
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, 6:], mask[1, ::3] = False, False
    return mask


VERSIONS = {  # the version, a GPU that it is for, and whether its private functions are called
    "4": (flash_attn_4, BLACKWELL, True),
    "first 4": (first_flash_attn_4, HOPPER, False),
    "3": (flash_attn_3, HOPPER, True),
    "first 3": (first_flash_attn_3, HOPPER, True),
}


@pytest.mark.parametrize("kind", ["fixed", "mask", "packing"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_of_every_version(version, compiled, kind, install, mask, random, close):
    """Against float64; the backward pass does not run the forward pass again."""
    modules, gpu, direct = VERSIONS[version]
    install(modules())
    functions, packing = installed(gpu), Packing.of(mask)

    def attend(q, k, v, packing):
        if kind == "fixed":
            return fixed_attention(functions.fixed, q, k, v, None)
        if kind == "mask":
            return varlen_attention(functions.varlen, q, k, v, mask)
        return varlen_attention(functions.varlen, q, packing.pack(k), packing.pack(v), packing)

    used = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    inputs, upstream = [random(B, L, H, D).cpu() for _ in range(3)], random(B, L, H, D).cpu()
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    exact = [x.double().requires_grad_() for x in inputs]
    results = [used(*ours, packing)]
    results += [reference.joint_attention(*x, None if kind == "fixed" else mask) for x in (theirs, exact)]
    for result in results:
        result.backward(upstream.to(result.dtype))
    close(*results, name="result")
    for name, *grads in zip("qkv", *([x.grad for x in values] for values in (ours, theirs, exact)), strict=True):
        close(*grads, name=f"gradient of {name}")
    assert calls == (["forward", "backward"] if direct else ["public forward"] * 2)


def test_order_of_preference(install):
    """4 before 3 before 2, each only on the GPUs that it supports."""
    second = module("flash_attn")
    install(flash_attn_4() | first_flash_attn_3() | {"flash_attn": second})
    names = {}
    for gpu in (AMPERE, HOPPER, BLACKWELL):
        q = torch.ones(1, 2, H, D)
        calls.clear()
        installed(gpu).fixed(q, q, q)
        names[gpu] = [*calls]
    assert names == {AMPERE: ["public forward"], HOPPER: ["forward"], BLACKWELL: ["forward"]}
    for missing in ("flash_attn.cute", "flash_attn.cute.interface"):
        del sys.modules[missing]
    assert installed(HOPPER).fixed is not flash_attn_func
    assert installed(BLACKWELL).fixed is flash_attn_func
    assert installed((7, 5)) is None


def test_without_flash_attn(install):
    assert installed(HOPPER) is None
