"""`eps_mse`: mean squared error of an ε-prediction. The noise is regenerated from its keys, not stored.

Floor: forward reads ε̂ once; backward reads ε̂ once and writes its gradient once.
"""

import torch
from torch import Tensor

from . import reference
from .backend import block_size, check_floating, check_keys, custom_op, jit, tl, triton, use_triton, warps
from .random import normals_block

BLOCK = 1024


@jit
def _loss_kernel(p_eps, p_keys, p_sums, n, BLOCK: tl.constexpr):
    """One partial sum per block; `launch_loss` adds them in a fixed order."""
    i_sample = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_noise = normals_block(p_keys, i_sample, i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4), 0)
    b_error = tl.load(p_eps + i_sample * n + o, mask=m, other=0.0).to(tl.float32) - b_noise
    tl.store(p_sums + i_sample * tl.num_programs(1) + i_block, tl.sum(tl.where(m, b_error * b_error, 0.0), 0))


@jit
def _grad_kernel(p_eps, p_keys, p_grad, p_out, n, scale, BLOCK: tl.constexpr):
    i_sample = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_noise = normals_block(p_keys, i_sample, i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4), 0)
    b_error = tl.load(p_eps + i_sample * n + o, mask=m, other=0.0).to(tl.float32) - b_noise
    tl.store(p_out + i_sample * n + o, tl.load(p_grad + i_sample) * scale * b_error, mask=m)


def launch_loss(eps: Tensor, keys: Tensor) -> Tensor:
    n = eps[0].numel()
    block = block_size(n, BLOCK)
    sums = torch.empty(len(eps), triton.cdiv(n, block), device=eps.device)
    _loss_kernel[sums.shape](
        p_eps=eps.contiguous(),
        p_keys=keys.contiguous(),
        p_sums=sums,
        n=n,
        BLOCK=block,
        num_warps=warps(block),
    )
    return sums.sum(1) / n


def launch_grad(grad: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
    n = eps[0].numel()
    block = block_size(n, BLOCK)
    out = torch.empty_like(eps, memory_format=torch.contiguous_format)
    _grad_kernel[(len(eps), triton.cdiv(n, block))](
        p_eps=eps.contiguous(),
        p_keys=keys.contiguous(),
        p_grad=grad.contiguous(),
        p_out=out,
        n=n,
        scale=2.0 / n,
        BLOCK=block,
        num_warps=warps(block),
    )
    return out


_eps_mse = custom_op("eps_mse", launch_loss)
_eps_mse_backward = custom_op("eps_mse_backward", launch_grad)


@_eps_mse.register_fake
def _(eps, keys):
    return eps.new_empty(eps.shape[0], dtype=torch.float32)


@_eps_mse_backward.register_fake
def _(grad, eps, keys):
    return torch.empty_like(eps, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    return _eps_mse_backward(grad, *ctx.saved_tensors), None


_eps_mse.register_autograd(_autograd, setup_context=_setup)


def eps_mse(eps: Tensor, keys: Tensor, backend: str | None = None) -> Tensor:
    """(B,) float32 mean of (ε̂ − ε)² over each sample of eps (B, …); ε is the noise of `gaussian_perturb` with the
    same keys (B, 5)."""
    check_floating(eps=eps)
    check_keys(keys, eps)
    if use_triton(backend, eps, eps=eps) and eps.numel():
        return _eps_mse(eps, keys)
    return reference.eps_mse(eps, keys)
