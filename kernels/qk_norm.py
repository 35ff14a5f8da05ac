"""`qk_norm_pack`: RMS norm of q and k per head, and concatenation of the modalities' q, k, v into one sequence.

With a `Packing` of the key mask k and v go straight to their packed rows, and the backward pass reads their gradients
there. Keys and values that nothing attends to are neither read nor differentiated: their rows are zeros.

Floor: every element of qkv read once and written once; backward reads q, k and the upstream gradients once and writes
one gradient. With a packing, unattended k and v are only written.
"""

import torch
from torch import Tensor

from . import reference
from .backend import check, check_device, check_floating, check_shape, custom_op, jit, tl, triton, use_triton, warps
from .packing import Packing
from .tiles import measured

ELEMENTS = 1024  # of q, of k and of v in a program, at most: 16 bytes a thread of 4 warps in bfloat16
PROGRAMS = 1024  # of a backward kernel, each with partial sums of the gradients of γ
EPSILON = 1e-12  # added to the mean square; keeps the result and the gradient of zero vectors finite


@jit
def _inverse_norms(b_x, width, epsilon):
    return 1.0 / tl.sqrt(tl.sum(b_x * b_x, 2) / width + epsilon)[:, :, None]


@jit
def _key_rows(p_rows, p_cu_k, batch, i_row, m_l, PACKED: tl.constexpr):
    """Rows of k and v in the joint buffers, and which of them are attended to."""
    if PACKED:
        i_key = tl.load(p_rows + i_row, mask=m_l, other=0).to(tl.int64)
        return i_key, m_l & (i_key < tl.load(p_cu_k + batch))
    else:
        return i_row, m_l


