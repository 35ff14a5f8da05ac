"""Every operation of `kernels` in plain PyTorch: the definition that the Triton kernels are held to.

The random operations draw the very numbers the kernels draw (see `philox`). They are product code: the
CPU runs on them, tests and benchmarks import them. They compute in float32, and in float64 where that is given.

Shapes: B samples, L positions, K real states, C head columns (K, or K + 1 with a mask column), D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import MASK32

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)


# Random numbers


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on int64 tensors that hold unsigned 32-bit words; broadcasts.

    An int64 product wraps modulo 2⁶⁴ but keeps every bit of a 32×32-bit product, so the high word is a
    shift and a mask away.
    """
    for _ in range(10):
        product0, product1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + PHILOX_W[0]) & MASK32, (k1 + PHILOX_W[1]) & MASK32
    return c0, c1, c2, c3


def random_words(keys: Tensor, n: int, sub: int = 0, start: Tensor | None = None) -> Tensor:
    """(B, n) int64 of uniform 32-bit words: elements 0 … n−1 of each row of keys (B, 5).

    `sub` (0 to 3) picks one of the four streams of a key. `start` (B,), if given, is the first *block*
    of four elements of each row instead of 0.
    """
    blocks = torch.arange((n + 3) // 4, device=keys.device)
    k0, k1, c1, c2, c3 = keys[:, :, None].unbind(1)
    c0 = blocks[None] if start is None else start[:, None] + blocks
    words = torch.stack(philox(c0 & MASK32, c1, c2, c3 + sub, k0, k1), dim=-1)
    return words.flatten(1)[:, :n]


def words_to_uniform(words: Tensor) -> Tensor:
    """float32 in (0, 1], (w + ½)·2⁻³²: resolved to 2⁻³³ near 0, never 0."""
    return words.to(torch.float32) * 2.0**-32 + 2.0**-33


def uniform(keys: Tensor, n: int, sub: int = 0) -> Tensor:
    """(B, n) float32 uniforms in (0, 1]."""
    return words_to_uniform(random_words(keys, n, sub))


def normal(keys: Tensor, n: int, sub: int = 0) -> Tensor:
    """(B, n) float32 standard normals by Box–Muller: elements 2i and 2i+1 share words 2i (radius) and 2i+1 (angle).

    Tails reach √(−2 ln 2⁻³³) = 6.76.
    """
    u = uniform(keys, n + n % 2, sub).unflatten(1, (-1, 2))
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0])), (2.0 * math.pi) * u[..., 1]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(1)[:, :n]


def words_to_log_exponential(words: Tensor) -> Tensor:
    """log E for E ~ Exp(1), from 32-bit words.

    E = −log(1 − u): small E, which wins a race, is resolved to 2⁻³³; a float32 Gumbel −log(−log u) stops
    at 2⁻²⁴ and lowers the temperature (arXiv 2409.02908). Large E is cut at 16.6.
    """
    u = words_to_uniform(words).clamp(max=1.0 - 2.0**-24)
    return torch.log(-torch.log1p(-u))


def normal_like(x: Tensor, keys: Tensor) -> Tensor:
    """Standard normals of x's shape (B, …), float32."""
    return normal(keys, x[0].numel()).view(x.shape)


