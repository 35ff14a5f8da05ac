"""`tau_leap_linear`: from hidden states and the head straight to tokens; logits exist in registers only.

Three launches and no host synchronization: (1) list the rows where a jump may fall, (2) multiply them by tiles of the
head and run each tile's race, keeping one winner (and log-sum-exps) per row and tile, (3) per listed row, settle the
race between tiles and the jump. Programs are laid out over the head's tiles and stop at the device-side row count.

Floor: the head read once (C · D · itemsize) plus D · itemsize per row that jumps; 2 · C · D FLOPs per row that jumps,
twice with guidance.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    block_size,
    check,
    check_device,
    check_floating,
    check_shape,
    custom_op,
    is_reference,
    jit,
    matmul_dtype,
    per_sample,
    tl,
    triton,
    use_triton,
    warps,
)
from .jump import largest_total, log_sum, move_bound, move_probability
from .random import log_exponential, uniforms_at, words_block
from .tau_leap import check_leap
from .tiles import measured

BLOCK_R, BLOCK_V, BLOCK_D = 64, 128, 64
ROW_PROGRAMS = 4


@jit
def _list_kernel(
    p_tokens,
    p_rate,
    p_guidance,
    p_keys,
    p_rows,
    p_count,
    n,
    length,
    states,
    RULE: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lists the rows that may move. Blocks claim their part of the list in any order: a row's numbers do not depend on
    its place in it."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    i_sample = (o // length).to(tl.int64)
    rate = tl.load(p_rate + i_sample, mask=m, other=0.0).to(tl.float32)
    weight = 1.0
    if GUIDED:
        weight = tl.load(p_guidance + i_sample, mask=m, other=0.0).to(tl.float32)
    # lanes beyond n read the keys of sample 0
    u = uniforms_at(p_keys, tl.where(m, i_sample, 0), o % length, 0)
    may_move = m & (tl.load(p_tokens + o, mask=m, other=0) == states)
    may_move = may_move & (u <= move_bound(rate, largest_total(weight, GUIDED), RULE))
    flags = may_move.to(tl.int32)
    start = tl.atomic_add(p_count, tl.sum(flags, 0))
    tl.store(p_rows + start + tl.cumsum(flags, 0) - 1, o, mask=may_move)


@jit
def tile_logits(
    p_hidden, p_weight, p_bias, o_row, o_column, m_row, m_column, width, BLOCK_D: tl.constexpr, FLOAT32: tl.constexpr
):
    """(R, V) float32 hidden · weightᵀ + bias. Float32 operands go through three tf32 products, as accurate as one."""
    b_logits = tl.zeros((o_row.shape[0], o_column.shape[0]), tl.float32)
    for start in range(0, width, BLOCK_D):
        o = start + tl.arange(0, BLOCK_D)
        b_hidden = tl.load(
            p_hidden + o_row[:, None] * width + o[None, :], mask=m_row[:, None] & (o < width)[None, :], other=0.0
        )
        b_weight = tl.load(
            p_weight + o_column[None, :] * width + o[:, None], mask=m_column[None, :] & (o < width)[:, None], other=0.0
        )
        b_logits = tl.dot(b_hidden, b_weight, b_logits, input_precision="tf32x3" if FLOAT32 else "tf32")
    if p_bias is not None:
        b_logits += tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    return b_logits


@jit
def row_log_sum(b_values):
    """log-sum-exp over the last axis; rows may hold −∞."""
    return log_sum(tl.maximum(b_values, -1e38), tl.where(b_values > -1e38, 1.0, 0.0))


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
    MASK_COLUMN: tl.constexpr,
    SUMS: tl.constexpr,
    FLOAT32: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_tile = tl.program_id(1)
    n_tiles = tl.num_programs(1)
    o_column = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    m_column = o_column < states + (1 if MASK_COLUMN else 0)
    o_weight_row = o_column.to(tl.int64)
    o_quad = i_tile * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
    count = tl.load(p_count)
    for i_rows in range(tl.program_id(0), tl.cdiv(count, BLOCK_R), tl.num_programs(0)):
        o_slot = i_rows * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = o_slot < count
        o_row = tl.load(p_rows + o_slot, mask=m_row, other=0).to(tl.int64)
        i_sample = o_row // length
        b_mix = tile_logits(p_hidden, p_weight, p_bias, o_row, o_weight_row, m_row, m_column, width, BLOCK_D, FLOAT32)
        b_mix = tl.where(m_column[None, :], b_mix, float("-inf"))
        o_sums = o_slot.to(tl.int64)  # counted in rows: n · n_tiles itself may exceed an int32
        if SUMS:
            tl.store(p_sums + (o_sums + n) * n_tiles + i_tile, row_log_sum(b_mix), mask=m_row)
        if GUIDED:
            b_uncond = tile_logits(
                p_uncond, p_weight, p_bias, o_row, o_weight_row, m_row, m_column, width, BLOCK_D, FLOAT32
            )
            b_uncond = tl.where(m_column[None, :], b_uncond, float("-inf"))
            if SUMS:
                tl.store(p_sums + (o_sums + n + n) * n_tiles + i_tile, row_log_sum(b_uncond), mask=m_row)
            weight = tl.load(p_guidance + i_sample).to(tl.float32)[:, None]
            # a state that the first branch forbids stays forbidden
            allowed = b_mix > float("-inf")
            b_uncond = tl.where(allowed, b_uncond, 0.0)
            b_mix = tl.where(allowed, weight * tl.where(allowed, b_mix, 0.0) + (1.0 - weight) * b_uncond, float("-inf"))
        b_mix = tl.where((o_column < states)[None, :], b_mix, float("-inf"))
        if SUMS:
            tl.store(p_sums + o_sums * n_tiles + i_tile, row_log_sum(b_mix), mask=m_row)
        o_block = (o_row % length)[:, None] * ((states + 3) // 4) + o_quad[None, :]
        b_score = b_mix - log_exponential(words_block(p_keys, i_sample[:, None], o_block, 1))
        best = tl.max(b_score, 1)
        winner = tl.min(tl.where(b_score == best[:, None], o_column[None, :], states), 1)
        tl.store(p_score + o_slot.to(tl.int64) * n_tiles + i_tile, best, mask=m_row)
        tl.store(p_winner + o_slot.to(tl.int64) * n_tiles + i_tile, winner, mask=m_row)


@jit
def _settle_kernel(
    p_rate,
    p_guidance,
    p_keys,
    p_rows,
    p_count,
    p_score,
    p_winner,
    p_sums,
    p_out,
    length,
    states,
    n,
    n_tiles,
    RULE: tl.constexpr,
    GUIDED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_slot = tl.program_id(0).to(tl.int64)
    if i_slot < tl.load(p_count):
        i_row = tl.load(p_rows + i_slot).to(tl.int64)
        i_sample = i_row // length
        o_tile = tl.arange(0, BLOCK)
        m = o_tile < n_tiles
        o = i_slot * n_tiles + o_tile
        total = 1.0
        if SUMS:
            mix = row_log_sum(tl.load(p_sums + o, mask=m, other=float("-inf")))
            cond = row_log_sum(tl.load(p_sums + (i_slot + n) * n_tiles + o_tile, mask=m, other=float("-inf")))
            if GUIDED:
                weight = tl.load(p_guidance + i_sample).to(tl.float32)
                o_uncond = (i_slot + n + n) * n_tiles + o_tile
                uncond = row_log_sum(tl.load(p_sums + o_uncond, mask=m, other=float("-inf")))
                total = tl.exp(mix - weight * cond - (1.0 - weight) * uncond)
            else:
                total = tl.exp(mix - cond)
        u = uniforms_at(p_keys, i_sample, i_row % length, 0)
        if u <= move_probability(tl.load(p_rate + i_sample).to(tl.float32), total, RULE):
            b_score = tl.load(p_score + o, mask=m, other=float("-inf"))
            b_winner = tl.load(p_winner + o, mask=m, other=states)
            winner = tl.min(tl.where(b_score == tl.max(b_score, 0), b_winner, states), 0)
            tl.store(p_out + i_row, winner.to(tl.int64))


def tile(dtype: torch.dtype, width: int, guided: bool) -> dict:
    """Rows, states and features of a head tile and how it is run: narrower where two branches, three float32 products
    or unaligned loads need the registers, so that nothing spills; unless something else was measured to be faster."""
    narrow = 4 if dtype == torch.float32 else 2 if guided or width % 16 else 1
    block_d = BLOCK_D // 2 if dtype == torch.float32 else BLOCK_D
    chosen = {"BLOCK_R": BLOCK_R, "BLOCK_V": BLOCK_V // narrow, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 3}
    return chosen | measured("tau_leap_linear_guided" if guided else "tau_leap_linear", width, dtype)


def launch(hidden, weight, bias, tokens, rate, keys, states: int, rule: str, mask_logit: bool, uncond, guidance):
    tokens, hidden, weight, keys = (value.contiguous() for value in (tokens, hidden, weight, keys))
    uncond = None if uncond is None else uncond.contiguous()
    out = tokens.clone()
    n, (length, width) = tokens.numel(), hidden.shape[1:]
    if n == 0:
        return out
    device, guided = tokens.device, uncond is not None
    sums = (guided or mask_logit) and rule in ("tau", "euler")
    shape = tile(hidden.dtype, width, guided)
    programs = shape.pop("programs", ROW_PROGRAMS)
    n_tiles = triton.cdiv(states + mask_logit, shape["BLOCK_V"])
    rows = torch.empty(n, dtype=torch.int32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    score = torch.empty(n, n_tiles, device=device)
    winner = torch.empty(n, n_tiles, dtype=torch.int32, device=device)
    part_sums = torch.empty((1 + sums + guided, n, n_tiles) if sums else (0,), device=device)

    block = block_size(n, 256)
    _list_kernel[(triton.cdiv(n, block),)](
        tokens, rate, guidance, keys, rows, count, n, length, states, RULE=rule, GUIDED=guided, BLOCK=block, num_warps=4
    )
    _tile_kernel[(min(programs, triton.cdiv(n, shape["BLOCK_R"])), n_tiles)](
        hidden,
        uncond,
        weight,
        bias,
        guidance,
        keys,
        rows,
        count,
        score,
        winner,
        part_sums,
        length,
        width,
        states,
        n,
        GUIDED=guided,
        MASK_COLUMN=mask_logit,
        SUMS=sums,
        FLOAT32=hidden.dtype == torch.float32,
        **shape,
    )
    _settle_kernel[(n,)](
        rate,
        guidance,
        keys,
        rows,
        count,
        score,
        winner,
        part_sums,
        out,
        length,
        states,
        n,
        n_tiles,
        RULE=rule,
        GUIDED=guided,
        SUMS=sums,
        BLOCK=triton.next_power_of_2(n_tiles),
        num_warps=warps(triton.next_power_of_2(n_tiles), 4),
    )
    return out


@custom_op("tau_leap_linear")
def _tau_leap_linear(
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
    return launch(hidden, weight, bias, tokens, rate, keys, states, rule, mask_logit, uncond, guidance)


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
    guidance: Tensor | float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """`tau_leap` from hidden states (B, L, D) and the head weight (C, D), bias (C,) or None: one reverse step of the
    masked process, c(v) = exp(hidden · weight[v] + bias[v]).

    `uncond`, the second branch of guidance, is hidden states too. The kernel races on float32 logits, the reference
    on logits rounded to the head's dtype, so draws agree one by one only in float32.
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
    hidden, weight, uncond = matmul_dtype(hidden=hidden, weight=weight, uncond=uncond)
    if use_triton(backend, tokens, hidden=hidden, bias=bias):
        branch = None if uncond is None else per_sample(guidance, tokens)
        rate = per_sample(rate, tokens)
        return _tau_leap_linear(hidden, weight, bias, tokens, rate, keys, states, rule, mask_logit, uncond, branch)
    if is_reference(backend):
        return reference.tau_leap_linear(
            hidden, weight, bias, tokens, rate, keys, states, rule, mask_logit, uncond, guidance
        )

    def row_logits(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        b, i = rows.unbind(1)
        branches = (torch.nn.functional.linear(h[b, i], weight, bias) for h in (hidden, uncond) if h is not None)
        return next(branches), next(branches, None)

    return reference.leap_rows(row_logits, tokens, rate, keys, states, rule, mask_logit, uncond is not None, guidance)