@jit
def _pack_kernel(
    p_qkv,
    p_q_gamma,
    p_k_gamma,
    p_q,
    p_k,
    p_v,
    p_rows,
    p_cu_k,
    batch,
    length,
    offset,
    total,
    heads,
    width,
    epsilon,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS positions of one sample: position l is row `offset` + l of the `total` rows of the sample."""
    i_sample = tl.program_id(0).to(tl.int64)
    o_l = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_h, o_d = tl.arange(0, HEADS)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    inner = heads * width
    m_l, m_f, o_f = o_l < length, (o_h < heads) & (o_d < width), o_h * width + o_d
    i_row = i_sample * total + offset + o_l
    i_key, m_key = _key_rows(p_rows, p_cu_k, batch, i_row, m_l, PACKED)
    p_x = p_qkv + (i_sample * length + o_l)[:, None, None] * 3 * inner + o_f
    m, m_kv = m_l[:, None, None] & m_f, m_key[:, None, None] & m_f
    b_q = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    b_k = tl.load(p_x + inner, mask=m_kv, other=0.0).to(tl.float32)
    b_v = tl.load(p_x + 2 * inner, mask=m_kv, other=0.0)
    b_q_gamma = tl.load(p_q_gamma + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_k_gamma = tl.load(p_k_gamma + o_f, mask=m_f, other=0.0).to(tl.float32)
    o_q, o_k = i_row[:, None, None] * inner + o_f, i_key[:, None, None] * inner + o_f
    tl.store(p_v + o_k, b_v, mask=m)
    tl.store(p_q + o_q, b_q * _inverse_norms(b_q, width, epsilon) * b_q_gamma, mask=m)
    tl.store(p_k + o_k, b_k * _inverse_norms(b_k, width, epsilon) * b_k_gamma, mask=m)


@jit
def _norm_gradient(b_x, b_grad, b_gamma, width, epsilon):
    """Gradients of x and of γ for y = x / rms(x) · γ."""
    b_inverse = _inverse_norms(b_x, width, epsilon)
    b_unit = b_x * b_inverse
    b_scaled = b_grad * b_gamma
    slope = tl.sum(b_scaled * b_unit, 2)[:, :, None] / width
    return (b_scaled - b_unit * slope) * b_inverse, b_grad * b_unit


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
    p_rows,
    p_cu_k,
    batch,
    length,
    offset,
    total,
    heads,
    width,
    epsilon,
    blocks,
    run,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A run of `run` blocks of ROWS positions, of which a sample has `blocks`: gradients of qkv, and partial sums of
    the gradients of γ, first of q, then of k."""
    i_run = tl.program_id(0)
    o_r, o_h, o_d = tl.arange(0, ROWS), tl.arange(0, HEADS)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    inner = heads * width
    m_f, o_f = (o_h < heads) & (o_d < width), o_h * width + o_d
    b_q_gamma = tl.load(p_q_gamma + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_k_gamma = tl.load(p_k_gamma + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_q_sum = tl.zeros((ROWS, HEADS, WIDTH), tl.float32)
    b_k_sum = tl.zeros((ROWS, HEADS, WIDTH), tl.float32)
    for i_block in range(i_run * run, tl.minimum(i_run * run + run, batch * blocks)):
        i_sample = (i_block // blocks).to(tl.int64)
        o_l = (i_block % blocks) * ROWS + o_r
        m_l = o_l < length
        i_row = i_sample * total + offset + o_l
        i_key, m_key = _key_rows(p_rows, p_cu_k, batch, i_row, m_l, PACKED)
        o_x = (i_sample * length + o_l)[:, None, None] * 3 * inner + o_f
        o_q, o_k = i_row[:, None, None] * inner + o_f, i_key[:, None, None] * inner + o_f
        m, m_kv = m_l[:, None, None] & m_f, m_key[:, None, None] & m_f
        b_q = tl.load(p_qkv + o_x, mask=m, other=0.0).to(tl.float32)
        b_k = tl.load(p_qkv + inner + o_x, mask=m_kv, other=0.0).to(tl.float32)
        b_grad_q = tl.load(p_grad_q + o_q, mask=m, other=0.0).to(tl.float32)
        b_grad_k = tl.load(p_grad_k + o_k, mask=m_kv, other=0.0).to(tl.float32)
        b_grad_v = tl.load(p_grad_v + o_k, mask=m_kv, other=0.0)
        tl.store(p_grad_qkv + 2 * inner + o_x, b_grad_v, mask=m)
        b_grad_q, b_part = _norm_gradient(b_q, b_grad_q, b_q_gamma, width, epsilon)
        b_q_sum += b_part
        tl.store(p_grad_qkv + o_x, b_grad_q, mask=m)
        b_grad_k, b_part = _norm_gradient(b_k, b_grad_k, b_k_gamma, width, epsilon)
        b_k_sum += b_part
        tl.store(p_grad_qkv + inner + o_x, b_grad_k, mask=m)
    p_sums = p_grad_gamma + i_run.to(tl.int64) * 2 * inner + o_f
    tl.store(p_sums, tl.sum(b_q_sum, 0)[None], mask=m_f)
    tl.store(p_sums + inner, tl.sum(b_k_sum, 0)[None], mask=m_f)


def tile(op: str, heads: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Positions, heads, features per head and warps of a program. Entries of `tiles.json` override the defaults."""
    shape = {"HEADS": triton.next_power_of_2(heads), "WIDTH": triton.next_power_of_2(width)}
    position = shape["HEADS"] * shape["WIDTH"]
    shape["ROWS"] = max(1, ELEMENTS // position)
    shape["num_warps"] = warps(shape["ROWS"] * position)
    return shape | measured(op, heads * width, dtype)


def describe(qkv: list[Tensor], gamma: list[Tensor], rows: Tensor | None, cu_k: Tensor | None) -> dict[str, object]:
    """Launch arguments that all modalities share."""
    heads, width = gamma[0].shape
    sizes = {"batch": qkv[0].shape[0], "total": sum(x.shape[1] for x in qkv), "heads": heads, "width": width}
    packed = {"p_rows": rows, "p_cu_k": cu_k, "PACKED": rows is not None}
    return sizes | packed | {"epsilon": EPSILON}


def launch_pack(
    qkv: list[Tensor],
    q_gamma: list[Tensor],
    k_gamma: list[Tensor],
    rows: Tensor | None,
    cu_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    about, (heads, width) = describe(qkv, q_gamma, rows, cu_k), q_gamma[0].shape
    batch, dtype = qkv[0].shape[0], qkv[0].dtype
    q, k, v = (qkv[0].new_empty(batch, about["total"], heads, width) for _ in range(3))
    shape, offset = tile("qk_norm_pack", heads, width, dtype), 0
    for x, gq, gk in zip(qkv, q_gamma, k_gamma, strict=True):
        length = x.shape[1]
        if x.numel():
            _pack_kernel[(batch, triton.cdiv(length, shape["ROWS"]))](
                p_qkv=x.contiguous(),
                p_q_gamma=gq.contiguous(),
                p_k_gamma=gk.contiguous(),
                p_q=q,
                p_k=k,
                p_v=v,
                length=length,
                offset=offset,
                **about,
                **shape,
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
    rows: Tensor | None,
    cu_k: Tensor | None,
) -> list[Tensor]:
    """Gradients of each modality's qkv, then of each modality's γ of q and k, (2, H, Dh) float32."""
    grad_q, grad_k, grad_v = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
    about, (heads, width) = describe(qkv, q_gamma, rows, cu_k), q_gamma[0].shape
    shape = tile("qk_norm_pack_backward", heads, width, qkv[0].dtype)
    programs = shape.pop("programs", PROGRAMS)
    grads, gammas, offset = [], [], 0
    for x, gq, gk in zip(qkv, q_gamma, k_gamma, strict=True):
        length = x.shape[1]
        blocks = triton.cdiv(length, shape["ROWS"])
        run = triton.cdiv(max(1, x.shape[0] * blocks), programs)
        grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = torch.empty(triton.cdiv(x.shape[0] * blocks, run), 2, heads, width, device=x.device)
        if x.numel():
            _pack_backward_kernel[(len(parts),)](
                p_qkv=x.contiguous(),
                p_q_gamma=gq.contiguous(),
                p_k_gamma=gk.contiguous(),
                p_grad_q=grad_q,
                p_grad_k=grad_k,
                p_grad_v=grad_v,
                p_grad_qkv=grad,
                p_grad_gamma=parts,
                length=length,
                offset=offset,
                blocks=blocks,
                run=run,
                **about,
                **shape,
            )
        grads.append(grad)
        gammas.append(parts.sum(0))
        offset += length
    return grads + gammas


_pack = custom_op("qk_norm_pack", launch_pack)
_pack_backward = custom_op("qk_norm_pack_backward", launch_pack_backward)


@_pack.register_fake
def _(qkv, q_gamma, k_gamma, rows, cu_k):
    shape = (qkv[0].shape[0], sum(x.shape[1] for x in qkv), *q_gamma[0].shape)
    return tuple(qkv[0].new_empty(shape) for _ in range(3))


@_pack_backward.register_fake
def _(grad_q, grad_k, grad_v, qkv, q_gamma, k_gamma, rows, cu_k):
    pairs = [gamma.new_empty(2, *gamma.shape, dtype=torch.float32) for gamma in q_gamma]
    return [x.new_empty(x.shape) for x in qkv] + pairs


def _setup(ctx, inputs, output):
    *lists, rows, cu_k = inputs
    ctx.modalities = len(lists[0])
    ctx.save_for_backward(*(value for values in lists for value in values), rows, cu_k)


def _autograd(ctx, grad_q, grad_k, grad_v):
    n, (*saved, rows, cu_k) = ctx.modalities, ctx.saved_tensors
    qkv, q_gamma, k_gamma = (list(saved[i : i + n]) for i in (0, n, 2 * n))
    grads = _pack_backward(grad_q, grad_k, grad_v, qkv, q_gamma, k_gamma, rows, cu_k)
    pairs = list(zip(grads[n:], q_gamma, k_gamma, strict=True))
    q_grads, k_grads = [pair[0].to(gq.dtype) for pair, gq, _ in pairs], [pair[1].to(gk.dtype) for pair, _, gk in pairs]
    return grads[:n], q_grads, k_grads, None, None


_pack.register_autograd(_autograd, setup_context=_setup)


def qk_norm_pack(
    qkv: list[Tensor],
    q_gamma: list[Tensor],
    k_gamma: list[Tensor],
    heads: int,
    packing: Packing | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint q, k, v (B, ΣL, H, Dh) from the qkv (B, L_m, 3·H·Dh) of each modality.

    The last dimension of qkv is ordered as (q, k, v), head, feature. q and k are normalized per head, x/‖x‖ · √Dh · γ,
    with γ (H, Dh) of each modality. All qkv have the same dtype. packing: of the key mask of the joint sequence; k and
    v then hold the packed rows, and the gradients of rows that nothing attends to are taken to be zero.
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
    if packing is not None:
        check_shape("packing", packing.rows, (first.shape[0], sum(x.shape[1] for x in qkv)))
        check_device(first.device, packing=packing.rows)
    if use_triton(backend, first, qkv=first, q_gamma=q_gamma[0], k_gamma=k_gamma[0]):
        rows, cu_k = (None, None) if packing is None else (packing.rows, packing.cu_k)
        return _pack(list(qkv), list(q_gamma), list(k_gamma), rows, cu_k)
    return reference.qk_norm_pack(qkv, q_gamma, k_gamma, heads, packing)
