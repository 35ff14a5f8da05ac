"""`eps_mse`: squared error against noise that is drawn again instead of stored, and its gradient.

Floor: forward, ε̂ read once; backward, ε̂ read once and its gradient written once.
"""

import torch
from torch import Tensor

from . import reference
from .backend import block_size, check_floating, check_keys, custom_op, jit, tl, triton, use_triton, warps
from .random import normals_block

BLOCK = 1024


@jit
def _loss_kernel(p_eps, p_keys, p_sums, n, BLOCK: tl.constexpr):
    """One partial sum per block; they are added up in a fixed order afterwards."""
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
    _loss_kernel[sums.shape](eps.contiguous(), keys.contiguous(), sums, n, BLOCK=block, num_warps=warps(block))
    return sums.sum(1) / n


def launch_grad(grad: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
    n = eps[0].numel()
    block = block_size(n, BLOCK)
    out = torch.empty_like(eps, memory_format=torch.contiguous_format)
    _grad_kernel[(len(eps), triton.cdiv(n, block))](
        eps.contiguous(),
        keys.contiguous(),
        grad.contiguous(),
        out,
        n,
        2.0 / n,
        BLOCK=block,
        num_warps=warps(block),
    )
    return out


@custom_op("eps_mse")
def _eps_mse(eps: Tensor, keys: Tensor) -> Tensor:
    return launch_loss(eps, keys)


@_eps_mse.register_fake
def _(eps, keys):
    return eps.new_empty(eps.shape[0], dtype=torch.float32)


@custom_op("eps_mse_backward")
def _eps_mse_backward(grad: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
    return launch_grad(grad, eps, keys)


@_eps_mse_backward.register_fake
def _(grad, eps, keys):
    return torch.empty_like(eps, memory_format=torch.contiguous_format)


_eps_mse.register_autograd(
    lambda ctx, grad: (_eps_mse_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def eps_mse(eps: Tensor, keys: Tensor, backend: str | None = None) -> Tensor:
    """(B,) float32: mean over the sample of (ε̂ − ε)², with ε the noise `gaussian_perturb` drew from the same keys."""
    check_floating(eps=eps)
    check_keys(keys, eps)
    return _eps_mse(eps, keys) if use_triton(backend, eps, eps=eps) and eps.numel() else reference.eps_mse(eps, keys)
