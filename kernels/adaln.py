"""`adaln_modulate`: layer norm, scaled and shifted per sample, forward and backward.

    y = (x − mean)/std · γ + β,   γ = scale or 1 + scale,   β = shift

Floor, per element of x: x is read and y is written, in the dtype that the following matrix product takes; the backward
pass reads x and the upstream gradient and writes one gradient. With float32 x and bfloat16 y 6 and 10 bytes. Scale and
shift are (B, D) and stay in cache; mean and 1/std are kept for the backward pass, 8 bytes a row.
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
)
from .row_tiles import backward_tile, normalized, normalized_gradient, run_sums, tile


@jit
def _adaln_kernel(
    p_x,
    p_scale,
    p_shift,
    p_out,
    p_mean,
    p_rstd,
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
    m_l, m_d = o_l < length, o_d < width
    m = m_l[:, None] & m_d[None, :]
    p_row = p_x + i_sample * stride_b + o_l[:, None] * stride_l + o_d[None, :]
    b_x = tl.load(p_row, mask=m, other=0.0).to(tl.float32)
    b_gamma = tl.load(p_scale + i_sample * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    if PLUS_ONE:
        b_gamma += 1.0
    b_shift = tl.load(p_shift + i_sample * stride_shift + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_normed, mean, rstd = normalized(b_x, m_d, width, eps)
    o_row = i_sample * length + o_l
    tl.store(p_out + o_row[:, None] * width + o_d[None, :], b_normed * b_gamma[None, :] + b_shift[None, :], mask=m)
    tl.store(p_mean + o_row, mean, mask=m_l)
    tl.store(p_rstd + o_row, rstd, mask=m_l)


@jit
def _adaln_backward_kernel(
    p_grad,
    p_grad_kept,
    p_x,
    p_mean,
    p_rstd,
    p_scale,
    p_grad_x,
    p_grad_scale,
    p_grad_shift,
    length,
    width,
    stride_b,
    stride_l,
    stride_scale,
    run,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p_grad_kept: the gradient of x from its other uses, which is added, or None."""
    i_sample = tl.program_id(0).to(tl.int64)
    i_run = tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    b_gamma = tl.load(p_scale + i_sample * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    if PLUS_ONE:
        b_gamma += 1.0
    b_sum_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    b_sum_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    end = tl.minimum(i_run * run + run, length)
    for start in range(i_run * run, end, ROWS):
        o_l = (start + tl.arange(0, ROWS)).to(tl.int64)
        m_l = o_l < end
        m = m_l[:, None] & m_d[None, :]
        o_row = i_sample * length + o_l
        o_out = o_row[:, None] * width + o_d[None, :]
        p_row = p_x + i_sample * stride_b + o_l[:, None] * stride_l + o_d[None, :]
        mean = tl.load(p_mean + o_row, mask=m_l, other=0.0)
        rstd = tl.load(p_rstd + o_row, mask=m_l, other=0.0)
        b_x = tl.load(p_row, mask=m, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + o_out, mask=m, other=0.0).to(tl.float32)
        if p_grad_kept is not None:
            b_kept = tl.load(p_grad_kept + o_out, mask=m, other=0.0).to(tl.float32)
        b_normed = tl.where(m_d[None, :], (b_x - mean[:, None]) * rstd[:, None], 0.0)
        b_sum_scale += b_grad * b_normed
        b_sum_shift += b_grad
        b_grad_x = normalized_gradient(b_grad * b_gamma[None, :], b_normed, rstd, width)
        if p_grad_kept is not None:
            b_grad_x += b_kept
        tl.store(p_grad_x + o_out, b_grad_x, mask=m)
    o_part = (i_sample * tl.num_programs(1) + i_run) * width + o_d
    tl.store(p_grad_scale + o_part, tl.sum(b_sum_scale, 0), mask=m_d)
    tl.store(p_grad_shift + o_part, tl.sum(b_sum_shift, 0), mask=m_d)


def launch_adaln(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, plus_one: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y, and mean and 1/std of every row, (2, B, L) float32."""
    x, scale, shift = (last_dim_contiguous(value) for value in (x, scale, shift))
    batch, length, width = x.shape
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    moments = torch.empty(2, batch, length, dtype=torch.float32, device=x.device)
    if x.numel():
        shape = tile("adaln_modulate", width, x.dtype)
        _adaln_kernel[(batch, triton.cdiv(length, shape["ROWS"]))](
            p_x=x,
            p_scale=scale,
            p_shift=shift,
            p_out=out,
            p_mean=moments[0],
            p_rstd=moments[1],
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
    return out, moments


def launch_adaln_backward(
    grad: Tensor, grad_kept: Tensor | None, x: Tensor, moments: Tensor, scale: Tensor, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, to which grad_kept is added, and those of scale and shift, (2, B, D) float32."""
    grad, x, scale = grad.contiguous(), last_dim_contiguous(x), last_dim_contiguous(scale)
    batch, length, width = x.shape
    shape, run = backward_tile("adaln_modulate_backward", width, x.dtype, batch, length)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = run_sums(2, x, run)
    if x.numel():
        _adaln_backward_kernel[parts.shape[1:3]](
            p_grad=grad,
            p_grad_kept=None if grad_kept is None else grad_kept.contiguous(),
            p_x=x,
            p_mean=moments[0],
            p_rstd=moments[1],
            p_scale=scale,
            p_grad_x=grad_x,
            p_grad_scale=parts[0],
            p_grad_shift=parts[1],
            length=length,
            width=width,
            stride_b=x.stride(0),
            stride_l=x.stride(1),
            stride_scale=scale.stride(0),
            run=run,
            PLUS_ONE=plus_one,
            **shape,
        )
    return grad_x, parts.sum(2)


_adaln = custom_op("adaln_modulate", launch_adaln)
_adaln_backward = custom_op("adaln_modulate_backward", launch_adaln_backward)


@_adaln.register_fake
def _(x, scale, shift, eps, plus_one, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


@_adaln_backward.register_fake
def _(grad, grad_kept, x, moments, scale, plus_one):
    return x.new_empty(x.shape), scale.new_empty((2, *scale.shape), dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, scale, shift, _, ctx.plus_one, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], scale)


def _autograd(ctx, grad, _):
    return *_gradients(ctx, grad, None), None, None, None


def _gradients(ctx, grad: Tensor, grad_kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, scale and shift, in their dtypes."""
    x, moments, scale = ctx.saved_tensors
    grad_x, (grad_scale, grad_shift) = _adaln_backward(grad, grad_kept, x, moments, scale, ctx.plus_one)
    return grad_x, grad_scale.to(scale.dtype), grad_shift.to(ctx.shift_dtype)


_adaln.register_autograd(_autograd, setup_context=_setup)


class KeepInput(torch.autograd.Function):
    """(x, y) of the arguments of `_adaln`: one backward kernel takes the gradients of both, so that none adds them."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps, plus_one, out_dtype):
        y, moments = _adaln(x, scale, shift, eps, plus_one, out_dtype)
        ctx.plus_one, ctx.shift_dtype = plus_one, shift.dtype
        ctx.save_for_backward(x, moments, scale)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx, grad_kept, grad):
        return *_gradients(ctx, grad, grad_kept), None, None, None


def check_rows(x: Tensor, branch: Tensor | None = None, **vectors: Tensor) -> None:
    """x and branch are (B, L, D), vectors (B, D), all floating and on one device."""
    check(x.ndim == 3 and x.shape[2] > 0, "x", f"must be (B, L, D), got {tuple(x.shape)}")
    check_floating(x=x, branch=branch, **vectors)
    check_device(x.device, branch=branch, **vectors)
    check_shape("branch", branch, x.shape)
    for name, value in vectors.items():
        check_shape(name, value, (x.shape[0], x.shape[2]))


def adaln_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    plus_one: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x)·γ + β without learned parameters. β = shift; γ = scale (MMDiT), or 1 + scale if plus_one (DiT).

    x (B, L, D); scale, shift (B, D). Computes in float32 and rounds once, to out_dtype or x's dtype.
    """
    check_rows(x, scale=scale, shift=shift)
    if use_triton(backend, x, x=x, scale=scale, shift=shift):
        return _adaln(x, scale, shift, eps, plus_one, out_dtype or x.dtype)[0]
    return reference.adaln_modulate(x, scale, shift, eps, plus_one, out_dtype)
