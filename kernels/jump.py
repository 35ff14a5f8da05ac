"""Device functions that `tau_leap`, `tau_leap_uniform` and `tau_leap_linear` share: whether a position moves, and
sums of exponentials kept while a vocabulary streams by."""

from .backend import jit, tl

RULES = ("tau", "euler", "ancestral", "last")


@jit
def move_probability(rate, total, RULE: tl.constexpr):
    """P(a masked position moves), R = rate · total; see `reference.move_probability`."""
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
    """An upper bound of `move_probability` over all totals up to `largest_total`, known before any logit is read.

    R e^{−R} rises until R = 1 and never exceeds 1/e. The slack covers rounding of a total that is exactly at its limit.
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
    """Σ_v p(v)^w q(v)^{1−w} is at most 1 for w in [0, 1] (Hölder) and has no bound beyond."""
    if GUIDED:
        limit = tl.where((weight >= 0.0) & (weight <= 1.0), 1.0, float("inf"))
    else:
        limit = 1.0
    return limit


@jit
def add_exponentials(top, total, values):
    """One step of a running log-sum-exp, elementwise, by one exponential: (max, Σ exp(value − max))."""
    difference = values - top
    e = tl.exp(-tl.abs(difference))
    return tl.maximum(top, values), tl.where(difference > 0.0, total * e + 1.0, total + e)


@jit
def log_sum(top, total):
    """The log-sum-exp of a running pair over its last axis."""
    peak = tl.max(top, -1, keep_dims=True)
    return tl.log(tl.sum(total * tl.exp(top - peak), -1)) + tl.max(top, -1)
