"""`adaln_modulate` and `gated_residual`, forward and backward.

Floor, per element of x: `adaln_modulate` reads x and writes the result; its backward reads x and the upstream gradient
and writes one gradient. `gated_residual` reads x and the branch and writes the sum; its backward reads the upstream
gradient and the branch and writes the branch's gradient. Scale, shift and gate are (B, D) and stay in cache.

In the backward passes a program covers consecutive rows of one sample (a run). The sums for scale, shift and gate are
computed per run and then added in a fixed order, so that results are deterministic.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    check,
    check_device,
    check_floating,
    check_shape,
    custom_op,
    jit,
    last_dim_contiguous,
    tl,
    triton,
    use_triton,
    warps,
)
from .tiles import measured

TILE = 2048
PROGRAMS = 2048


@jit
def normalized(p_x, o_d, m_d, m, width, eps):
    """(rows, D) float32 (x − mean)/std and (rows,) 1/std."""
    b_x = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    b_centered = tl.where(m_d[None, :], b_x - (tl.sum(b_x, 1) / width)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_centered * b_centered, 1) / width + eps)
    return b_centered * rstd[:, None], rstd


@jit
def _adaln_kernel(
    p_x,
    p_scale,
    p_shift,
    p_out,
    length,
    width,
    stride_b,
    stride_l,
    stride_scale,
    stride_shift,
    eps,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sample = tl.program_id(0).to(tl.int64)
    o_l = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    m = (o_l < length)[:, None] & m_d[None, :]
    b_normed, _ = normalized(
        p_x + i_sample * stride_b + o_l[:, None] * stride_l + o_d[None, :], o_d, m_d, m, width, eps
    )
    b_gamma = tl.load(p_scale + i_sample * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    if PLUS_ONE:
        b_gamma += 1.0
    b_shift = tl.load(p_shift + i_sample * stride_shift + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_row = p_out + (i_sample * length + o_l[:, None]) * width + o_d[None, :]
    tl.store(p_row, b_normed * b_gamma[None, :] + b_shift[None, :], mask=m)


@jit
def _adaln_backward_kernel(
    p_grad,
    p_x,
    p_scale,
    p_grad_x,
    p_grad_scale,
    p_grad_shift,
    length,
    width,
    stride_b,
    stride_l,
    stride_scale,
    eps,
    run,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sample = tl.program_id(0).to(tl.int64)
    i_run = tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    b_gamma = tl.load(p_scale + i_sample * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    if PLUS_ONE:
        b_gamma += 1.0
    b_sum_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    b_sum_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(i_run * run, tl.minimum(i_run * run + run, length), ROWS):
        o_l = (start + tl.arange(0, ROWS)).to(tl.int64)
        m = (o_l < tl.minimum(i_run * run + run, length))[:, None] & m_d[None, :]
        b_normed, rstd = normalized(
            p_x + i_sample * stride_b + o_l[:, None] * stride_l + o_d[None, :], o_d, m_d, m, width, eps
        )
        o_out = (i_sample * length + o_l[:, None]) * width + o_d[None, :]
        b_grad = tl.load(p_grad + o_out, mask=m, other=0.0).to(tl.float32)
        b_sum_scale += b_grad * b_normed
        b_sum_shift += b_grad
        b_grad = b_grad * b_gamma[None, :]
        mean = tl.sum(b_grad, 1) / width
        slope = tl.sum(b_grad * b_normed, 1) / width
        b_grad_x = (b_grad - mean[:, None] - b_normed * slope[:, None]) * rstd[:, None]
        tl.store(p_grad_x + o_out, b_grad_x, mask=m)
    o_part = (i_sample * tl.num_programs(1) + i_run) * width + o_d
    tl.store(p_grad_scale + o_part, tl.sum(b_sum_scale, 0), mask=m_d)
    tl.store(p_grad_shift + o_part, tl.sum(b_sum_shift, 0), mask=m_d)


@jit
def _gate_kernel(
    p_x,
    p_branch,
    p_gate,
    p_out,
    length,
    width,
    stride_xb,
    stride_xl,
    stride_bb,
    stride_bl,
    stride_gate,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sample = tl.program_id(0).to(tl.int64)
    o_l = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK)[None, :]
    m = (o_l < length) & (o_d < width)
    b_gate = tl.load(p_gate + i_sample * stride_gate + o_d, mask=o_d < width, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_sample * stride_xb + o_l * stride_xl + o_d, mask=m, other=0.0).to(tl.float32)
    b_branch = tl.load(p_branch + i_sample * stride_bb + o_l * stride_bl + o_d, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + (i_sample * length + o_l) * width + o_d, b_x + b_gate * b_branch, mask=m)


@jit
def _gate_backward_kernel(
    p_grad,
    p_branch,
    p_gate,
    p_grad_branch,
    p_grad_gate,
    length,
    width,
    stride_bb,
    stride_bl,
    stride_gate,
    run,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sample = tl.program_id(0).to(tl.int64)
    i_run = tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    b_gate = tl.load(p_gate + i_sample * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(i_run * run, tl.minimum(i_run * run + run, length), ROWS):
        o_l = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        m = (o_l < tl.minimum(i_run * run + run, length)) & m_d[None, :]
        o_out = (i_sample * length + o_l) * width + o_d[None, :]
        p_row = p_branch + i_sample * stride_bb + o_l * stride_bl + o_d[None, :]
        b_grad = tl.load(p_grad + o_out, mask=m, other=0.0).to(tl.float32)
        b_sum += b_grad * tl.load(p_row, mask=m, other=0.0).to(tl.float32)
        tl.store(p_grad_branch + o_out, b_grad * b_gate[None, :], mask=m)
    tl.store(p_grad_gate + (i_sample * tl.num_programs(1) + i_run) * width + o_d, tl.sum(b_sum, 0), mask=m_d)


def tile(op: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows, features and warps of a tile of about TILE elements. Entries of `tiles.json` override the defaults."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    default = {"ROWS": min(rows, 64), "BLOCK": block, "num_warps": warps(min(rows, 64) * block)}
    return default | measured(op, width, dtype)


def backward_tile(op: str, width: int, dtype: torch.dtype, batch: int, length: int) -> tuple[dict[str, int], int]:
    """The tile of a backward kernel and the rows per run: whole tiles, for about PROGRAMS programs in total."""
    shape = tile(op, width, dtype)
    programs, rows = shape.pop("programs", PROGRAMS), shape["ROWS"]
    runs = max(1, min(triton.cdiv(length, rows), programs // max(1, batch)))
    return shape, max(1, triton.cdiv(triton.cdiv(length, runs), rows)) * rows


def launch_adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float, plus_one: bool) -> Tensor:
    x, scale, shift = (last_dim_contiguous(value) for value in (x, scale, shift))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, width = x.shape
    if x.numel():
        shape = tile("adaln_modulate", width, x.dtype)
        _adaln_kernel[(batch, triton.cdiv(length, shape["ROWS"]))](
            p_x=x,
            p_scale=scale,
            p_shift=shift,
            p_out=out,
            length=length,
            width=width,
            stride_b=x.stride(0),
            stride_l=x.stride(1),
            stride_scale=scale.stride(0),
            stride_shift=shift.stride(0),
            eps=eps,
            PLUS_ONE=plus_one,
            **shape,
        )
    return out


def launch_adaln_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift; the last two in float32."""
    grad, x, scale = grad.contiguous(), last_dim_contiguous(x), last_dim_contiguous(scale)
    batch, length, width = x.shape
    shape, run = backward_tile("adaln_modulate_backward", width, x.dtype, batch, length)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = torch.zeros(2, batch, triton.cdiv(length, run), width, device=x.device)
    if x.numel():
        _adaln_backward_kernel[parts.shape[1:3]](
            p_grad=grad,
            p_x=x,
            p_scale=scale,
            p_grad_x=grad_x,
            p_grad_scale=parts[0],
            p_grad_shift=parts[1],
            length=length,
            width=width,
            stride_b=x.stride(0),
            stride_l=x.stride(1),
            stride_scale=scale.stride(0),
            eps=eps,
            run=run,
            PLUS_ONE=plus_one,
            **shape,
        )
    return grad_x, parts[0].sum(1), parts[1].sum(1)


