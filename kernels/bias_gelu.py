"""`bias_gelu`: a bias and GELU, with the error function, after a matrix product; forward and backward.

    y = z · Φ(z),   z = x + bias,   Φ the standard normal distribution function

Floor, per element: x is read and y written; the backward pass reads x and the upstream gradient and writes that of x,
and the bias' gradient costs no pass of its own. With bfloat16 4 and 6 bytes.

In the backward pass a program covers some features of a run of rows; the runs' sums are added in a fixed order.
"""

import torch
from torch import Tensor

from . import reference
from .backend import check, check_device, check_floating, check_shape, custom_op, jit, tl, triton, use_triton
from .tiles import measured

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1/√(2π)
ROWS, COLUMNS = 16, 64  # of a tile: 16 bytes a thread, 128 a row
PROGRAMS = 3072  # of the backward pass; 132 SMs hold 1,584 at a time


@jit
def biased(p_x, p_bias, o, o_d, m, m_d):
    """x + bias and Φ of it, float32."""
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_z = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]
    return b_z, 0.5 + 0.5 * tl.erf(b_z * SQRT_HALF)


@jit
def _gelu_kernel(p_x, p_bias, p_out, n, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < width
    m = (o_n < n)[:, None] & m_d[None, :]
    o = o_n[:, None] * width + o_d[None, :]
    b_z, b_phi = biased(p_x, p_bias, o, o_d, m, m_d)
    tl.store(p_out + o, b_z * b_phi, mask=m)


@jit
def _gelu_backward_kernel(
    p_grad, p_x, p_bias, p_grad_x, p_sums, n, width, run, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    i_run = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < width
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum(i_run * run + run, n)
    for start in range(i_run * run, end, ROWS):
        o_n = start + tl.arange(0, ROWS)
        m = (o_n < end)[:, None] & m_d[None, :]
        o = o_n[:, None] * width + o_d[None, :]
        b_z, b_phi = biased(p_x, p_bias, o, o_d, m, m_d)
        b_slope = b_phi + b_z * tl.exp(-0.5 * b_z * b_z) * DENSITY
        b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32) * b_slope
        b_sum += b_grad
        tl.store(p_grad_x + o, b_grad, mask=m)
    tl.store(p_sums + i_run * width + o_d, tl.sum(b_sum, 0), mask=m_d)


def tile(op: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows, features and warps of a tile. Entries of `tiles.json` override the defaults."""
    return {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4} | measured(op, width, dtype)


def launch_gelu(x: Tensor, bias: Tensor) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        n, shape = x.numel() // width, tile("bias_gelu", width, x.dtype)
        _gelu_kernel[(triton.cdiv(n, shape["ROWS"]), triton.cdiv(width, shape["COLUMNS"]))](
            p_x=x, p_bias=bias.contiguous(), p_out=out, n=n, width=width, **shape
        )
    return out


def launch_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the bias; the latter in float32."""
    grad, x, width = grad.contiguous(), x.contiguous(), x.shape[-1]
    n, shape = x.numel() // width, tile("bias_gelu_backward", width, x.dtype)
    blocks = triton.cdiv(width, shape["COLUMNS"])
    runs = max(1, shape.pop("programs", PROGRAMS) // blocks)
    run = triton.cdiv(max(1, triton.cdiv(n, runs)), shape["ROWS"]) * shape["ROWS"]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(triton.cdiv(n, run), width, dtype=torch.float32, device=x.device)
    if x.numel():
        _gelu_backward_kernel[(sums.shape[0], blocks)](
            p_grad=grad,
            p_x=x,
            p_bias=bias.contiguous(),
            p_grad_x=grad_x,
            p_sums=sums,
            n=n,
            width=width,
            run=run,
            **shape,
        )
    return grad_x, sums.sum(0)


_gelu = custom_op("bias_gelu", launch_gelu)
_gelu_backward = custom_op("bias_gelu_backward", launch_gelu_backward)


@_gelu.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@_gelu_backward.register_fake
def _(grad, x, bias):
    return x.new_empty(x.shape), bias.new_empty(bias.shape, dtype=torch.float32)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _gelu_backward(grad, x, bias)
    return grad_x, grad_bias.to(bias.dtype)


_gelu.register_autograd(_autograd, setup_context=_setup)


class CompiledForward(torch.autograd.Function):
    """The same in plain PyTorch, which the compiler joins with what casts the result to fp8.

    The backward pass is the kernel's.
    """

    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return reference.bias_gelu(x, bias)

    @staticmethod
    def backward(ctx, grad):
        return _autograd(ctx, grad)


def bias_gelu(x: Tensor, bias: Tensor, compiled_forward: bool = False, backend: str | None = None) -> Tensor:
    """GELU(x + bias), with the error function. x (…, D), bias (D,). Computes in float32 and returns x's dtype.

    compiled_forward: see `CompiledForward`.
    """
    check(x.ndim >= 2 and x.shape[-1] > 0, "x", f"must be (…, D), got {tuple(x.shape)}")
    check_floating(x=x, bias=bias)
    check_device(x.device, bias=bias)
    check_shape("bias", bias, x.shape[-1:])
    if use_triton(backend, x, x=x, bias=bias):
        return CompiledForward.apply(x, bias) if compiled_forward else _gelu(x, bias)
    return reference.bias_gelu(x, bias)
