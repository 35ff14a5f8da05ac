"""`gated_residual`: the sum of a residual stream and a gated branch, forward and backward.

    x + gate · (branch + bias)

Floor, per element: x and the branch are read, the sum is written; the backward pass reads the upstream gradient, which
is also that of x, and the branch, and writes the branch's gradient. With a float32 stream and a bfloat16 branch 10 and
8 bytes. The gate is (B, D), the bias (D,); both stay in cache. A bias given here instead of to the linear layer before
saves the reading of the branch's gradient for the bias' gradient.
"""

import torch
from torch import Tensor

from . import reference
from .adaln import check_rows
from .backend import (
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
from .row_tiles import backward_tile, run_sums, tile


@jit
def with_bias(p_branch, p_bias, o_d, m, m_d):
    """A tile of the branch, float32, with the bias added unless it is None."""
    b_branch = tl.load(p_branch, mask=m, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_branch += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    return b_branch


@jit
def _gate_kernel(
    p_x,
    p_branch,
    p_gate,
    p_bias,
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
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    m = (o_l < length) & m_d[None, :]
    b_gate = tl.load(p_gate + i_sample * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_sample * stride_xb + o_l * stride_xl + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    p_row = p_branch + i_sample * stride_bb + o_l * stride_bl + o_d[None, :]
    b_branch = with_bias(p_row, p_bias, o_d, m, m_d)
    tl.store(p_out + (i_sample * length + o_l) * width + o_d[None, :], b_x + b_gate[None, :] * b_branch, mask=m)


@jit
def _gate_backward_kernel(
    p_grad,
    p_branch,
    p_gate,
    p_bias,
    p_grad_branch,
    p_grad_gate,
    p_grad_sum,
    length,
    width,
    stride_bb,
    stride_bl,
    stride_gate,
    run,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With a bias, p_grad_sum gets the sums of the upstream gradient, of which the bias' gradient is made."""
    i_sample = tl.program_id(0).to(tl.int64)
    i_run = tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    b_gate = tl.load(p_gate + i_sample * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sum_gate = tl.zeros((ROWS, BLOCK), tl.float32)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    end = tl.minimum(i_run * run + run, length)
    for start in range(i_run * run, end, ROWS):
        o_l = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        m = (o_l < end) & m_d[None, :]
        o_out = (i_sample * length + o_l) * width + o_d[None, :]
        p_row = p_branch + i_sample * stride_bb + o_l * stride_bl + o_d[None, :]
        b_grad = tl.load(p_grad + o_out, mask=m, other=0.0).to(tl.float32)
        b_sum_gate += b_grad * with_bias(p_row, p_bias, o_d, m, m_d)
        b_sum += b_grad
        tl.store(p_grad_branch + o_out, b_grad * b_gate[None, :], mask=m)
    o_part = (i_sample * tl.num_programs(1) + i_run) * width + o_d
    tl.store(p_grad_gate + o_part, tl.sum(b_sum_gate, 0), mask=m_d)
    if p_bias is not None:
        tl.store(p_grad_sum + o_part, tl.sum(b_sum, 0), mask=m_d)


def launch_gate(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    x, branch, gate = (last_dim_contiguous(value) for value in (x, branch, gate))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, width = x.shape
    if x.numel():
        shape = tile("gated_residual", width, x.dtype)
        _gate_kernel[(batch, triton.cdiv(length, shape["ROWS"]))](
            p_x=x,
            p_branch=branch,
            p_gate=gate,
            p_bias=bias,
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


def launch_gate_backward(
    grad: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the branch, of the gate, and of the bias, which is empty without one; the last two in float32."""
    grad, branch, gate = grad.contiguous(), last_dim_contiguous(branch), last_dim_contiguous(gate)
    batch, length, width = branch.shape
    shape, run = backward_tile("gated_residual_backward", width, grad.dtype, batch, length)
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    parts = run_sums(1 if bias is None else 2, branch, run)
    if branch.numel():
        _gate_backward_kernel[parts.shape[1:3]](
            p_grad=grad,
            p_branch=branch,
            p_gate=gate,
            p_bias=bias,
            p_grad_branch=grad_branch,
            p_grad_gate=parts[0],
            p_grad_sum=parts[-1],
            length=length,
            width=width,
            stride_bb=branch.stride(0),
            stride_bl=branch.stride(1),
            stride_gate=gate.stride(0),
            run=run,
            **shape,
        )
    sums = parts.sum(2)
    return grad_branch, sums[0], bias_gradient(sums, gate, bias)


def bias_gradient(sums: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """(D,) float32: Σ gate · (the sum over positions of the gradient of the residual, the last one of `sums`)."""
    return sums.new_empty(0) if bias is None else (gate.float() * sums[-1]).sum(0)


_gate = custom_op("gated_residual", launch_gate)
_gate_backward = custom_op("gated_residual_backward", launch_gate_backward)


@_gate.register_fake
def _(x, branch, gate, bias):
    return x.new_empty(x.shape)


@_gate_backward.register_fake
def _(grad, branch, gate, bias):
    empty = gate.new_empty(0 if bias is None else bias.shape, dtype=torch.float32)
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape, dtype=torch.float32), empty


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _autograd(ctx, grad):
    branch, gate, bias = ctx.saved_tensors
    grad_branch, grad_gate, grad_bias = _gate_backward(grad, branch, gate, bias)
    return grad, grad_branch, grad_gate.to(gate.dtype), None if bias is None else grad_bias.to(bias.dtype)


_gate.register_autograd(_autograd, setup_context=_setup)


def check_bias(x: Tensor, bias: Tensor | None) -> None:
    """bias is None or (D,) like the rows of x."""
    check_floating(bias=bias)
    check_device(x.device, bias=bias)
    check_shape("bias", bias, x.shape[-1:])


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """x + gate·(branch + bias). x, branch (B, L, D); gate (B, D); bias (D,) or None for 0. Returns x's dtype."""
    check_rows(x, branch, gate=gate)
    check_bias(x, bias)
    if use_triton(backend, x, x=x, branch=branch, gate=gate, bias=bias):
        return _gate(x, branch, gate, bias)
    return reference.gated_residual(x, branch, gate, bias)