def launch_gate(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    x, branch, gate = (last_dim_contiguous(value) for value in (x, branch, gate))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, width = x.shape
    if x.numel():
        shape = tile("gated_residual", width, x.dtype)
        _gate_kernel[(batch, triton.cdiv(length, shape["ROWS"]))](
            p_x=x,
            p_branch=branch,
            p_gate=gate,
            p_out=out,
            length=length,
            width=width,
            stride_xb=x.stride(0),
            stride_xl=x.stride(1),
            stride_bb=branch.stride(0),
            stride_bl=branch.stride(1),
            stride_gate=gate.stride(0),
            **shape,
        )
    return out


def launch_gate_backward(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of branch and gate; the latter in float32."""
    grad, branch, gate = grad.contiguous(), last_dim_contiguous(branch), last_dim_contiguous(gate)
    batch, length, width = branch.shape
    shape, run = backward_tile("gated_residual_backward", width, grad.dtype, batch, length)
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    parts = torch.zeros(batch, triton.cdiv(length, run), width, device=branch.device)
    if branch.numel():
        _gate_backward_kernel[parts.shape[:2]](
            p_grad=grad,
            p_branch=branch,
            p_gate=gate,
            p_grad_branch=grad_branch,
            p_grad_gate=parts,
            length=length,
            width=width,
            stride_bb=branch.stride(0),
            stride_bl=branch.stride(1),
            stride_gate=gate.stride(0),
            run=run,
            **shape,
        )
    return grad_branch, parts.sum(1)


_adaln = custom_op("adaln_modulate", launch_adaln)
_adaln_backward = custom_op("adaln_modulate_backward", launch_adaln_backward)
_gate = custom_op("gated_residual", launch_gate)
_gate_backward = custom_op("gated_residual_backward", launch_gate_backward)


@_adaln.register_fake
@_gate.register_fake
def _(x, *others):
    return x.new_empty(x.shape)


@_adaln_backward.register_fake
def _(grad, x, scale, eps, plus_one):
    rows = scale.new_empty(scale.shape, dtype=torch.float32)
    return x.new_empty(x.shape), rows, torch.empty_like(rows)


@_gate_backward.register_fake
def _(grad, branch, gate):
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape, dtype=torch.float32)


def _setup_adaln(ctx, inputs, output):
    x, scale, shift, ctx.eps, ctx.plus_one = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale)


def _autograd_adaln(ctx, grad):
    x, scale = ctx.saved_tensors
    grad_x, grad_scale, grad_shift = _adaln_backward(grad, x, scale, ctx.eps, ctx.plus_one)
    return grad_x, grad_scale.to(scale.dtype), grad_shift.to(ctx.shift_dtype), None, None


def _setup_gate(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _autograd_gate(ctx, grad):
    branch, gate = ctx.saved_tensors
    grad_branch, grad_gate = _gate_backward(grad, branch, gate)
    return grad, grad_branch, grad_gate.to(gate.dtype)


_adaln.register_autograd(_autograd_adaln, setup_context=_setup_adaln)
_gate.register_autograd(_autograd_gate, setup_context=_setup_gate)


def _check(x: Tensor, **others: Tensor) -> None:
    check(x.ndim == 3 and x.shape[2] > 0, "x", f"must be (B, L, D), got {tuple(x.shape)}")
    check_floating(x=x, **others)
    check_device(x.device, **others)
    for name, value in others.items():
        check_shape(name, value, x.shape if name == "branch" else (x.shape[0], x.shape[2]))


def adaln_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    plus_one: bool = False,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x)·γ + β without learned parameters. β = shift; γ = scale (MMDiT), or 1 + scale if plus_one (DiT).

    x (B, L, D); scale, shift (B, D). Computes in float32 and returns x's dtype.
    """
    _check(x, scale=scale, shift=shift)
    if use_triton(backend, x, x=x, scale=scale, shift=shift):
        return _adaln(x, scale, shift, eps, plus_one)
    return reference.adaln_modulate(x, scale, shift, eps, plus_one)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, backend: str | None = None) -> Tensor:
    """x + gate·branch. x, branch (B, L, D); gate (B, D). Returns x's dtype."""
    _check(x, branch=branch, gate=gate)
    if use_triton(backend, x, x=x, branch=branch, gate=gate):
        return _gate(x, branch, gate)
    return reference.gated_residual(x, branch, gate)
