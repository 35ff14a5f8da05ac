"""`tau_leap`: one reverse step of the masked process, from logits.

The probability that a masked position moves is known, or bounded, before any logit is read. A row of logits is
therefore read only where the position moves, or may move (guidance, mask logit): with R = h/t these are between one in
50 and one in three of the masked rows. The new token is the winner of an exponential race, found in one pass.

A vocabulary that fits one block (`BLOCK` columns) is one launch over blocks of rows. For a larger one the rows that may
move are listed first and divided into parts of the vocabulary, so that few rows fill the GPU (`moving_rows`).

Floor: 8 B read and 8 B written per token; K · itemsize per row that moves, for both branches under guidance.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    PerSample,
    block_size,
    check,
    check_device,
    check_floating,
    check_keys,
    check_per_sample,
    check_shape,
    check_tokens,
    custom_op,
    jit,
    last_dim_contiguous,
    per_sample,
    tl,
    triton,
    use_triton,
    warps,
)
from .jump import guided_total, largest_total, mix_branches, move_bound, move_probability, race, row_log_sum
from .moving_rows import Listed, Parts, finish_masked, list_rows, part_arguments
from .random import uniforms_at, words_block
from .reference import MaskedStep
from .tiles import measured

BLOCK = 2048
ROW_PROGRAMS = 128  # over the listed rows, for every part of the vocabulary


@jit
def load_logits(p_logits, o_row, o_column, m):
    """(R, V) float32 logits of rows at these offsets."""
    o = o_row[:, None] + o_column[None, :]
    return tl.load(p_logits + o, mask=m, other=float("-inf")).to(tl.float32)


@jit
def scan_block(
    p_logits,
    p_uncond,
    p_guidance,
    p_keys,
    i_sample,
    i_position,
    m_row,
    i_part,
    states,
    stride_b,
    stride_l,
    stride_ub,
    stride_ul,
    GUIDED: tl.constexpr,
    MASK_LOGIT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part `i_part` of R rows: score and state of the winner, and, if SUMS, the log-sum-exps of the guided logits over
    the states and of each branch over its columns."""
    o = i_part * BLOCK + tl.arange(0, BLOCK)
    m = m_row[:, None] & (o < states + (1 if MASK_LOGIT else 0))[None, :]
    b_mix = load_logits(p_logits, i_sample * stride_b + i_position * stride_l, o, m)
    cond, uncond, mix = 0.0, 0.0, 0.0
    if SUMS:
        cond = row_log_sum(b_mix)
    if GUIDED:
        b_uncond = load_logits(p_uncond, i_sample * stride_ub + i_position * stride_ul, o, m)
        if SUMS:
            uncond = row_log_sum(b_uncond)
        weight = tl.load(p_guidance + i_sample, mask=m_row, other=1.0).to(tl.float32)
        b_mix = mix_branches(b_mix, b_uncond, weight[:, None])
    if MASK_LOGIT:
        b_mix = tl.where((o < states)[None, :], b_mix, float("-inf"))
    if SUMS:
        mix = row_log_sum(b_mix)
    o_quad = i_part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    o_block = i_position[:, None] * ((states + 3) // 4) + o_quad[None, :]
    score, winner = race(b_mix, words_block(p_keys, i_sample[:, None], o_block, 1), o[None, :], states)
    return score, winner, mix, cond, uncond


@jit
def _rows_kernel(
    p_logits,
    p_uncond,
    p_guidance,
    p_tokens,
    p_rate,
    p_keys,
    p_out,
    n,
    length,
    states,
    stride_b,
    stride_l,
    stride_ub,
    stride_ul,
    RULE: tl.constexpr,
    GUIDED: tl.constexpr,
    MASK_LOGIT: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The whole step, for a vocabulary of one block."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    i_sample = tl.where(m_row, o_row // length, 0).to(tl.int64)
    i_position = (o_row % length).to(tl.int64)
    token = tl.load(p_tokens + o_row, mask=m_row, other=0)
    rate = tl.load(p_rate + i_sample).to(tl.float32)
    weight = 1.0
    if GUIDED:
        weight = tl.load(p_guidance + i_sample).to(tl.float32)
    u = uniforms_at(p_keys, i_sample, i_position, 0)
    may_move = m_row & (token == states) & (u <= move_bound(rate, largest_total(weight, GUIDED), RULE))
    if tl.max(may_move.to(tl.int32), 0) > 0:
        _, winner, mix, cond, uncond = scan_block(
            p_logits=p_logits,
            p_uncond=p_uncond,
            p_guidance=p_guidance,
            p_keys=p_keys,
            i_sample=i_sample,
            i_position=i_position,
            m_row=may_move,
            i_part=0,
            states=states,
            stride_b=stride_b,
            stride_l=stride_l,
            stride_ub=stride_ub,
            stride_ul=stride_ul,
            GUIDED=GUIDED,
            MASK_LOGIT=MASK_LOGIT,
            SUMS=SUMS,
            BLOCK=BLOCK,
        )
        total = 1.0
        if SUMS:
            total = guided_total(mix, cond, uncond, weight, GUIDED)
        moves = may_move & (u <= move_probability(rate, total, RULE))
        token = tl.where(moves, winner.to(tl.int64), token)
    tl.store(p_out + o_row, token, mask=m_row)


@jit
def _parts_kernel(
    p_logits,
    p_uncond,
    p_guidance,
    p_keys,
    p_rows,
    p_count,
    p_score,
    p_winner,
    p_sums,
    n,
    length,
    states,
    stride_b,
    stride_l,
    stride_ub,
    stride_ul,
    GUIDED: tl.constexpr,
    MASK_LOGIT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of the vocabulary of the listed rows. Programs of the same row read neighboring parts."""
    i_part = tl.program_id(0)
    n_parts = tl.num_programs(0)
    count = tl.load(p_count)
    for i_slot in range(tl.program_id(1), count, tl.num_programs(1)):
        o_slot = i_slot + tl.arange(0, 1).to(tl.int64)  # rows times parts may exceed an int32
        o_row = tl.load(p_rows + o_slot)
        score, winner, mix, cond, uncond = scan_block(
            p_logits=p_logits,
            p_uncond=p_uncond,
            p_guidance=p_guidance,
            p_keys=p_keys,
            i_sample=(o_row // length).to(tl.int64),
            i_position=(o_row % length).to(tl.int64),
            m_row=i_slot + tl.arange(0, 1) < count,
            i_part=i_part,
            states=states,
            stride_b=stride_b,
            stride_l=stride_l,
            stride_ub=stride_ub,
            stride_ul=stride_ul,
            GUIDED=GUIDED,
            MASK_LOGIT=MASK_LOGIT,
            SUMS=SUMS,
            BLOCK=BLOCK,
        )
        o = o_slot * n_parts + i_part
        tl.store(p_score + o, score)
        tl.store(p_winner + o, winner)
        if SUMS:
            tl.store(p_sums + o, mix)
            tl.store(p_sums + (o_slot + n) * n_parts + i_part, cond)
            if GUIDED:
                tl.store(p_sums + (o_slot + n + n) * n_parts + i_part, uncond)


def tile(columns: int, dtype: torch.dtype, guided: bool) -> dict[str, int]:
    """Columns, warps and row programs of a part of the vocabulary. Entries of `tiles.json` override the defaults."""
    default = {"BLOCK": BLOCK, "num_warps": warps(BLOCK, 16), "programs": ROW_PROGRAMS}
    return default | measured("tau_leap_guided" if guided else "tau_leap", columns, dtype)


def launch(
    logits: Tensor,
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
        if states + mask_logit <= BLOCK:
            leap_rows(step, shared_arguments(step, logits, uncond), out)
        else:
            listed = list_rows(step.tokens, rate, step.keys, states, rule, out, guidance)
            parts = evaluate_parts(step, shared_arguments(step, logits, uncond), listed, logits)
            finish_masked(step, listed, parts, out)
    return out


def shared_arguments(step: MaskedStep, logits: Tensor, uncond: Tensor | None) -> dict[str, object]:
    """The arguments that both kernels take."""
    logits = last_dim_contiguous(logits)
    uncond = None if uncond is None else last_dim_contiguous(uncond)
    return {
        "p_logits": logits,
        "p_uncond": uncond,
        "p_guidance": step.guidance,
        "p_keys": step.keys,
        "n": step.tokens.numel(),
        "length": step.tokens.shape[1],
        "states": step.states,
        "stride_b": logits.stride(0),
        "stride_l": logits.stride(1),
        "stride_ub": 0 if uncond is None else uncond.stride(0),
        "stride_ul": 0 if uncond is None else uncond.stride(1),
        "GUIDED": step.guided,
        "MASK_LOGIT": step.mask_logit,
        "SUMS": step.needs_total,
    }


def leap_rows(step: MaskedStep, shared: dict[str, object], out: Tensor) -> None:
    """The step in one launch over blocks of rows."""
    block = block_size(step.states + step.mask_logit, BLOCK)
    rows = max(1, BLOCK // 2 // block)
    _rows_kernel[(triton.cdiv(out.numel(), rows),)](
        p_tokens=step.tokens,
        p_rate=step.rate,
        p_out=out,
        RULE=step.rule,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps(rows * block),
        **shared,
    )


def evaluate_parts(step: MaskedStep, shared: dict[str, object], listed: Listed, logits: Tensor) -> Parts:
    """The race within every part of the vocabulary of the listed rows."""
    n, columns = step.tokens.numel(), step.states + step.mask_logit
    shape = tile(columns, logits.dtype, step.guided)
    programs, n_parts = min(n, shape.pop("programs")), triton.cdiv(columns, shape["BLOCK"])
    parts = Parts.empty(n, n_parts, 2 + step.guided if step.needs_total else 0, logits.device)
    _parts_kernel[(n_parts, programs)](**shared, **part_arguments(listed, parts), **shape)
    return parts


_tau_leap = custom_op("tau_leap", launch)


@_tau_leap.register_fake
def _(logits, tokens, *others):
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def check_leap(
    tokens: Tensor, rate: PerSample, keys: Tensor, states: int, rule: str, guidance: PerSample = 1.0
) -> None:
    """Checks of the arguments that all discrete steps share."""
    check(rule in reference.RULES, "rule", f"must be one of {', '.join(reference.RULES)}, got {rule!r}")
    check(states > 0, "states", f"must be positive, got {states}")
    check(tokens.ndim == 2, "tokens", f"must be (B, L), got {tuple(tokens.shape)}")
    check_tokens("tokens", tokens, 0, states)
    check_per_sample(tokens, rate=rate, guidance=guidance)
    check_keys(keys, tokens)


def tau_leap(
    logits: Tensor,
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
    """One reverse step of the masked process: (B, L) tokens → (B, L) tokens.

    A masked position (token == states) moves with probability R e^{−R}, R = rate · Σ_v c(v), under the rule "tau"; for
    the other rules see `reference.move_probability`. A position that moves becomes v with probability c(v)/Σc.

    Args:
        logits: (B, L, C) of x₀, C ≥ states. Columns beyond the states are ignored, except the mask logit.
        tokens: (B, L) int64 in [0, states]; `states` is the mask.
        rate: (B,) h s′/(eˢ − 1), which is h/t for the log-linear schedule.
        keys: (B, 5), see `philox`.
        states: number of real states K.
        mask_logit: column K of the logits is the mask's; it takes part in the softmax, and what remains for the real
            states is not renormalized.
        uncond: (B, L, C) logits of the unconditional branch of guidance.
        guidance: weight w of the conditional branch, float or (B,): log c = w log p + (1 − w) log p_uncond.
    """
    check_leap(tokens, rate, keys, states, rule, guidance)
    check_floating(logits=logits, uncond=uncond)
    check_device(tokens.device, logits=logits, uncond=uncond)
    columns = states + mask_logit
    fits = logits.ndim == 3 and logits.shape[:2] == tokens.shape and logits.shape[2] >= columns
    check(fits, "logits", f"must be (*{tuple(tokens.shape)}, at least {columns}), got {tuple(logits.shape)}")
    check_shape("uncond", uncond, logits.shape)
    if use_triton(backend, tokens, logits=logits, uncond=uncond):
        weight = None if uncond is None else per_sample(guidance, tokens)
        return _tau_leap(logits, tokens, per_sample(rate, tokens), keys, states, rule, mask_logit, uncond, weight)
    return reference.tau_leap(logits, tokens, rate, keys, states, rule, mask_logit, uncond, guidance)
