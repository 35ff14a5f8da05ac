"""Philox-4x32-10 in Triton, and the operations `uniform` and `normal`.

The layout is that of `philox`, the formulas are those of `reference`: element e of a sample is word e % 4 of the block
with counter e // 4. The four words of a block are computed together and interleaved.
Floor of the operations: 4 B written per number.
"""

import torch
from torch import Tensor

from . import reference
from .backend import block_size, check, check_keys, custom_op, jit, tl, triton, use_triton, warps


@jit
def words4(p_keys, i_sample, o_quad, SUB: tl.constexpr):
    """The four uint32 words of the blocks o_quad of sample i_sample, a scalar or a tensor that broadcasts."""
    p = p_keys + i_sample * 5
    seed = tl.load(p) | (tl.load(p + 1) << 32)
    c1 = tl.load(p + 2).to(tl.uint32)
    c2 = tl.load(p + 3).to(tl.uint32)
    c3 = (tl.load(p + 4) + SUB).to(tl.uint32)
    return tl.philox(seed, o_quad.to(tl.uint32), c1, c2, c3)


@jit
def in_order(a, b, c, d):
    """Four (…, n) blocks of words 0, 1, 2, 3 as one (…, 4n) block of elements."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@jit
def to_uniform(word):
    """(w + ½)·2⁻³² in (0, 1]."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@jit
def words_at(p_keys, i_sample, o, SUB: tl.constexpr):
    """The words of single elements o, in any order. Computes four words for each one it returns."""
    a, b, c, d = words4(p_keys, i_sample, o // 4, SUB)
    i_word = o % 4
    return tl.where(i_word < 2, tl.where(i_word == 0, a, b), tl.where(i_word == 2, c, d))


@jit
def uniforms_at(p_keys, i_sample, o, SUB: tl.constexpr):
    return to_uniform(words_at(p_keys, i_sample, o, SUB))


@jit
def words_block(p_keys, i_sample, o_quad, SUB: tl.constexpr):
    """The 4n words of n blocks, in order."""
    a, b, c, d = words4(p_keys, i_sample, o_quad, SUB)
    return in_order(a, b, c, d)


@jit
def box_muller(radius_word, angle_word):
    """Two standard normals by the Box–Muller transform.

    The angle 2πu is reduced by quarter turns to ±π/4, where short polynomials are exact to float32. The library's sine
    has a slow path for huge angles, which makes the kernel spill registers.
    """
    radius = tl.sqrt(-2.0 * tl.log(to_uniform(radius_word)))
    turn = to_uniform(angle_word)
    quarter = tl.floor(turn * 4.0 + 0.5)
    x = (turn - quarter * 0.25) * 6.283185307179586
    s = x * x
    sin = x + x * s * (-1.6666654611e-1 + s * (8.3321608736e-3 - s * 1.9515295891e-4))
    cos = 1.0 - 0.5 * s + s * s * (4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5))
    i_quarter = quarter.to(tl.int32) & 3
    odd = (i_quarter & 1) == 1
    cos_turn = tl.where(odd, sin, cos)
    sin_turn = tl.where(odd, cos, sin)
    cos_turn = tl.where((i_quarter == 1) | (i_quarter == 2), -cos_turn, cos_turn)
    sin_turn = tl.where(i_quarter >= 2, -sin_turn, sin_turn)
    return radius * cos_turn, radius * sin_turn


@jit
def normals_block(p_keys, i_sample, o_quad, SUB: tl.constexpr):
    """The 4n normals of n blocks, in order."""
    w0, w1, w2, w3 = words4(p_keys, i_sample, o_quad, SUB)
    a, b = box_muller(w0, w1)
    c, d = box_muller(w2, w3)
    return in_order(a, b, c, d)


@jit
def log_exponential(word):
    """log E of E = −log(1 − u) ~ Exp(1).

    log(1 − u) is computed as log(w)·u/(1 − w) with w = 1 − u as rounded, which corrects for the rounding. A plain
    log(1 − u) in float32 would return 0 for u below 2⁻²⁴.
    """
    u = tl.minimum(to_uniform(word), 0.99999994)
    w = 1.0 - u
    exact = w == 1.0
    e = tl.where(exact, u, -tl.log(w) * (u / tl.where(exact, 1.0, 1.0 - w)))
    return tl.log(e)


@jit
def _draw_kernel(p_keys, p_out, n, SUB: tl.constexpr, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    i_sample = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_quad = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    if NORMAL:
        b_out = normals_block(p_keys, i_sample, o_quad, SUB)
    else:
        b_out = to_uniform(words_block(p_keys, i_sample, o_quad, SUB))
    tl.store(p_out + i_sample * n + o, b_out, mask=o < n)


def launch_draw(keys: Tensor, n: int, sub: int, normal: bool) -> Tensor:
    out = torch.empty(len(keys), n, device=keys.device)
    block = block_size(n, 1024)
    if out.numel():
        _draw_kernel[(len(keys), triton.cdiv(n, block))](
            p_keys=keys.contiguous(),
            p_out=out,
            n=n,
            SUB=sub,
            NORMAL=normal,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


_draw = custom_op("draw", launch_draw)


@_draw.register_fake
def _(keys, n, sub, normal):
    return keys.new_empty(keys.shape[0], n, dtype=torch.float32)


def uniform(keys: Tensor, n: int, sub: int = 0, backend: str | None = None) -> Tensor:
    """(B, n) float32 uniforms in (0, 1]: elements 0 … n − 1 of stream `sub` (0 to 3) of each row of keys (B, 5)."""
    check_keys(keys, keys)
    check(0 <= sub < 4, "sub", f"must be 0, 1, 2 or 3, got {sub}")
    return _draw(keys, n, sub, False) if use_triton(backend, keys) else reference.uniform(keys, n, sub)


def normal(keys: Tensor, n: int, sub: int = 0, backend: str | None = None) -> Tensor:
    """(B, n) float32 standard normals by Box–Muller; keys and `sub` as in `uniform`."""
    check_keys(keys, keys)
    check(0 <= sub < 4, "sub", f"must be 0, 1, 2 or 3, got {sub}")
    return _draw(keys, n, sub, True) if use_triton(backend, keys) else reference.normal(keys, n, sub)