def wide(x: Tensor) -> Tensor:
    """What every operation computes in: float64 of float64, float32 of everything else."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(values: Tensor | float, like: Tensor) -> Tensor | float:
    """(B,) → (B, 1, …) in the dtype that `like` is computed in, to broadcast against it."""
    if not isinstance(values, Tensor) or values.ndim == 0:
        return values
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.to(dtype).view(-1, *[1] * (like.ndim - 1))


# Noising


def gaussian_perturb(x: Tensor, alpha: Tensor, sigma: Tensor, keys: Tensor) -> Tensor:
    """x_t = α x₀ + σ ε. x (B, …) floating, alpha and sigma (B,), keys (B, 5). Computes in float32."""
    noise = normal_like(x, keys)
    return (per_sample(alpha, x) * wide(x) + per_sample(sigma, x) * noise).to(x.dtype)


def mask_perturb(tokens: Tensor, prob: Tensor, keys: Tensor, mask_id: int) -> Tensor:
    """Each token becomes mask_id with probability prob[b]. tokens (B, L) int64, prob (B,), keys (B, 5)."""
    u = uniform(keys, tokens[0].numel()).view(tokens.shape)
    return torch.where(u <= per_sample(prob, tokens), mask_id, tokens)


def uniform_perturb(tokens: Tensor, prob: Tensor, keys: Tensor, states: int) -> Tensor:
    """Each token is redrawn from all `states` states with probability prob[b]. tokens (B, L), prob (B,)."""
    u = uniform(keys, tokens[0].numel()).view(tokens.shape)
    words = random_words(keys, tokens[0].numel(), sub=1).view(tokens.shape)
    return torch.where(u <= per_sample(prob, tokens), words_to_index(words, states), tokens)


def words_to_index(words: Tensor, n: int) -> Tensor:
    """A uniform index in [0, n) from a 32-bit word: ⌊w n / 2³²⌋, biased by less than n·2⁻³²."""
    return (words * n) >> 32


# Losses


def eps_mse(eps: Tensor, keys: Tensor) -> Tensor:
    """(B,) mean over the sample of (ε̂ − ε)², with ε the noise that `gaussian_perturb` drew from the same keys."""
    return (wide(eps) - normal_like(eps, keys)).square().flatten(1).mean(1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_loss: float = 0.0):
    """(N,) cross-entropy −log softmax(hidden weightᵀ + bias)[target] + z_loss · lse², in float32.

    hidden (N, D), weight (K, D), bias (K,) or None, target (N,) int64 in [−1, K); a row of target −1 is left
    out: its loss and gradients are zero.
    """
    logits = wide(torch.nn.functional.linear(hidden, weight, bias))
    lse = torch.logsumexp(logits, -1)
    picked = logits.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(target < 0, 0.0, lse - picked + z_loss * lse.square())


# Gaussian steps


def guide(out: Tensor, uncond: Tensor | None, guidance: Tensor | float) -> Tensor:
    """w·out + (1 − w)·uncond in float32; `out` alone where there is no second branch. guidance: float or (B,)."""
    if uncond is None:
        return wide(out)
    w = per_sample(guidance, out)
    return w * wide(out) + (1.0 - w) * wide(uncond)


def ode_drift(x: Tensor, eps: Tensor, beta: Tensor, sigma: Tensor) -> Tensor:
    """Probability-flow drift −β (x + score) = −β (x − ε/σ)."""
    return -per_sample(beta, x) * (wide(x) - eps / per_sample(sigma, x))


def heun_predict(x, eps, beta, sigma, dt, uncond=None, guidance=1.0) -> Tensor:
    """Euler predictor x̂ = x + dt f(x, ε) of the probability-flow ODE, guidance included.

    x, eps, uncond (B, …); beta, sigma, dt (B,) with dt < 0 towards the data; guidance float or (B,).
    """
    eps = guide(eps, uncond, guidance)
    return (wide(x) + per_sample(dt, x) * ode_drift(x, eps, beta, sigma)).to(x.dtype)


def heun_correct(x, x_hat, eps, beta, sigma, dt, uncond=None, guidance=1.0) -> Tensor:
    """Heun corrector x + dt/2 (f₁ + f₂) = (x + x̂)/2 + dt/2 f(x̂, ε̂): the first drift is read off x̂ − x.

    eps, beta, sigma belong to (x̂, t + dt).
    """
    drift = ode_drift(x_hat, guide(eps, uncond, guidance), beta, sigma)
    return (0.5 * (wide(x) + wide(x_hat)) + 0.5 * per_sample(dt, x) * drift).to(x.dtype)


def sde_step(x, eps, beta, sigma, dt, keys, uncond=None, guidance=1.0, noise=1.0) -> Tensor:
    """Euler–Maruyama step of the reverse SDE, x − |dt| (−β) (x + 2 score) + √(2 β |dt|) z; `noise` scales z."""
    score2 = -2.0 * guide(eps, uncond, guidance) / per_sample(sigma, x)
    b, h = per_sample(beta, x), per_sample(dt, x)
    drift = -b * (wide(x) + score2)
    return (wide(x) + h * drift + noise * torch.sqrt(2.0 * b * -h) * normal_like(x, keys)).to(x.dtype)


def dpmpp_2m(x, eps, x0_prev, alpha, sigma, decay, gain, mix, uncond=None, guidance=1.0) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) update in data prediction (arXiv 2211.01095): returns (x_next, x₀ prediction).

    D₀ = (x − σ ε)/α, D = D₀ + mix (D₀ − D₋₁), x_next = decay x + gain D; all coefficients (B,), float32.
    `x0_prev` None means a first-order step.
    """
    eps = guide(eps, uncond, guidance)
    x0 = (wide(x) - per_sample(sigma, x) * eps) / per_sample(alpha, x)
    d = x0 if x0_prev is None else x0 + per_sample(mix, x) * (x0 - x0_prev)
    return (per_sample(decay, x) * wide(x) + per_sample(gain, x) * d).to(x.dtype), x0


