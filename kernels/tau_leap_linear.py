"""`tau_leap_linear`: one reverse step of the masked process from hidden states and the output projection ("head").

The logits exist in registers only. Of the three launches (`moving_rows`) the middle one multiplies the listed rows by
tiles of the head. For each row and tile it keeps the winner of the exponential race within the tile, and the
log-sum-exps where the total rate is needed. Both branches of guidance share the tiles that are read.

Floor: the head read once (C · D · itemsize) plus D · itemsize per row that moves; 2 · C · D FLOPs per row that moves,
twice under guidance.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    PerSample,
    cast_for_matmul,
    check,
    check_device,
    check_floating,
    check_shape,
    custom_op,
    is_reference,
    jit,
    per_sample,
    tl,
    triton,
    use_triton,
)
from .jump import mix_branches, race, row_log_sum
from .moving_rows import Listed, Parts, finish_masked, list_rows, part_arguments
from .random import words4
from .reference import MaskedStep
from .tau_leap import check_leap
from .tiles import measured

BLOCK_R, BLOCK_V, BLOCK_D = 64, 64, 64
ROW_PROGRAMS = 4
REGISTERS = 168  # of a thread, for three programs of 128 threads on an SM


@jit
def tile_columns(i_tile, BLOCK_V: tl.constexpr):
    """The states of a tile in the order in which the product computes them: in every group of 16, a thread that holds
    columns 2k, 2k + 1, 2k + 8 and 2k + 9 of the product holds four consecutive states, one block of random words."""
    o = tl.arange(0, BLOCK_V)
    return i_tile * BLOCK_V + o // 16 * 16 + o % 8 // 2 * 4 + o % 16 // 8 * 2 + o % 2


@jit
def tile_words(p_keys, i_sample, o_block, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """(R, V) random words in the order of `tile_columns`, from the (R, V/4) blocks of words of a tile."""
    a, b, c, d = words4(p_keys, i_sample[:, None], o_block, 1)
    b_words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_R, BLOCK_V // 16, 4, 2, 2))
    return tl.reshape(tl.permute(b_words, (0, 1, 4, 2, 3)), (BLOCK_R, BLOCK_V))


@jit
def tile_products(
    p_hidden,
    p_uncond,
    p_weight,
    o_row,
    o_column,
    m_row,
    m_column,
    width,
    GUIDED: tl.constexpr,
    FLOAT32: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(R, V) float32 hidden · weightᵀ and uncond · weightᵀ (the first again without guidance).

    Float32 operands are multiplied by three tf32 products (tf32x3), which together have float32 accuracy. WHOLE: the
    width is a multiple of BLOCK_D, which spares masks.
    """
    precision: tl.constexpr = "tf32x3" if FLOAT32 else "tf32"
    b_cond = tl.zeros((o_row.shape[0], o_column.shape[0]), tl.float32)
    b_uncond = b_cond
    for start in range(0, width, BLOCK_D):
        o = start + tl.arange(0, BLOCK_D)
        o_hidden = o_row[:, None] * width + o[None, :]
        m_hidden, m_weight = m_row[:, None], m_column[None, :]
        if not WHOLE:
            m_hidden, m_weight = m_hidden & (o < width)[None, :], m_weight & (o < width)[:, None]
        b_weight = tl.load(p_weight + o_column[None, :] * width + o[:, None], mask=m_weight, other=0.0)
        b_hidden = tl.load(p_hidden + o_hidden, mask=m_hidden, other=0.0)
        b_cond = tl.dot(b_hidden, b_weight, b_cond, input_precision=precision)
        if GUIDED:
            b_hidden = tl.load(p_uncond + o_hidden, mask=m_hidden, other=0.0)
            b_uncond = tl.dot(b_hidden, b_weight, b_uncond, input_precision=precision)
    return b_cond, b_uncond


@jit
def add_bias(b_products, p_bias, o_column, m_column):
    """Logits, −∞ beyond the columns of the head."""
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_column, mask=m_column, other=float("-inf")).to(tl.float32)
        b_logits = b_products + b_bias[None, :]
    else:
        b_logits = tl.where(m_column[None, :], b_products, float("-inf"))
    return b_logits


