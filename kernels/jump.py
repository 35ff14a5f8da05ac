"""Device functions shared by `tau_leap`, `tau_leap_uniform` and `tau_leap_linear`: the probability that a position
moves, guided logits, log-sum-exps, and the exponential race that draws a state."""

from .backend import jit, tl
from .random import exponential

LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def move_probability(rate, total, RULE: tl.constexpr):
    """P(a masked position moves) with R = rate · total; see `reference.move_probability`."""
    if RULE == "tau":
        r = rate * total
        p = r * tl.exp(-r)
    elif RULE == "euler":
        p = tl.minimum(rate * total, 1.0)
    elif RULE == "ancestral":
        p = tl.minimum(rate, 1.0)
    else:
        p = rate * 0.0 + 1.0
    return p


@jit
def move_bound(rate, largest_total, RULE: tl.constexpr):
    """Upper bound of `move_probability` over all totals up to `largest_total`; it needs no logits.

    R e^{−R} increases up to R = 1, where it is 1/e. The factor 1.0001 covers rounding of a total at its limit.
    """
    if RULE == "tau":
        r = tl.minimum(rate * largest_total, 1.0)
        p = r * tl.exp(-r) * 1.0001
    elif RULE == "euler":
        p = rate * largest_total * 1.0001
    else:
        p = move_probability(rate, largest_total, RULE)
    return p


@jit
def largest_total(weight, GUIDED: tl.constexpr):
    """Upper bound of Σ_v p(v)^w q(v)^{1−w}: 1 for w in [0, 1] by Hölder's inequality, infinite otherwise."""
    if GUIDED:
        limit = tl.where((weight >= 0.0) & (weight <= 1.0), 1.0, float("inf"))
    else:
        limit = 1.0
    return limit


@jit
def mix_branches(b_cond, b_uncond, weight):
    """Guided logits. A state with logit −∞ in the conditional branch keeps probability 0; the mixture could be NaN."""
    b_mix = weight * b_cond + (1.0 - weight) * b_uncond
    return tl.where(b_cond > float("-inf"), b_mix, float("-inf"))


@jit
def guided_total(mix, cond, uncond, weight, GUIDED: tl.constexpr):
    """Σ_v p(v) over the states from log-sum-exps: of the guided logits over the states, of each branch over its
    columns."""
    if GUIDED:
        total = tl.exp(mix - weight * cond - (1.0 - weight) * uncond)
    else:
        total = tl.exp(mix - cond)
    return total


@jit
def row_peak(b_values):
    """(R, 1) largest value of each row, finite, so that −∞ minus it is −∞."""
    return tl.maximum(tl.max(b_values, 1, keep_dims=True), -1e38)


@jit
def row_log_sum(b_values):
    """(R,) log-sum-exp of each row of (R, V); values may be −∞."""
    peak = row_peak(b_values)
    sums = tl.sum(tl.exp2(b_values * LOG2_E - peak * LOG2_E), 1, keep_dims=True)
    return tl.reshape(peak + tl.log(sums), (b_values.shape[0],))


@jit
def race(b_logits, b_words, o_column, states):
    """(R,) score and state of the winner of the exponential race in each row of (R, V) logits.

    State v arrives at time E_v / exp(logit_v), and the first one wins. Its score −log(time), up to a constant that is
    the same for all rows, is that of a Gumbel-max draw, so that winners of several blocks can be compared. Times are
    relative to the largest logit of the block: they cannot underflow, and where they overflow they do not win.
    """
    peak = row_peak(b_logits)
    b_time = exponential(b_words) * tl.exp2(peak * LOG2_E - b_logits * LOG2_E)
    first = tl.min(b_time, 1, keep_dims=True)
    winner = tl.min(tl.where(b_time == first, o_column, states), 1)
    return tl.reshape(peak - tl.log(first), (b_logits.shape[0],)), winner


@jit
def first_of_parts(b_score, b_winner, states):
    """(R,) winner of each row of (R, parts) scores and winners of the parts of the vocabulary."""
    best = tl.max(b_score, 1, keep_dims=True)
    return tl.min(tl.where(b_score == best, b_winner, states), 1)