# Discrete steps

RULES = ("tau", "euler", "ancestral", "last")


def move_probability(rule: str, rate: Tensor, total: Tensor | float) -> Tensor:
    """P(a masked position moves), from rate = h s′/(eˢ − 1) and total = Σ_v of the mixed p(v); R = rate · total.

    tau: exactly one Poisson jump, R e^{−R}. euler: min(R, 1). ancestral: the exact posterior, min(rate, 1).
    last: 1.
    """
    if rule == "tau":
        r = rate * total
        return r * torch.exp(-r)
    if rule == "euler":
        return (rate * total).clamp(max=1.0)
    if rule == "ancestral":
        return rate.clamp(max=1.0)
    assert rule == "last", rule
    return torch.ones_like(rate)


def race(logits: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Draw an index from softmax(logits) per row by an exponential race, argmax_v (logit_v − log E_v).

    logits (R, K) float32; rows (R, 2) int64: sample and position of each row, which address its numbers.
    """
    n = logits.shape[-1]
    start = rows[:, 1] * ((n + 3) // 4)
    log_e = words_to_log_exponential(random_words(keys[rows[:, 0]], n, sub=1, start=start))
    return (logits - log_e).argmax(-1)


def masked_log_scores(logits, uncond, guidance, states: int, mask_logit: bool) -> tuple[Tensor, Tensor | float]:
    """Log p over the real states, guided, and the mass Σ_v p(v) (exactly 1.0 where that is known beforehand)."""
    known = uncond is None and not mask_logit

    def log_p(values):
        return torch.log_softmax(wide(values[..., : states + mask_logit]), -1)[..., :states]

    scores = log_p(logits)
    if uncond is not None:
        mixed = guidance * scores + (1.0 - guidance) * log_p(uncond)
        scores = torch.where(
            scores == -math.inf, scores, mixed
        )  # a state that the first branch forbids stays forbidden
    return scores, (1.0 if known else torch.logsumexp(scores, -1).exp())


def tau_leap(
    logits: Tensor,
    tokens: Tensor,
    rate: Tensor,
    keys: Tensor,
    states: int,
    rule: str = "tau",
    mask_logit: bool = False,
    uncond: Tensor | None = None,
    guidance: Tensor | float = 1.0,
) -> Tensor:
    """One reverse step of the masked process: (B, L) tokens → (B, L) tokens.

    Masked positions (token == states) move with `move_probability`; a position that moves becomes v with
    probability c(v)/Σc. Others stay. Only rows that may move are looked at.

    Args:
        logits: (B, L, C) of x₀, C ≥ states. Extra columns are ignored, unless
        mask_logit: column `states` is a mask logit that takes part in the softmax and is not renormalized away.
        rate: (B,) h s′/(eˢ − 1), which is h/t for the log-linear schedule.
        uncond, guidance: second branch of logits and its weight, float or (B,): mixes log p, see `guide`.
    """

    def row_logits(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        b, i = rows.unbind(1)
        return logits[b, i], None if uncond is None else uncond[b, i]

    return leap_rows(row_logits, tokens, rate, keys, states, rule, mask_logit, uncond is not None, guidance)


def leap_rows(row_logits, tokens, rate, keys, states, rule, mask_logit, guided: bool, guidance) -> Tensor:
    """`tau_leap` with `row_logits(rows)` → ((R, C) logits, those of the second branch or None), rows (R, 2)."""
    masked = tokens == states
    rows = masked.nonzero()
    rate_rows = rate.to(torch.float32)[rows[:, 0]]
    u = uniform(keys, tokens.shape[1])[masked]

    def scores_of(rows_):
        weight = guidance
        if isinstance(guidance, Tensor) and guidance.ndim:
            weight = guidance.to(torch.float32)[rows_[:, 0], None]
        return masked_log_scores(*row_logits(rows_), weight, states, mask_logit)

    if not guided and not mask_logit:  # the total rate is known: jump first, look later
        move = u <= move_probability(rule, rate_rows, 1.0)
        rows = rows[move]
        scores, _ = scores_of(rows)
    else:
        scores, total = scores_of(rows)
        move = u <= move_probability(rule, rate_rows, total)
        rows, scores = rows[move], scores[move]
    out = tokens.clone()
    out[rows[:, 0], rows[:, 1]] = race(scores, keys, rows)
    return out


def tau_leap_linear(
    hidden, weight, bias, tokens, rate, keys, states, rule="tau", mask_logit=False, uncond=None, guidance=1.0
) -> Tensor:
    """`tau_leap` from hidden states (B, L, D) and the head weight (C, D), bias (C,) or None; `uncond` is hidden too."""
    linear = torch.nn.functional.linear
    other = None if uncond is None else linear(uncond, weight, bias)
    logits = linear(hidden, weight, bias)
    return tau_leap(logits, tokens, rate, keys, states, rule, mask_logit, other, guidance)


def tau_leap_uniform(logits: Tensor, tokens: Tensor, rate: Tensor, odds: Tensor, keys: Tensor, rule: str = "tau"):
    """One reverse step of the uniform process: (B, L) tokens → (B, L) tokens.

    With p = softmax(logits) (B, L, K) and odds = a K/(1 − a), a = e^{−s}, Bayes' rule gives the reverse rate
    from x to v ≠ x as (s′/K) [odds p(v) + 1 − p(x) odds/(1 + odds)]. `rate` (B,) is h s′/K. Rules `tau` and
    `euler` as in `tau_leap`; `last` draws x₀ from p at every position. The target is drawn from the mixture of
    its two parts: p restricted to v ≠ x (a race without x) and the uniform law on v ≠ x.
    """
    states = logits.shape[-1]
    b, length = tokens.shape
    rows = torch.cartesian_prod(torch.arange(b, device=tokens.device), torch.arange(length, device=tokens.device))
    flat, x = wide(logits).flatten(0, 1), tokens.flatten()
    if rule == "last":
        return race(flat, keys, rows).view_as(tokens)
    px = torch.softmax(flat, -1).gather(-1, x[:, None]).squeeze(-1)
    odds, rate = odds.to(torch.float32)[rows[:, 0]], rate.to(torch.float32)[rows[:, 0]]
    by_model = odds * (1.0 - px)
    by_chance = (states - 1) * (1.0 - px * odds / (1.0 + odds))
    r = rate * (by_model + by_chance)
    move = uniform(keys, length).flatten() <= (r * torch.exp(-r) if rule == "tau" else r.clamp(max=1.0))
    from_model = uniform(keys, length, sub=2).flatten() * (by_model + by_chance) <= by_model
    other = words_to_index(random_words(keys, length, sub=3).flatten(), states - 1)
    other = other + (other >= x)
    winner = race(flat.scatter(-1, x[:, None], -math.inf), keys, rows)
    return torch.where(move, torch.where(from_model, winner, other), x).view_as(tokens)


# Transformer pieces


def adaln_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5, plus_one: bool = False) -> Tensor:
    """LayerNorm(x)·γ + β without learned affine: γ = scale (MMDiT) or 1 + scale (DiT, plus_one), β = shift.

    x (B, L, D); scale, shift (B, D). Computes in float32 and returns x's dtype.
    """
    normed = torch.nn.functional.layer_norm(wide(x), x.shape[-1:], eps=eps)
    gamma = wide(scale) + 1.0 if plus_one else wide(scale)
    return (normed * gamma[:, None] + wide(shift)[:, None]).to(x.dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate·branch. x, branch (B, L, D); gate (B, D). Returns x's dtype."""
    return torch.addcmul(wide(x), wide(gate)[:, None], wide(branch)).to(x.dtype)


def qk_norm_pack(
    qkv: list[Tensor], q_gamma: list[Tensor], k_gamma: list[Tensor], heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint q, k, v (B, ΣL, H, Dh) from each modality's qkv (B, L_m, 3·H·Dh), packed as q, k, v, head, feature.

    q and k are normalized per head: x/‖x‖ · √Dh · γ, γ (H, Dh) per modality.
    """
    packed = []
    for x, gq, gk in zip(qkv, q_gamma, k_gamma, strict=True):
        q, k, v = x.unflatten(-1, (3, heads, -1)).unbind(2)
        norm = [  # an RMS norm whose epsilon never shows: y/‖y‖ · √Dh
            (torch.nn.functional.rms_norm(wide(y), y.shape[-1:], eps=1e-12) * wide(g)).to(y.dtype)
            for y, g in ((q, gq), (k, gk))
        ]
        packed.append((*norm, v))
    return tuple(torch.cat(parts, 1) for parts in zip(*packed, strict=True))


def joint_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Softmax attention over the joint sequence, (B, L, H, Dh). key_mask (B, L) bool, True = attend.

    There may be fewer queries. Those at masked positions are still computed. Scale 1/√Dh.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)
