"""`gated_adaln`: a gated branch is added to the residual stream, and the sum is normalized and modulated.

    x' = x + gate · (branch + bias)
    y = (x' − mean)/std · γ + β,   γ = scale or 1 + scale,   β = shift

It joins the end of one branch of a transformer block with the start of the next one; both results are used, and one
backward kernel takes both of their gradients.

Floor, per element: x and the branch are read, x' and y are written; the backward pass reads x', the branch and the two
upstream gradients and writes the gradients of x and of the branch. With a float32 stream, a bfloat16 branch and y 12
and 18 bytes. Gate, scale and shift are (B, D), the bias (D,); they stay in cache. Mean and 1/std are kept for the
backward pass, 8 bytes a row.
"""

import torch
from torch import Tensor

from . import reference
from .adaln import KeepInput, check_rows
from .backend import check, custom_op, jit, last_dim_contiguous, tl, triton, use_triton
from .gated_residual import bias_gradient, check_bias, with_bias
from .row_tiles import backward_tile, normalized, normalized_gradient, run_sums, tile


@jit
def _gated_adaln_kernel(
    p_x,
    p_branch,
    p_gate,
    p_bias,
    p_scale,
    p_shift,
    p_sum,
    p_out,
    p_mean,
    p_rstd,
    length,
    width,
    stride_xb,
    stride_xl,
    stride_bb,
    stride_bl,
    stride_gate,
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
    p_row = p_x + i_sample * stride_xb + o_l[:, None] * stride_xl + o_d[None, :]
    b_x = tl.load(p_row, mask=m, other=0.0).to(tl.float32)
    p_row = p_branch + i_sample * stride_bb + o_l[:, None] * stride_bl + o_d[None, :]
    b_branch = with_bias(p_row, p_bias, o_d, m, m_d)
    b_gate = tl.load(p_gate + i_sample * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gamma = tl.load(p_scale + i_sample * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    if PLUS_ONE:
        b_gamma += 1.0
    b_shift = tl.load(p_shift + i_sample * stride_shift + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sum = (b_x + b_gate[None, :] * b_branch).to(p_sum.dtype.element_ty)
    o_row = i_sample * length + o_l
    o_out = o_row[:, None] * width + o_d[None, :]
    tl.store(p_sum + o_out, b_sum, mask=m)
    b_normed, mean, rstd = normalized(tl.where(m, b_sum.to(tl.float32), 0.0), m_d, width, eps)
    tl.store(p_out + o_out, b_normed * b_gamma[None, :] + b_shift[None, :], mask=m)
    tl.store(p_mean + o_row, mean, mask=m_l)
    tl.store(p_rstd + o_row, rstd, mask=m_l)


@jit
def _gated_adaln_backward_kernel(
    p_grad_sum,
    p_grad,
    p_sum,
    p_mean,
    p_rstd,
    p_branch,
    p_gate,
    p_bias,
    p_scale,
    p_grad_x,
    p_grad_branch,
    p_grad_scale,
    p_grad_shift,
    p_grad_gate,
    p_grad_total,
    length,
    width,
    stride_bb,
    stride_bl,
    stride_gate,
    stride_scale,
    run,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p_grad_sum, p_sum: of x'. With a bias, p_grad_total gets the sums of x's gradient, for the bias' gradient."""
    i_sample = tl.program_id(0).to(tl.int64)
    i_run = tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    b_gate = tl.load(p_gate + i_sample * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gamma = tl.load(p_scale + i_sample * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    if PLUS_ONE:
        b_gamma += 1.0
    b_sum_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    b_sum_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    b_sum_gate = tl.zeros((ROWS, BLOCK), tl.float32)
    b_total = tl.zeros((ROWS, BLOCK), tl.float32)
    end = tl.minimum(i_run * run + run, length)
    for start in range(i_run * run, end, ROWS):
        o_l = (start + tl.arange(0, ROWS)).to(tl.int64)
        m_l = o_l < end
        m = m_l[:, None] & m_d[None, :]
        o_row = i_sample * length + o_l
        o_out = o_row[:, None] * width + o_d[None, :]
        p_row = p_branch + i_sample * stride_bb + o_l[:, None] * stride_bl + o_d[None, :]
        mean = tl.load(p_mean + o_row, mask=m_l, other=0.0)
        rstd = tl.load(p_rstd + o_row, mask=m_l, other=0.0)
        b_x = tl.load(p_sum + o_out, mask=m, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + o_out, mask=m, other=0.0).to(tl.float32)
        b_branch = with_bias(p_row, p_bias, o_d, m, m_d)
        if p_grad_sum is not None:
            b_kept = tl.load(p_grad_sum + o_out, mask=m, other=0.0).to(tl.float32)
        b_normed = tl.where(m_d[None, :], (b_x - mean[:, None]) * rstd[:, None], 0.0)
        b_sum_scale += b_grad * b_normed
        b_sum_shift += b_grad
        b_grad_x = normalized_gradient(b_grad * b_gamma[None, :], b_normed, rstd, width)
        if p_grad_sum is not None:
            b_grad_x += b_kept
        tl.store(p_grad_x + o_out, b_grad_x, mask=m)
        tl.store(p_grad_branch + o_out, b_grad_x * b_gate[None, :], mask=m)
        b_sum_gate += b_grad_x * b_branch
        b_total += b_grad_x
    o_part = (i_sample * tl.num_programs(1) + i_run) * width + o_d
    tl.store(p_grad_scale + o_part, tl.sum(b_sum_scale, 0), mask=m_d)
    tl.store(p_grad_shift + o_part, tl.sum(b_sum_shift, 0), mask=m_d)
    tl.store(p_grad_gate + o_part, tl.sum(b_sum_gate, 0), mask=m_d)
    if p_bias is not None:
        tl.store(p_grad_total + o_part, tl.sum(b_total, 0), mask=m_d)


def launch_gated_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    plus_one: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', y, and mean and 1/std of every row of x', (2, B, L) float32."""
    x, branch, gate, scale, shift = (last_dim_contiguous(value) for value in (x, branch, gate, scale, shift))
    batch, length, width = x.shape
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    moments = torch.empty(2, batch, length, dtype=torch.float32, device=x.device)
    if x.numel():
        shape = tile("gated_adaln", width, x.dtype)
        _gated_adaln_kernel[(batch, triton.cdiv(length, shape["ROWS"]))](
            p_x=x,
            p_branch=branch,
            p_gate=gate,
            p_bias=bias,
            p_scale=scale,
            p_shift=shift,
            p_sum=total,
            p_out=out,
            p_mean=moments[0],
            p_rstd=moments[1],
            length=length,
            width=width,
            stride_xb=x.stride(0),
            stride_xl=x.stride(1),
            stride_bb=branch.stride(0),
            stride_bl=branch.stride(1),
            stride_gate=gate.stride(0),
            stride_scale=scale.stride(0),
            stride_shift=shift.stride(0),
            eps=eps,
            PLUS_ONE=plus_one,
            **shape,
        )
    return total, out, moments


def launch_gated_adaln_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    moments: Tensor,
    branch: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    plus_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the branch, of scale, shift and gate, (3, B, D), and of the bias, which is empty without one;
    the last two in float32.

    grad, grad_sum: of y and of x' = total, which need not be given."""
    grad, branch, gate, scale = grad.contiguous(), *(last_dim_contiguous(value) for value in (branch, gate, scale))
    batch, length, width = total.shape
    shape, run = backward_tile("gated_adaln_backward", width, total.dtype, batch, length)
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=total.device)
    parts = run_sums(3 if bias is None else 4, total, run)
    if total.numel():
        _gated_adaln_backward_kernel[parts.shape[1:3]](
            p_grad_sum=None if grad_sum is None else grad_sum.contiguous(),
            p_grad=grad,
            p_sum=total,
            p_mean=moments[0],
            p_rstd=moments[1],
            p_branch=branch,
            p_gate=gate,
            p_bias=bias,
            p_scale=scale,
            p_grad_x=grad_x,
            p_grad_branch=grad_branch,
            p_grad_scale=parts[0],
            p_grad_shift=parts[1],
            p_grad_gate=parts[2],
            p_grad_total=parts[-1],
            length=length,
            width=width,
            stride_bb=branch.stride(0),
            stride_bl=branch.stride(1),
            stride_gate=gate.stride(0),
            stride_scale=scale.stride(0),
            run=run,
            PLUS_ONE=plus_one,
            **shape,
        )
    sums = parts.sum(2)
    return grad_x, grad_branch, sums[:3], bias_gradient(sums, gate, bias)


_gated_adaln = custom_op("gated_adaln", launch_gated_adaln)
_gated_adaln_backward = custom_op("gated_adaln_backward", launch_gated_adaln_backward)


@_gated_adaln.register_fake
def _(x, branch, gate, bias, scale, shift, eps, plus_one, out_dtype):
    moments = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), moments


@_gated_adaln_backward.register_fake
def _(grad, grad_sum, total, moments, branch, gate, bias, scale, plus_one):
    sums = gate.new_empty((3, *gate.shape), dtype=torch.float32)
    empty = gate.new_empty(0 if bias is None else bias.shape, dtype=torch.float32)
    return total.new_empty(total.shape), branch.new_empty(branch.shape), sums, empty


def _setup(ctx, inputs, output):
    _, branch, gate, bias, scale, shift, _, ctx.plus_one, _ = inputs
    total, _, moments = output
    ctx.shift_dtype = shift.dtype
    ctx.mark_non_differentiable(moments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, moments, branch, gate, bias, scale)


def _autograd(ctx, grad_sum, grad, _):
    total, moments, branch, gate, bias, scale = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(total)
    grad_x, grad_branch, (grad_scale, grad_shift, grad_gate), grad_bias = _gated_adaln_backward(
        grad, grad_sum, total, moments, branch, gate, bias, scale, ctx.plus_one
    )
    vectors = grad_gate.to(gate.dtype), None if bias is None else grad_bias.to(bias.dtype)
    return grad_x, grad_branch, *vectors, grad_scale.to(scale.dtype), grad_shift.to(ctx.shift_dtype), None, None, None


_gated_adaln.register_autograd(_autograd, setup_context=_setup)


class CompiledForward(torch.autograd.Function):
    """(x', y) of the arguments of `_gated_adaln` in plain PyTorch, which the compiler joins with what casts y to fp8.

    The backward pass is the kernel's.
    """

    @staticmethod
    def forward(ctx, x, branch, gate, bias, scale, shift, eps, plus_one, out_dtype):
        total = reference.gated_residual(x, branch, gate, bias).contiguous()
        normed, mean, rstd = torch.native_layer_norm(total.float(), total.shape[-1:], None, None, eps)
        gamma = scale.float() + 1.0 if plus_one else scale.float()
        ctx.plus_one, ctx.shift_dtype = plus_one, shift.dtype
        ctx.save_for_backward(total, torch.stack((mean[..., 0], rstd[..., 0])), branch, gate, bias, scale)
        return total, (normed * gamma[:, None] + shift.float()[:, None]).to(out_dtype)

    @staticmethod
    def backward(ctx, grad_sum, grad):
        return _autograd(ctx, grad_sum, grad, None)


def gated_adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    plus_one: bool = False,
    out_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    compiled_forward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·(branch + bias) in x's dtype, and y = LayerNorm(x')·γ + β in out_dtype or x's dtype.

    β = shift; γ = scale (MMDiT), or 1 + scale if plus_one (DiT). x, branch (B, L, D); gate, scale, shift (B, D); bias
    (D,) or None for 0. Without a branch and a gate, both None, x' is x. Computes in float32; x' is rounded before y.
    compiled_forward: see `CompiledForward`; only with a branch.
    """
    check((branch is None) == (gate is None), "gate", "must be given with a branch, and None without one")
    check(branch is not None or bias is None, "bias", "must be None without a branch")
    vectors = {"scale": scale, "shift": shift} | ({} if gate is None else {"gate": gate})
    check_rows(x, branch, **vectors)
    check_bias(x, bias)
    options = eps, plus_one, out_dtype or x.dtype
    if not use_triton(backend, x, x=x, branch=branch, bias=bias, **vectors):
        return reference.gated_adaln(x, branch, gate, scale, shift, *options, bias)
    if branch is None or gate is None:
        return KeepInput.apply(x, scale, shift, *options)
    if compiled_forward:
        return CompiledForward.apply(x, branch, gate, bias, scale, shift, *options)
    return _gated_adaln(x, branch, gate, bias, scale, shift, *options)[:2]