@jit
def _tile_kernel(
    p_hidden,
    p_uncond,
    p_weight,
    p_bias,
    p_guidance,
    p_keys,
    p_rows,
    p_count,
    p_score,
    p_winner,
    p_sums,
    length,
    width,
    states,
    n,
    GUIDED: tl.constexpr,
    MASK_LOGIT: tl.constexpr,
    SUMS: tl.constexpr,
    FLOAT32: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_tile = tl.program_id(1)
    n_tiles = tl.num_programs(1)
    o_column = tile_columns(i_tile, BLOCK_V)
    m_column = o_column < states + (1 if MASK_LOGIT else 0)
    m_state = (o_column < states)[None, :]
    o_weight_row = o_column.to(tl.int64)
    o_quad = i_tile * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
    count = tl.load(p_count)
    for i_rows in range(tl.program_id(0), tl.cdiv(count, BLOCK_R), tl.num_programs(0)):
        o_slot = i_rows * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = o_slot < count
        i_row = tl.load(p_rows + o_slot, mask=m_row, other=0)
        o_row = i_row.to(tl.int64)
        i_sample = (i_row // length).to(tl.int64)
        o_part = o_slot.to(tl.int64) * n_tiles + i_tile  # rows times tiles may exceed an int32
        o_branch = (n + tl.zeros((1,), tl.int64)) * n_tiles
        b_mix, b_uncond = tile_products(
            p_hidden,
            p_uncond,
            p_weight,
            o_row,
            o_weight_row,
            m_row,
            m_column,
            width,
            GUIDED,
            FLOAT32,
            WHOLE,
            BLOCK_D,
        )
        b_mix = add_bias(b_mix, p_bias, o_column, m_column)
        if SUMS:
            tl.store(p_sums + o_branch + o_part, row_log_sum(b_mix), mask=m_row)
        if GUIDED:
            b_uncond = add_bias(b_uncond, p_bias, o_column, m_column)
            if SUMS:
                tl.store(p_sums + 2 * o_branch + o_part, row_log_sum(b_uncond), mask=m_row)
            weight = tl.load(p_guidance + i_sample).to(tl.float32)
            b_mix = mix_branches(b_mix, b_uncond, weight[:, None])
        if MASK_LOGIT:
            b_mix = tl.where(m_state, b_mix, float("-inf"))
        if SUMS:
            tl.store(p_sums + o_part, row_log_sum(b_mix), mask=m_row)
        o_block = (i_row % length).to(tl.int64)[:, None] * ((states + 3) // 4) + o_quad[None, :]
        b_words = tile_words(p_keys, i_sample, o_block, BLOCK_R, BLOCK_V)
        score, winner = race(b_mix, b_words, o_column[None, :], states)
        tl.store(p_score + o_part, score, mask=m_row)
        tl.store(p_winner + o_part, winner, mask=m_row)


def tile(dtype: torch.dtype, width: int, guided: bool) -> dict[str, int]:
    """Block sizes over rows, states and features, and launch options. Entries of `tiles.json` override the defaults.

    The tile is small and its registers are limited, so that three programs share an SM: while one draws random numbers,
    the others multiply. Two branches, float32 operands (three products) and widths that are not aligned need more
    registers and therefore take smaller blocks, so that none are spilled.
    """
    hard = dtype == torch.float32 or width % 16 != 0
    return {
        "BLOCK_R": BLOCK_R,
        "BLOCK_V": BLOCK_V // 2 if hard and guided else BLOCK_V,
        "BLOCK_D": BLOCK_D // (4 if hard else 2 if guided else 1),
        "num_warps": 4,
        "num_stages": 4 if hard or guided else 3,
        "maxnreg": REGISTERS,
        "programs": ROW_PROGRAMS,
    } | measured("tau_leap_linear_guided" if guided else "tau_leap_linear", width, dtype)


def launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rate: Tensor,
    keys: Tensor,
    states: int,
    rule: str,
    mask_logit: bool,
    uncond: Tensor | None,
    guidance: Tensor | None,
) -> Tensor:
    step = MaskedStep(tokens.contiguous(), rate, keys.contiguous(), states, rule, mask_logit, guidance)
    out = torch.empty_like(step.tokens)
    if out.numel():
        uncond = None if uncond is None else uncond.contiguous()
        listed = list_rows(step.tokens, rate, step.keys, states, rule, out, guidance)
        parts = evaluate_tiles(step, listed, hidden.contiguous(), uncond, weight.contiguous(), bias)
        finish_masked(step, listed, parts, out)
    return out


def evaluate_tiles(
    step: MaskedStep, listed: Listed, hidden: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Parts:
    """The race within every tile of the head, for the listed rows."""
    n, width = step.tokens.numel(), hidden.shape[2]
    shape = tile(hidden.dtype, width, step.guided)
    programs = min(shape.pop("programs"), triton.cdiv(n, shape["BLOCK_R"]))
    n_tiles = triton.cdiv(step.states + step.mask_logit, shape["BLOCK_V"])
    parts = Parts.empty(n, n_tiles, 2 + step.guided if step.needs_total else 0, hidden.device)
    _tile_kernel[(programs, n_tiles)](
        p_hidden=hidden,
        p_uncond=uncond,
        p_weight=weight,
        p_bias=bias,
        p_guidance=step.guidance,
        p_keys=step.keys,
        n=n,
        length=step.tokens.shape[1],
        width=width,
        states=step.states,
        GUIDED=step.guided,
        MASK_LOGIT=step.mask_logit,
        SUMS=step.needs_total,
        FLOAT32=hidden.dtype == torch.float32,
        WHOLE=width % shape["BLOCK_D"] == 0,
        **part_arguments(listed, parts),
        **shape,
    )
    return parts


_tau_leap_linear = custom_op("tau_leap_linear", launch)


@_tau_leap_linear.register_fake
def _(hidden, weight, bias, tokens, *others):
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def tau_leap_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rate: Tensor,
    keys: Tensor,
    states: int,
    rule: str = "tau",
    mask_logit: bool = False,
    uncond: Tensor | None = None,
    guidance: PerSample = 1.0,
    backend: str | None = None,
) -> Tensor:
    """`tau_leap` of the logits hidden · weightᵀ + bias, which are not materialized.

    hidden (B, L, D); weight (C, D) and bias (C,) or None of the head; `uncond` (B, L, D) are the hidden states of the
    unconditional branch. The other arguments are those of `tau_leap`. The kernel uses float32 logits and the reference
    logits rounded to the head's dtype, so that single draws agree only in float32.
    """
    check_leap(tokens, rate, keys, states, rule, guidance)
    columns = states + mask_logit
    check(
        hidden.ndim == 3 and hidden.shape[:2] == tokens.shape, "hidden", f"must be (B, L, D), got {tuple(hidden.shape)}"
    )
    fits = weight.ndim == 2 and weight.shape[0] >= columns and weight.shape[1] == hidden.shape[2]
    check(fits, "weight", f"must be (at least {columns}, {hidden.shape[2]}), got {tuple(weight.shape)}")
    check_shape("bias", bias, weight.shape[:1])
    check_shape("uncond", uncond, hidden.shape)
    check_floating(hidden=hidden, weight=weight, bias=bias, uncond=uncond)
    check_device(tokens.device, hidden=hidden, weight=weight, bias=bias, uncond=uncond)
    hidden, weight, uncond = cast_for_matmul(hidden=hidden, weight=weight, uncond=uncond)
    if use_triton(backend, tokens, hidden=hidden, bias=bias):
        guidance = None if uncond is None else per_sample(guidance, tokens)
        rate = per_sample(rate, tokens)
        return _tau_leap_linear(hidden, weight, bias, tokens, rate, keys, states, rule, mask_logit, uncond, guidance)
    if is_reference(backend):
        return reference.tau_leap_linear(
            hidden, weight, bias, tokens, rate, keys, states, rule, mask_logit, uncond, guidance
        )
    step = MaskedStep(tokens, rate, keys, states, rule, mask_logit, None if uncond is None else guidance)
    return leap_candidates(step, hidden, uncond, weight, bias)


def leap_candidates(
    step: MaskedStep, hidden: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The reference with the head applied to the candidates only."""
    linear = torch.nn.functional.linear
    rows = step.candidates()
    b, i = rows.unbind(1)
    logits = linear(hidden[b, i], weight, bias)
    return step.apply(rows, logits, None if uncond is None else linear(uncond[b, i], weight, bias))
