"""Rows (positions) that may move in a step of a discrete process, and their new tokens.

The steps `tau_leap`, `tau_leap_uniform` and `tau_leap_linear` of a large vocabulary are three launches each:
1. `list_rows` copies the tokens and lists the rows that may move.
2. The listed rows are divided into parts of the vocabulary; each part has a winner of the exponential race.
3. The first of these winners is the new token if the row moves (`finish_masked`).

Which rows are listed is known on the device only. The grids have a fixed size; programs read the number of listed rows
from memory and loop over the list, so that nothing waits for the GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import block_size, jit, tl, triton, warps
from .jump import first_of_parts, guided_total, largest_total, move_bound, move_probability, row_log_sum
from .random import uniforms_at
from .reference import MaskedStep

FINISH_BLOCK, FINISH_PROGRAMS = 256, 1024  # parts of several rows of a program; programs


@jit
def _list_kernel(
    p_tokens,
    p_rate,
    p_guidance,
    p_odds,
    p_keys,
    p_out,
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
    token = tl.load(p_tokens + o, mask=m, other=0)
    tl.store(p_out + o, token, mask=m)
    rate = tl.load(p_rate + i_sample, mask=m, other=0.0).to(tl.float32)
    if p_odds is not None:
        may_move = m
        largest = tl.load(p_odds + i_sample, mask=m, other=0.0).to(tl.float32) + states - 1.0
    else:
        may_move = m & (token == states)
        weight = 1.0
        if GUIDED:
            weight = tl.load(p_guidance + i_sample, mask=m, other=0.0).to(tl.float32)
        largest = largest_total(weight, GUIDED)
    # lanes beyond n read the keys of sample 0; their result is masked
    u = uniforms_at(p_keys, tl.where(m, i_sample, 0), o % length, 0)
    may_move = may_move & (u <= move_bound(rate, largest, RULE))
    flags = may_move.to(tl.int32)
    start = tl.atomic_add(p_count, tl.sum(flags, 0))
    tl.store(p_rows + start + tl.cumsum(flags, 0) - 1, o, mask=may_move)


@jit
def listed_sums(p_sums, o_slot, n_parts, o_part, m):
    """(ROWS,) log-sum-exps of listed rows over all parts."""
    o = o_slot[:, None] * n_parts + o_part[None, :]
    return row_log_sum(tl.load(p_sums + o, mask=m, other=float("-inf")))


@jit
def listed_winner(p_score, p_winner, o_slot, n_parts, o_part, m, states):
    """(ROWS,) winners of listed rows over all parts."""
    o = o_slot[:, None] * n_parts + o_part[None, :]
    b_score = tl.load(p_score + o, mask=m, other=float("-inf"))
    return first_of_parts(b_score, tl.load(p_winner + o, mask=m, other=states), states)


@jit
def _finish_kernel(
    p_rate,
    p_guidance,
    p_keys,
    p_rows,
    p_count,
    p_score,
    p_winner,
    p_sums,
    p_out,
    n,
    length,
    states,
    n_parts,
    RULE: tl.constexpr,
    GUIDED: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = tl.load(p_count)
    o_part = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        o_slot = (start + tl.arange(0, ROWS)).to(tl.int64)  # n · parts may exceed an int32
        m_row = o_slot < count
        o_row = tl.load(p_rows + o_slot, mask=m_row, other=0)
        i_sample = (o_row // length).to(tl.int64)
        m = m_row[:, None] & (o_part < n_parts)[None, :]
        total = 1.0
        if SUMS:
            mix = listed_sums(p_sums, o_slot, n_parts, o_part, m)
            cond = listed_sums(p_sums, o_slot + n, n_parts, o_part, m)
            uncond, weight = cond, 1.0
            if GUIDED:
                uncond = listed_sums(p_sums, o_slot + n + n, n_parts, o_part, m)
                weight = tl.load(p_guidance + i_sample).to(tl.float32)
            total = guided_total(mix, cond, uncond, weight, GUIDED)
        u = uniforms_at(p_keys, i_sample, o_row % length, 0)
        moves = m_row & (u <= move_probability(tl.load(p_rate + i_sample).to(tl.float32), total, RULE))
        winner = listed_winner(p_score, p_winner, o_slot, n_parts, o_part, m & moves[:, None], states)
        tl.store(p_out + o_row, winner.to(tl.int64), mask=moves)


class Listed(NamedTuple):
    """The listed rows: `rows` (n,) int32 as indices into the n = B·L tokens, `count` (1,) int32 how many there are."""

    rows: Tensor
    count: Tensor


class Parts(NamedTuple):
    """Results of the parts of the vocabulary, for the listed rows.

    Args:
        score, winner: (n, parts) largest score of the race and its state.
        sums: (branches + 1, n, parts) log-sum-exps: guided logits over the states, then each branch over its columns.
            Empty where the total rate is not needed.
    """

    score: Tensor
    winner: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, n: int, parts: int, kinds_of_sums: int, device: torch.device) -> "Parts":
        winner = torch.empty(n, parts, dtype=torch.int32, device=device)
        return cls(
            torch.empty_like(winner, dtype=torch.float32), winner, torch.empty(kinds_of_sums, n, parts, device=device)
        )


def part_arguments(listed: Listed, parts: Parts) -> dict[str, Tensor]:
    """The arguments of kernels that write or read the results of the parts."""
    return {
        "p_rows": listed.rows,
        "p_count": listed.count,
        "p_score": parts.score,
        "p_winner": parts.winner,
        "p_sums": parts.sums,
    }


def list_rows(
    tokens: Tensor,
    rate: Tensor,
    keys: Tensor,
    states: int,
    rule: str,
    out: Tensor,
    guidance: Tensor | None = None,
    odds: Tensor | None = None,
) -> Listed:
    """Copy the tokens to `out` and list the rows that may move: masked ones, or any with the odds of a uniform
    process."""
    n, device = tokens.numel(), tokens.device
    rows = torch.empty(n, dtype=torch.int32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    block = block_size(n, 256)
    _list_kernel[(triton.cdiv(n, block),)](
        p_tokens=tokens,
        p_rate=rate,
        p_guidance=guidance,
        p_odds=odds,
        p_keys=keys,
        p_out=out,
        p_rows=rows,
        p_count=count,
        n=n,
        length=tokens.shape[1],
        states=states,
        RULE=rule,
        GUIDED=guidance is not None,
        BLOCK=block,
        num_warps=4,
    )
    return Listed(rows, count)


def finish_shape(n: int, parts: int) -> tuple[int, dict[str, int]]:
    """Number of programs that decide about n rows, and their block sizes."""
    block = block_size(parts, triton.next_power_of_2(parts))
    rows = max(1, FINISH_BLOCK // block)
    programs = min(FINISH_PROGRAMS, triton.cdiv(n, rows))
    return programs, {"ROWS": rows, "BLOCK": block, "num_warps": warps(rows * block)}


def finish_masked(step: MaskedStep, listed: Listed, parts: Parts, out: Tensor) -> None:
    """Write the new tokens of the listed rows that move into `out`."""
    n, n_parts = parts.score.shape
    programs, shape = finish_shape(n, n_parts)
    _finish_kernel[(programs,)](
        p_rate=step.rate,
        p_guidance=step.guidance,
        p_keys=step.keys,
        p_out=out,
        n=n,
        length=step.tokens.shape[1],
        states=step.states,
        n_parts=n_parts,
        RULE=step.rule,
        GUIDED=step.guided,
        SUMS=step.needs_total,
        **part_arguments(listed, parts),
        **shape,
    )
