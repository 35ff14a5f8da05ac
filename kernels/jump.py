"""Device functions shared by `tau_leap`, `tau_leap_uniform` and `tau_leap_linear`: the probability that a position
moves, and log-sum-exps accumulated over blocks of the vocabulary."""

from .backend import jit, tl


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
def add_exponentials(top, total, values):
    """Update an elementwise running log-sum-exp (max, Σ exp(value − max)) by `values`, with one exponential."""
    difference = values - top
    e = tl.exp(-tl.abs(difference))
    return tl.maximum(top, values), tl.where(difference > 0.0, total * e + 1.0, total + e)


@jit
def log_sum(top, total):
    """Log-sum-exp over the last axis, from running pairs (max, Σ exp(value − max))."""
    peak = tl.max(top, -1, keep_dims=True)
    return tl.log(tl.sum(total * tl.exp(top - peak), -1)) + tl.max(top, -1)
