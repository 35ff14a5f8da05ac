"""Samples of q(x_t | x₀): `gaussian_perturb`, `mask_perturb`, `uniform_perturb`.

Floor: x₀ read once and x_t written once: 4 B per bfloat16 element, 8 B per float32 element, 16 B per int64 token.
The noise is generated in registers.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    PerSample,
    block_size,
    check,
    check_floating,
    check_keys,
    check_per_sample,
    check_tokens,
    custom_op,
    jit,
    per_sample,
    tl,
    triton,
    use_triton,
    warps,
)
from .random import normals_block, to_uniform, words_block


@jit
def _gaussian_kernel(p_x, p_alpha, p_sigma, p_keys, p_out, n, BLOCK: tl.constexpr):
    i_sample = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_noise = normals_block(p_keys, i_sample, i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4), 0)
    b_x = tl.load(p_x + i_sample * n + o, mask=m, other=0.0).to(tl.float32)
    alpha = tl.load(p_alpha + i_sample).to(tl.float32)
    sigma = tl.load(p_sigma + i_sample).to(tl.float32)
    tl.store(p_out + i_sample * n + o, alpha * b_x + sigma * b_noise, mask=m)


@jit
def _token_kernel(p_tokens, p_prob, p_keys, p_out, n, states, UNIFORM: tl.constexpr, BLOCK: tl.constexpr):
    """A noised token is drawn from `states` states if UNIFORM; otherwise it becomes the mask, index `states`."""
    i_sample = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    o_quad = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    m = o < n
    b_tokens = tl.load(p_tokens + i_sample * n + o, mask=m, other=0)
    noised = to_uniform(words_block(p_keys, i_sample, o_quad, 0)) <= tl.load(p_prob + i_sample).to(tl.float32)
    if UNIFORM:
        b_new = (words_block(p_keys, i_sample, o_quad, 1).to(tl.int64) * states) >> 32
    else:
        b_new = tl.full((BLOCK,), 0, tl.int64) + states
    tl.store(p_out + i_sample * n + o, tl.where(noised, b_new, b_tokens), mask=m)


def launch_gaussian(x: Tensor, alpha: Tensor, sigma: Tensor, keys: Tensor) -> Tensor:
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        n = x[0].numel()
        block = block_size(n, 1024)
        _gaussian_kernel[(len(x), triton.cdiv(n, block))](
            p_x=x,
            p_alpha=alpha,
            p_sigma=sigma,
            p_keys=keys.contiguous(),
            p_out=out,
            n=n,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


def launch_token(tokens: Tensor, prob: Tensor, keys: Tensor, states: int, uniform: bool) -> Tensor:
    tokens, out = tokens.contiguous(), torch.empty_like(tokens, memory_format=torch.contiguous_format)
    if tokens.numel():
        n = tokens[0].numel()
        block = block_size(n, 1024)
        _token_kernel[(len(tokens), triton.cdiv(n, block))](
            p_tokens=tokens,
            p_prob=prob,
            p_keys=keys.contiguous(),
            p_out=out,
            n=n,
            states=states,
            UNIFORM=uniform,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


_gaussian = custom_op("gaussian_perturb", launch_gaussian)
_token = custom_op("token_perturb", launch_token)


@_gaussian.register_fake
def _(x, alpha, sigma, keys):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_token.register_fake
def _(tokens, prob, keys, states, uniform):
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def gaussian_perturb(x: Tensor, alpha: PerSample, sigma: PerSample, keys: Tensor, backend: str | None = None) -> Tensor:
    """x_t = α x₀ + σ ε, ε ~ N(0, I). x₀ is `x` (B, …), alpha and sigma are (B,), keys (B, 5).

    Computes in float32 and returns x's dtype. Not differentiable: x₀ is data.
    """
    check_floating(x=x)
    check_per_sample(x, alpha=alpha, sigma=sigma)
    check_keys(keys, x)
    if use_triton(backend, x, x=x):
        return _gaussian(x, per_sample(alpha, x), per_sample(sigma, x), keys)
    return reference.gaussian_perturb(x, alpha, sigma, keys)


def mask_perturb(tokens: Tensor, prob: PerSample, keys: Tensor, mask_id: int, backend: str | None = None) -> Tensor:
    """Each token becomes mask_id with probability prob[b]. tokens (B, L) int64 in [0, mask_id]; prob (B,)."""
    check(mask_id > 0, "mask_id", f"must be positive, got {mask_id}")
    check_tokens("tokens", tokens, 0, mask_id)
    check_per_sample(tokens, prob=prob)
    check_keys(keys, tokens)
    if use_triton(backend, tokens):
        return _token(tokens, per_sample(prob, tokens), keys, mask_id, False)
    return reference.mask_perturb(tokens, prob, keys, mask_id)


def uniform_perturb(tokens: Tensor, prob: PerSample, keys: Tensor, states: int, backend: str | None = None) -> Tensor:
    """With probability prob[b] a token is resampled uniformly from `states` states. tokens (B, L) int64; prob (B,)."""
    check(states > 0, "states", f"must be positive, got {states}")
    check_tokens("tokens", tokens, 0, states - 1)
    check_per_sample(tokens, prob=prob)
    check_keys(keys, tokens)
    if use_triton(backend, tokens):
        return _token(tokens, per_sample(prob, tokens), keys, states, True)
    return reference.uniform_perturb(tokens, prob, keys, states)
