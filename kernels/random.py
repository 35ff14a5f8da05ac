"""Philox-4x32-10 in Triton, and the operations `uniform` and `normal`.

The layout is that of `philox`, the formulas are those of `reference`: element e of a sample is word e % 4 of the block
with counter e // 4. The four words of a block are computed together and interleaved.
Floor of the operations: 4 B written per number.
"""

import torch
from torch import Tensor

from . import reference
from .backend import INTERPRETED, block_size, check, check_keys, custom_op, jit, tl, triton, use_triton, warps

APPROXIMATE = tl.constexpr(not INTERPRETED)  # the interpreter has no instructions of the GPU


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
def fast_log2(x):
    """log₂ x with an absolute error of 2⁻²², in one instruction of the GPU."""
    if APPROXIMATE:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@jit
def exponential(word):
    """E/ln 2 for E = −log(1 − u) ~ Exp(1); races compare such times, so that the unit does not matter.

    For u < ¼, where races are won, u times a polynomial (relative error 1.5e-7): the logarithm of 1 − u would return 0
    for u below 2⁻²⁵. It serves for larger u (relative error 6e-7). E is truncated at 16.6.
    """
    u = tl.minimum(to_uniform(word), 0.99999994)
    series = 0.3717020154 + u * (0.2086586505 + u * 0.4885594845)
    series = u * (1.4426950216 + u * (0.7213620543 + u * (0.4802303910 + u * series)))
    return tl.where(u < 0.25, series, -fast_log2(1.0 - u))


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
