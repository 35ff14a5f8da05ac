"""`qk_norm_pack`: RMS norm of q and k per head, and concatenation of the modalities' q, k, v into one sequence.

Floor: every element of qkv read once and written once; backward reads q, k and the upstream gradients once and writes
one gradient.
"""

import torch
from torch import Tensor

from . import reference
from .backend import check, check_device, check_floating, check_shape, custom_op, jit, tl, triton, use_triton, warps
from .tiles import measured

PROGRAMS = 2048
EPSILON = 1e-12  # added to the mean square; keeps the result and the gradient of zero vectors finite


@jit
def _pack_kernel(
    p_qkv,
    p_q_gamma,
    p_k_gamma,
    p_q,
    p_k,
    p_v,
    length,
    offset,
    total,
    heads,
    width,
    epsilon,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One position: its q, k and v go to row `offset` + position of the joint buffers, of `total` rows per sample."""
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, HEADS)[:, None]
    o_d = tl.arange(0, WIDTH)[None, :]
    m = (o_h < heads) & (o_d < width)
    o = o_h * width + o_d
    o_in = i_row * 3 * heads * width + o
    o_out = ((i_row // length) * total + offset + i_row % length) * heads * width + o
    for part in tl.static_range(2):
        p_gamma = p_q_gamma if part == 0 else p_k_gamma
        p_out = p_q if part == 0 else p_k
        b_x = tl.load(p_qkv + o_in + part * heads * width, mask=m, other=0.0).to(tl.float32)
        b_gamma = tl.load(p_gamma + o, mask=m, other=0.0).to(tl.float32)
        rms = tl.sqrt(tl.sum(b_x * b_x, 1) / width + epsilon)
        tl.store(p_out + o_out, b_x / rms[:, None] * b_gamma, mask=m)
    tl.store(p_v + o_out, tl.load(p_qkv + o_in + 2 * heads * width, mask=m, other=0.0), mask=m)


@jit
def _pack_backward_kernel(
    p_qkv,
    p_q_gamma,
    p_k_gamma,
    p_grad_q,
    p_grad_k,
    p_grad_v,
    p_grad_qkv,
    p_grad_gamma,
    n,
    length,
    offset,
    total,
    heads,
    width,
    epsilon,
    run,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A run of `run` positions: gradients of qkv, and partial sums of the gradients of γ, first of q, then of k."""
    i_run = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, HEADS)[:, None]
    o_d = tl.arange(0, WIDTH)[None, :]
    m = (o_h < heads) & (o_d < width)
    o = o_h * width + o_d
    for part in tl.static_range(2):
        p_gamma = p_q_gamma if part == 0 else p_k_gamma
        p_grad = p_grad_q if part == 0 else p_grad_k
        b_gamma = tl.load(p_gamma + o, mask=m, other=0.0).to(tl.float32)
        b_sum = tl.zeros((HEADS, WIDTH), tl.float32)
        for i_row in range(i_run * run, tl.minimum(i_run * run + run, n)):
            o_in = (i_row * 3 + part) * heads * width + o
            o_out = ((i_row // length) * total + offset + i_row % length) * heads * width + o
            b_x = tl.load(p_qkv + o_in, mask=m, other=0.0).to(tl.float32)
            b_grad = tl.load(p_grad + o_out, mask=m, other=0.0).to(tl.float32)
            inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / width + epsilon)
            b_unit = b_x * inverse[:, None]
            b_sum += b_grad * b_unit
            b_grad = b_grad * b_gamma
            slope = tl.sum(b_grad * b_unit, 1) / width
            tl.store(p_grad_qkv + o_in, (b_grad - b_unit * slope[:, None]) * inverse[:, None], mask=m)
        tl.store(p_grad_gamma + (i_run * 2 + part) * heads * width + o, b_sum, mask=m)
    for i_row in range(i_run * run, tl.minimum(i_run * run + run, n)):
        o_out = ((i_row // length) * total + offset + i_row % length) * heads * width + o
        b_grad = tl.load(p_grad_v + o_out, mask=m, other=0.0)
        tl.store(p_grad_qkv + (i_row * 3 + 2) * heads * width + o, b_grad, mask=m)


def tile(op: str, heads: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Heads, features per head and warps of a program. Entries of `tiles.json` override the defaults."""
    shape = {"HEADS": triton.next_power_of_2(heads), "WIDTH": triton.next_power_of_2(width)}
    shape["num_warps"] = warps(shape["HEADS"] * shape["WIDTH"], 4)
    return shape | measured(op, heads * width, dtype)


def launch_pack(qkv: list[Tensor], q_gamma: list[Tensor], k_gamma: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    heads, width = q_gamma[0].shape
    batch, total = len(qkv[0]), sum(x.shape[1] for x in qkv)
    dtype = qkv[0].dtype
    q, k, v = (torch.empty(batch, total, heads, width, dtype=dtype, device=qkv[0].device) for _ in range(3))
    offset = 0
    for x, gq, gk in zip(qkv, q_gamma, k_gamma, strict=True):
        length = x.shape[1]
        if x.numel():
            _pack_kernel[(batch * length,)](
                p_qkv=x.contiguous(),
                p_q_gamma=gq.contiguous(),
                p_k_gamma=gk.contiguous(),
                p_q=q,
                p_k=k,
                p_v=v,
                length=length,
                offset=offset,
                total=total,
                heads=heads,
                width=width,
                epsilon=EPSILON,
                **tile("qk_norm_pack", heads, width, dtype),
            )
        offset += length
    return q, k, v


def launch_pack_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: list[Tensor],
    q_gamma: list[Tensor],
    k_gamma: list[Tensor],
) -> list[Tensor]:
    """Gradients of each modality's qkv, then of each modality's γ of q and k, (2, H, Dh) float32."""
    grad_q, grad_k, grad_v = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
    heads, width = q_gamma[0].shape
    batch, total = grad_q.shape[:2]
    shape = tile("qk_norm_pack_backward", heads, width, qkv[0].dtype)
    programs = shape.pop("programs", PROGRAMS)
    grads, gammas, offset = [], [], 0
    for x, gq, gk in zip(qkv, q_gamma, k_gamma, strict=True):
        length = x.shape[1]
        n = batch * length
        run = triton.cdiv(max(1, n), programs)
        grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = torch.zeros(triton.cdiv(n, run), 2, heads, width, device=x.device)
        if n:
            _pack_backward_kernel[(len(parts),)](
                p_qkv=x.contiguous(),
                p_q_gamma=gq.contiguous(),
                p_k_gamma=gk.contiguous(),
                p_grad_q=grad_q,
                p_grad_k=grad_k,
                p_grad_v=grad_v,
                p_grad_qkv=grad,
                p_grad_gamma=parts,
                n=n,
                length=length,
                offset=offset,
                total=total,
                heads=heads,
                width=width,
                epsilon=EPSILON,
                run=run,
                **shape,
            )
        grads.append(grad)
        gammas.append(parts.sum(0))
        offset += length
    return grads + gammas


_pack = custom_op("qk_norm_pack", launch_pack)
_pack_backward = custom_op("qk_norm_pack_backward", launch_pack_backward)


@_pack.register_fake
def _(qkv, q_gamma, k_gamma):
    shape = (qkv[0].shape[0], sum(x.shape[1] for x in qkv), *q_gamma[0].shape)
    return tuple(qkv[0].new_empty(shape) for _ in range(3))


@_pack_backward.register_fake
def _(grad_q, grad_k, grad_v, qkv, q_gamma, k_gamma):
    pairs = [gamma.new_empty(2, *gamma.shape, dtype=torch.float32) for gamma in q_gamma]
    return [x.new_empty(x.shape) for x in qkv] + pairs


def _setup(ctx, inputs, output):
    ctx.modalities = len(inputs[0])
    ctx.save_for_backward(*(value for values in inputs for value in values))


def _autograd(ctx, grad_q, grad_k, grad_v):
    n, saved = ctx.modalities, ctx.saved_tensors
    qkv, q_gamma, k_gamma = (list(saved[i : i + n]) for i in (0, n, 2 * n))
    grads = _pack_backward(grad_q, grad_k, grad_v, qkv, q_gamma, k_gamma)
    pairs = list(zip(grads[n:], q_gamma, k_gamma, strict=True))
    return grads[:n], [pair[0].to(gq.dtype) for pair, gq, _ in pairs], [pair[1].to(gk.dtype) for pair, _, gk in pairs]


_pack.register_autograd(_autograd, setup_context=_setup)


def qk_norm_pack(
    qkv: list[Tensor],
    q_gamma: list[Tensor],
    k_gamma: list[Tensor],
    heads: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint q, k, v (B, ΣL, H, Dh) from the qkv (B, L_m, 3·H·Dh) of each modality.

    The last dimension of qkv is ordered as (q, k, v), head, feature. q and k are normalized per head, x/‖x‖ · √Dh · γ,
    with γ (H, Dh) of each modality. All qkv have the same dtype.
    """
    check(len(qkv) > 0, "qkv", "must hold at least one modality")
    for name, gammas in (("q_gamma", q_gamma), ("k_gamma", k_gamma)):
        check(len(gammas) == len(qkv), name, f"must hold {len(qkv)} tensors like qkv, got {len(gammas)}")
    first = qkv[0]
    for x, gq, gk in zip(qkv, q_gamma, k_gamma, strict=True):
        check(x.ndim == 3 and x.shape[0] == first.shape[0], "qkv", f"must be (B, L, 3·H·Dh), got {tuple(x.shape)}")
        check(x.dtype == first.dtype, "qkv", f"must share one dtype, got {first.dtype} and {x.dtype}")
        check(gq.ndim == 2 and 3 * gq.numel() == x.shape[2], "q_gamma", f"must be (H, Dh), got {tuple(gq.shape)}")
        check_shape("q_gamma", gq, (heads, q_gamma[0].shape[1]))
        check_shape("k_gamma", gk, gq.shape)
        check_floating(qkv=x, q_gamma=gq, k_gamma=gk)
        check_device(first.device, qkv=x, q_gamma=gq, k_gamma=gk)
    if use_triton(backend, first, qkv=first, q_gamma=q_gamma[0], k_gamma=k_gamma[0]):
        return _pack(list(qkv), list(q_gamma), list(k_gamma))
    return reference.qk_norm_pack(qkv, q_gamma, k_gamma, heads)
