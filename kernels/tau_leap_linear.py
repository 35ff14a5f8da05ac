"""`tau_leap_linear`: one reverse step of the masked process from hidden states and the output projection ("head").

The logits exist in registers only. Three launches without host synchronization:
1. List the candidates, the rows (positions) that may move.
2. Multiply them by tiles of the head; for each row and tile keep the winner of the exponential race within the tile,
   and the log-sum-exps where the total rate is needed. The grid covers the tiles; programs read the number of
   candidates on the device.
3. For each candidate decide whether it moves, and take the winner over all tiles.

Floor: the head read once (C · D · itemsize) plus D · itemsize per row that moves; 2 · C · D FLOPs per row that moves,
twice under guidance.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import (
    PerSample,
    block_size,
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
    warps,
)
from .jump import largest_total, log_sum, move_bound, move_probability
from .random import log_exponential, uniforms_at, words_block
from .reference import MaskedStep
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
    """List the rows that may move. The order of the list varies between runs; the random numbers of a row do not
    depend on its index in the list."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    i_sample = (o // length).to(tl.int64)
    rate = tl.load(p_rate + i_sample, mask=m, other=0.0).to(tl.float32)
    weight = 1.0
    if GUIDED:
        weight = tl.load(p_guidance + i_sample, mask=m, other=0.0).to(tl.float32)
    # lanes beyond n read the keys of sample 0; their result is masked
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
    """(R, V) float32 hidden · weightᵀ + bias. Float32 operands are multiplied by three tf32 products (tf32x3), which
    together have float32 accuracy."""
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
    """Log-sum-exp over the last axis; values may be −∞."""
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
    MASK_LOGIT: tl.constexpr,
    SUMS: tl.constexpr,
    FLOAT32: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_tile = tl.program_id(1)
    n_tiles = tl.num_programs(1)
    o_column = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    m_column = o_column < states + (1 if MASK_LOGIT else 0)
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
        o_sums = o_slot.to(tl.int64)  # 64 bits, because n · n_tiles may exceed an int32
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
            # a state with logit −∞ in the conditional branch keeps probability 0
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
def _finalize_kernel(
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


def tile(dtype: torch.dtype, width: int, guided: bool) -> dict[str, int]:
    """Block sizes over rows, states and features, warps and stages. Entries of `tiles.json` override the defaults.

    The block over states is narrower with two branches, for float32 operands (three products) and for widths that are
    not aligned, so that no registers are spilled.
    """
    narrow = 4 if dtype == torch.float32 else 2 if guided or width % 16 else 1
    block_d = BLOCK_D // 2 if dtype == torch.float32 else BLOCK_D
    default = {"BLOCK_R": BLOCK_R, "BLOCK_V": BLOCK_V // narrow, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 3}
    return default | measured("tau_leap_linear_guided" if guided else "tau_leap_linear", width, dtype)


class TileResults(NamedTuple):
    """Results of the tiles of the head, for the first `count` of n = B·L rows.

    Args:
        score, winner: (n, tiles) largest race score and its state.
        sums: (branches + 1, n, tiles) log-sum-exps: guided logits over the states, then each branch over its columns.
            Empty where the total rate is not needed.
    """

    score: Tensor
    winner: Tensor
    sums: Tensor


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
    out = step.tokens.clone()
    if out.numel():
        uncond = None if uncond is None else uncond.contiguous()
        shared = list_candidates(step)
        results = evaluate_tiles(step, shared, hidden.contiguous(), uncond, weight.contiguous(), bias)
        finalize(step, shared, results, out)
    return out


def list_candidates(step: MaskedStep) -> dict[str, Tensor | int | None]:
    """List the rows that may move; returns the arguments that all three kernels take.

    p_rows (n,) int32 holds the candidates, as indices into the n = B·L tokens; p_count (1,) int32 is their number.
    """
    (batch, length), device = step.tokens.shape, step.tokens.device
    n = batch * length
    shared = {
        "p_guidance": step.guidance,
        "p_keys": step.keys,
        "p_rows": torch.empty(n, dtype=torch.int32, device=device),
        "p_count": torch.zeros(1, dtype=torch.int32, device=device),
        "n": n,
        "length": length,
        "states": step.states,
        "GUIDED": step.guided,
    }
    block = block_size(n, 256)
    _list_kernel[(triton.cdiv(n, block),)](
        p_tokens=step.tokens, p_rate=step.rate, RULE=step.rule, BLOCK=block, num_warps=4, **shared
    )
    return shared


def evaluate_tiles(
    step: MaskedStep, shared: dict, hidden: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None
) -> TileResults:
    n, device = shared["n"], hidden.device
    shape = tile(hidden.dtype, hidden.shape[2], step.guided)
    programs = shape.pop("programs", ROW_PROGRAMS)
    n_tiles = triton.cdiv(step.states + step.mask_logit, shape["BLOCK_V"])
    score = torch.empty(n, n_tiles, device=device)
    winner = torch.empty(n, n_tiles, dtype=torch.int32, device=device)
    sums = torch.empty((2 + step.guided, n, n_tiles) if step.needs_total else (0,), device=device)
    _tile_kernel[(min(programs, triton.cdiv(n, shape["BLOCK_R"])), n_tiles)](
        p_hidden=hidden,
        p_uncond=uncond,
        p_weight=weight,
        p_bias=bias,
        p_score=score,
        p_winner=winner,
        p_sums=sums,
        width=hidden.shape[2],
        MASK_LOGIT=step.mask_logit,
        SUMS=step.needs_total,
        FLOAT32=hidden.dtype == torch.float32,
        **shared,
        **shape,
    )
    return TileResults(score, winner, sums)


def finalize(step: MaskedStep, shared: dict, results: TileResults, out: Tensor) -> None:
    """Write the new tokens of the candidates that move into `out`, a copy of the tokens."""
    n, n_tiles = results.score.shape
    block = triton.next_power_of_2(n_tiles)
    _finalize_kernel[(n,)](
        p_rate=step.rate,
        p_score=results.score,
        p_winner=results.winner,
        p_sums=results.sums,
        p_out=out,
        n_tiles=n_tiles,
        RULE=step.rule,
        SUMS=step.needs_total,
        BLOCK=block,
        num_warps=warps(block, 4),
        **shared,
    )


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
