"""`tau_leap_uniform`: one reverse step of the uniform process, from logits.

Every position may move, with a probability that is bounded before any logit is read; a row of logits is read only where
the random number is below this bound. Launches as in `tau_leap`.

Floor: 8 B read and 8 B written per token; K · itemsize per row that moves.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import (
    block_size,
    check,
    check_device,
    check_floating,
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
from .jump import move_bound, move_probability, race, row_log_sum
from .moving_rows import Listed, Parts, finish_shape, list_rows, listed_sums, listed_winner, part_arguments
from .random import uniforms_at, words_at, words_block
from .tau_leap import check_leap, load_logits
from .tiles import measured

BLOCK = 2048
ROW_PROGRAMS = 128  # over the listed rows, for every part of the vocabulary


@jit
def scan_block(
    p_logits,
    p_keys,
    token,
    i_sample,
    i_position,
    m_row,
    i_part,
    states,
    stride_b,
    stride_l,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part `i_part` of R rows: score and state of the winner, among the states other than the token unless RULE is
    "last", and the log-sum-exp over all states, unless RULE is "last"."""
    o = i_part * BLOCK + tl.arange(0, BLOCK)
    m = m_row[:, None] & (o < states)[None, :]
    b_logits = load_logits(p_logits, i_sample * stride_b + i_position * stride_l, o, m)
    log_sum = 0.0
    if RULE != "last":
        log_sum = row_log_sum(b_logits)
        b_logits = tl.where(o[None, :] == token[:, None], float("-inf"), b_logits)
    o_quad = i_part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    o_block = i_position[:, None] * ((states + 3) // 4) + o_quad[None, :]
    score, winner = race(b_logits, words_block(p_keys, i_sample[:, None], o_block, 1), o[None, :], states)
    return score, winner, log_sum


@jit
def new_token(token, winner, p_token, p_keys, i_sample, i_position, u, rate, odds, states, RULE: tl.constexpr):
    """The token after the step, from the winner of the race and the probability of the token."""
    if RULE == "last":
        new = winner.to(tl.int64)
    else:
        by_model = odds * (1.0 - p_token)
        by_chance = (states - 1.0) * (1.0 - p_token * odds / (1.0 + odds))
        from_model = uniforms_at(p_keys, i_sample, i_position, 2) * (by_model + by_chance) <= by_model
        other = (words_at(p_keys, i_sample, i_position, 3).to(tl.int64) * (states - 1)) >> 32
        other += (other >= token).to(tl.int64)
        moves = u <= move_probability(rate, by_model + by_chance, RULE)
        new = tl.where(moves, tl.where(from_model, winner.to(tl.int64), other), token)
    return new


@jit
def probability_of(p_logits, o_token, log_sum, m_row, RULE: tl.constexpr):
    """(R,) probability of the tokens at these offsets; not needed if RULE is "last"."""
    p_token = 0.0
    if RULE != "last":
        p_token = tl.exp(tl.load(p_logits + o_token, mask=m_row, other=0.0).to(tl.float32) - log_sum)
    return p_token


@jit
def _rows_kernel(
    p_logits,
    p_tokens,
    p_rate,
    p_odds,
    p_keys,
    p_out,
    n,
    length,
    states,
    stride_b,
    stride_l,
    RULE: tl.constexpr,
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
    odds = tl.load(p_odds + i_sample).to(tl.float32)
    u = uniforms_at(p_keys, i_sample, i_position, 0)
    may_move = m_row & (u <= move_bound(rate, odds + states - 1.0, RULE))
    if tl.max(may_move.to(tl.int32), 0) > 0:
        _, winner, log_sum = scan_block(
            p_logits=p_logits,
            p_keys=p_keys,
            token=token,
            i_sample=i_sample,
            i_position=i_position,
            m_row=may_move,
            i_part=0,
            states=states,
            stride_b=stride_b,
            stride_l=stride_l,
            RULE=RULE,
            BLOCK=BLOCK,
        )
        o_token = i_sample * stride_b + i_position * stride_l + token
        p_token = probability_of(p_logits, o_token, log_sum, may_move, RULE)
        new = new_token(token, winner, p_token, p_keys, i_sample, i_position, u, rate, odds, states, RULE)
        token = tl.where(may_move, new, token)
    tl.store(p_out + o_row, token, mask=m_row)


@jit
def _parts_kernel(
    p_logits,
    p_tokens,
    p_keys,
    p_rows,
    p_count,
    p_score,
    p_winner,
    p_sums,
    length,
    states,
    stride_b,
    stride_l,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of the vocabulary of the listed rows."""
    i_part = tl.program_id(0)
    n_parts = tl.num_programs(0)
    count = tl.load(p_count)
    for i_slot in range(tl.program_id(1), count, tl.num_programs(1)):
        o_slot = i_slot + tl.arange(0, 1).to(tl.int64)  # rows times parts may exceed an int32
        o_row = tl.load(p_rows + o_slot)
        score, winner, log_sum = scan_block(
            p_logits=p_logits,
            p_keys=p_keys,
            token=tl.load(p_tokens + o_row),
            i_sample=(o_row // length).to(tl.int64),
            i_position=(o_row % length).to(tl.int64),
            m_row=o_slot < count,
            i_part=i_part,
            states=states,
            stride_b=stride_b,
            stride_l=stride_l,
            RULE=RULE,
            BLOCK=BLOCK,
        )
        o = o_slot * n_parts + i_part
        tl.store(p_score + o, score)
        tl.store(p_winner + o, winner)
        if RULE != "last":
            tl.store(p_sums + o, log_sum)


@jit
def _finish_kernel(
    p_logits,
    p_tokens,
    p_rate,
    p_odds,
    p_keys,
    p_rows,
    p_count,
    p_score,
    p_winner,
    p_sums,
    p_out,
    length,
    states,
    stride_b,
    stride_l,
    n_parts,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decide whether the listed rows move, and take the first of the winners of their parts."""
    count = tl.load(p_count)
    o_part = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        o_slot = (start + tl.arange(0, ROWS)).to(tl.int64)  # rows times parts may exceed an int32
        m_row = o_slot < count
        o_row = tl.load(p_rows + o_slot, mask=m_row, other=0)
        i_sample = (o_row // length).to(tl.int64)
        i_position = (o_row % length).to(tl.int64)
        token = tl.load(p_tokens + o_row, mask=m_row, other=0)
        m = m_row[:, None] & (o_part < n_parts)[None, :]
        log_sum = 0.0
        if RULE != "last":
            log_sum = listed_sums(p_sums, o_slot, n_parts, o_part, m)
        o_token = i_sample * stride_b + i_position * stride_l + token
        p_token = probability_of(p_logits, o_token, log_sum, m_row, RULE)
        winner = listed_winner(p_score, p_winner, o_slot, n_parts, o_part, m, states)
        u = uniforms_at(p_keys, i_sample, i_position, 0)
        rate = tl.load(p_rate + i_sample).to(tl.float32)
        odds = tl.load(p_odds + i_sample).to(tl.float32)
        new = new_token(token, winner, p_token, p_keys, i_sample, i_position, u, rate, odds, states, RULE)
        tl.store(p_out + o_row, new, mask=m_row)


def launch(logits: Tensor, tokens: Tensor, rate: Tensor, odds: Tensor, keys: Tensor, rule: str) -> Tensor:
    tokens, logits, keys = tokens.contiguous(), last_dim_contiguous(logits), keys.contiguous()
    out = torch.empty_like(tokens)
    if not out.numel():
        return out
    states = logits.shape[-1]
    shared = {
        "p_logits": logits,
        "p_tokens": tokens,
        "p_keys": keys,
        "length": tokens.shape[1],
        "states": states,
        "stride_b": logits.stride(0),
        "stride_l": logits.stride(1),
        "RULE": rule,
    }
    per_row = {"p_rate": rate, "p_odds": odds, "p_out": out}
    if states <= BLOCK:
        leap_rows(shared | per_row, tokens.numel())
    else:
        listed = list_rows(tokens, rate, keys, states, rule, out, odds=odds)
        finish(shared | per_row, listed, evaluate_parts(shared, listed))
    return out


def leap_rows(arguments: dict[str, Any], n: int) -> None:
    """The step in one launch over blocks of rows."""
    block = block_size(arguments["states"], BLOCK)
    rows = max(1, BLOCK // 2 // block)
    _rows_kernel[(triton.cdiv(n, rows),)](n=n, ROWS=rows, BLOCK=block, num_warps=warps(rows * block), **arguments)


def evaluate_parts(shared: dict[str, Any], listed: Listed) -> Parts:
    """The race within every part of the vocabulary of the listed rows."""
    logits, n = shared["p_logits"], len(listed.rows)
    shape = {"BLOCK": BLOCK, "num_warps": warps(BLOCK, 16), "programs": ROW_PROGRAMS}
    shape |= measured("tau_leap_uniform", logits.shape[-1], logits.dtype)
    programs, n_parts = min(n, shape.pop("programs")), triton.cdiv(logits.shape[-1], shape["BLOCK"])
    parts = Parts.empty(n, n_parts, 0 if shared["RULE"] == "last" else 1, logits.device)
    _parts_kernel[(n_parts, programs)](**shared, **part_arguments(listed, parts), **shape)
    return parts


def finish(arguments: dict[str, Any], listed: Listed, parts: Parts) -> None:
    """Write the new tokens of the listed rows."""
    n, n_parts = parts.score.shape
    programs, shape = finish_shape(n, n_parts)
    _finish_kernel[(programs,)](n_parts=n_parts, **arguments, **part_arguments(listed, parts), **shape)


_tau_leap_uniform = custom_op("tau_leap_uniform", launch)


@_tau_leap_uniform.register_fake
def _(logits, tokens, *others):
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def tau_leap_uniform(
    logits: Tensor,
    tokens: Tensor,
    rate: Tensor,
    odds: Tensor,
    keys: Tensor,
    rule: str = "tau",
    backend: str | None = None,
) -> Tensor:
    """One reverse step of the uniform process: (B, L) tokens → (B, L) tokens.

    With p = softmax(logits) (B, L, K) and odds (B,) = a K/(1 − a), a = e^{−s}, Bayes' rule gives the reverse rate from
    x to v ≠ x as (s′/K) [odds p(v) + 1 − p(x) odds/(1 + odds)]. `rate` (B,) is h s′/K. The rules are "tau", "euler" and
    "last", which samples x₀ from p at every position.
    """
    check(rule != "ancestral", "rule", "must be tau, euler or last for the uniform process, got 'ancestral'")
    check(logits.ndim == 3, "logits", f"must be (B, L, K), got {tuple(logits.shape)}")
    states = logits.shape[-1]
    check(states > 0, "logits", f"must have at least one state, got {tuple(logits.shape)}")
    check_leap(tokens, rate, keys, states, rule)
    check_tokens("tokens", tokens, 0, states - 1)
    check_floating(logits=logits)
    check_device(tokens.device, logits=logits)
    check_shape("logits", logits, (*tokens.shape, states))
    check_per_sample(tokens, odds=odds)
    if use_triton(backend, tokens, logits=logits):
        return _tau_leap_uniform(logits, tokens, per_sample(rate, tokens), per_sample(odds, tokens), keys, rule)
    return reference.tau_leap_uniform(logits, tokens, rate, odds, keys, rule)
