"""`tau_leap` and `tau_leap_uniform`: one reverse step of a discrete process, from logits.

The probability that a position moves is known, or bounded, before any logit is read. A row of logits is therefore read
only where the position moves (masked process) or may move (guidance, mask logit, uniform process): with R = h/t these
are between one in 50 and one in three of the masked rows. One pass over a row, in registers, gives the new token, as
the winner of an exponential race, and the total rate where it is needed.

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
    use_triton,
    warps,
)
from .jump import add_exponentials, largest_total, log_sum, move_bound, move_probability
from .random import log_exponential, uniforms_at, words_at, words_block

BLOCK = 2048


@jit
def scan_row(
    p_logits,
    p_uncond,
    weight,
    p_keys,
    i_sample,
    i_position,
    states,
    excluded,
    GUIDED: tl.constexpr,
    MASK_LOGIT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over a row of logits.

    Returns the winner of the exponential race among the states other than `excluded`, and, if SUMS, the log-sum-exps
    of the guided logits over the states and of each branch over all its columns.
    """
    columns = states + (1 if MASK_LOGIT else 0)
    o_block = tl.arange(0, BLOCK)
    o_quad = i_position * ((states + 3) // 4) + tl.arange(0, BLOCK // 4)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK,), tl.int32)
    # finite, so that a logit of −∞ does not change the running log-sum-exp
    top_mix = tl.full((BLOCK,), -1e38, tl.float32)
    top_cond = top_mix
    top_uncond = top_mix
    sum_mix = tl.zeros((BLOCK,), tl.float32)
    sum_cond = sum_mix
    sum_uncond = sum_mix
    for start in range(0, columns, BLOCK):
        o = start + o_block
        m = o < states
        b_cond = tl.load(p_logits + o, mask=o < columns, other=float("-inf")).to(tl.float32)
        b_mix = b_cond
        if GUIDED:
            b_uncond = tl.load(p_uncond + o, mask=o < columns, other=float("-inf")).to(tl.float32)
            # a state with logit −∞ in the conditional branch keeps probability 0; the mixture could be −∞ + ∞ = NaN
            allowed = b_cond > float("-inf")
            b_mix = weight * tl.where(allowed, b_cond, 0.0) + (1.0 - weight) * tl.where(allowed, b_uncond, 0.0)
            b_mix = tl.where(allowed, b_mix, float("-inf"))
        b_mix = tl.where(m, b_mix, float("-inf"))
        b_score = b_mix - log_exponential(words_block(p_keys, i_sample, start // 4 + o_quad, 1))
        b_score = tl.where(o == excluded, float("-inf"), b_score)
        winner = tl.where(b_score > best, o, winner)
        best = tl.maximum(best, b_score)
        if SUMS:
            top_mix, sum_mix = add_exponentials(top_mix, sum_mix, b_mix)
            if GUIDED or MASK_LOGIT:
                top_cond, sum_cond = add_exponentials(top_cond, sum_cond, b_cond)
            if GUIDED:
                top_uncond, sum_uncond = add_exponentials(top_uncond, sum_uncond, b_uncond)
    winner = tl.min(tl.where(best == tl.max(best, 0), winner, states), 0)
    mix = 0.0
    cond = 0.0
    uncond = 0.0
    if SUMS:
        mix = log_sum(top_mix, sum_mix)
        if GUIDED or MASK_LOGIT:
            cond = log_sum(top_cond, sum_cond)
        if GUIDED:
            uncond = log_sum(top_uncond, sum_uncond)
    return winner, mix, cond, uncond


@jit
def _masked_kernel(
    p_logits,
    p_uncond,
    p_guidance,
    p_tokens,
    p_rate,
    p_keys,
    p_out,
    length,
    states,
    stride_b,
    stride_l,
    stride_ub,
    stride_ul,
    RULE: tl.constexpr,
    GUIDED: tl.constexpr,
    MASK_LOGIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_sample = i_row // length
    i_position = i_row % length
    token = tl.load(p_tokens + i_row)
    if token == states:
        rate = tl.load(p_rate + i_sample).to(tl.float32)
        u = uniforms_at(p_keys, i_sample, i_position, 0)
        weight = 1.0
        p_other = p_logits
        if GUIDED:
            weight = tl.load(p_guidance + i_sample).to(tl.float32)
            p_other = p_uncond + i_sample * stride_ub + i_position * stride_ul
        if u <= move_bound(rate, largest_total(weight, GUIDED), RULE):
            needs_total: tl.constexpr = (GUIDED or MASK_LOGIT) and (RULE == "tau" or RULE == "euler")
            winner, mix, cond, uncond = scan_row(
                p_logits=p_logits + i_sample * stride_b + i_position * stride_l,
                p_uncond=p_other,
                weight=weight,
                p_keys=p_keys,
                i_sample=i_sample,
                i_position=i_position,
                states=states,
                excluded=-1,
                GUIDED=GUIDED,
                MASK_LOGIT=MASK_LOGIT,
                SUMS=needs_total,
                BLOCK=BLOCK,
            )
            total = 1.0
            if needs_total:
                if GUIDED:
                    total = tl.exp(mix - weight * cond - (1.0 - weight) * uncond)
                else:
                    total = tl.exp(mix - cond)
            if u <= move_probability(rate, total, RULE):
                token = winner.to(tl.int64)
    tl.store(p_out + i_row, token)


@jit
def _uniform_kernel(
    p_logits,
    p_tokens,
    p_rate,
    p_odds,
    p_keys,
    p_out,
    length,
    states,
    stride_b,
    stride_l,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_sample = i_row // length
    i_position = i_row % length
    token = tl.load(p_tokens + i_row)
    excluded = token
    if RULE == "last":
        excluded = token * 0 - 1
    rate = tl.load(p_rate + i_sample).to(tl.float32)
    odds = tl.load(p_odds + i_sample).to(tl.float32)
    u = uniforms_at(p_keys, i_sample, i_position, 0)
    if u <= move_bound(rate, odds + states - 1.0, RULE):
        p_row = p_logits + i_sample * stride_b + i_position * stride_l
        winner, total, _, _ = scan_row(
            p_logits=p_row,
            p_uncond=p_row,
            weight=1.0,
            p_keys=p_keys,
            i_sample=i_sample,
            i_position=i_position,
            states=states,
            excluded=excluded,
            GUIDED=False,
            MASK_LOGIT=False,
            SUMS=RULE != "last",
            BLOCK=BLOCK,
        )
        if RULE == "last":
            token = winner.to(tl.int64)
        else:
            p_token = tl.exp(tl.load(p_row + token).to(tl.float32) - total)
            by_model = odds * (1.0 - p_token)
            by_chance = (states - 1.0) * (1.0 - p_token * odds / (1.0 + odds))
            if u <= move_probability(rate, by_model + by_chance, RULE):
                if uniforms_at(p_keys, i_sample, i_position, 2) * (by_model + by_chance) <= by_model:
                    token = winner.to(tl.int64)
                else:
                    other = (words_at(p_keys, i_sample, i_position, 3).to(tl.int64) * (states - 1)) >> 32
                    token = other + (other >= token).to(tl.int64)
    tl.store(p_out + i_row, token)


def launch_masked(
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
    tokens, logits = tokens.contiguous(), last_dim_contiguous(logits)
    uncond = None if uncond is None else last_dim_contiguous(uncond)
    out = torch.empty_like(tokens)
    if tokens.numel():
        block = block_size(states + mask_logit, BLOCK)
        _masked_kernel[(tokens.numel(),)](
            p_logits=logits,
            p_uncond=uncond,
            p_guidance=guidance,
            p_tokens=tokens,
            p_rate=rate,
            p_keys=keys.contiguous(),
            p_out=out,
            length=tokens.shape[1],
            states=states,
            stride_b=logits.stride(0),
            stride_l=logits.stride(1),
            stride_ub=0 if uncond is None else uncond.stride(0),
            stride_ul=0 if uncond is None else uncond.stride(1),
            RULE=rule,
            GUIDED=uncond is not None,
            MASK_LOGIT=mask_logit,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


def launch_uniform(logits: Tensor, tokens: Tensor, rate: Tensor, odds: Tensor, keys: Tensor, rule: str) -> Tensor:
    tokens, logits = tokens.contiguous(), last_dim_contiguous(logits)
    out = torch.empty_like(tokens)
    if tokens.numel():
        states = logits.shape[-1]
        block = block_size(states, BLOCK)
        _uniform_kernel[(tokens.numel(),)](
            p_logits=logits,
            p_tokens=tokens,
            p_rate=rate,
            p_odds=odds,
            p_keys=keys.contiguous(),
            p_out=out,
            length=tokens.shape[1],
            states=states,
            stride_b=logits.stride(0),
            stride_l=logits.stride(1),
            RULE=rule,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


_masked = custom_op("tau_leap", launch_masked)
_uniform = custom_op("tau_leap_uniform", launch_uniform)


@_masked.register_fake
@_uniform.register_fake
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
        return _masked(logits, tokens, per_sample(rate, tokens), keys, states, rule, mask_logit, uncond, weight)
    return reference.tau_leap(logits, tokens, rate, keys, states, rule, mask_logit, uncond, guidance)


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
        return _uniform(logits, tokens, per_sample(rate, tokens), per_sample(odds, tokens), keys, rule)
    return reference.tau_leap_uniform(logits, tokens, rate, odds, keys, rule)
