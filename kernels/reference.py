"""Every operation of `kernels` in plain PyTorch: the definition that the Triton kernels are tested against.

Random operations use the same numbers as the kernels (see `philox`). The CPU backend runs these functions. They compute
in float32, and in float64 for float64 inputs.

Shapes: B samples, L positions, K real states, C columns of logits (K, or K + 1 with a mask logit), D features.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .backend import PerSample
from .packing import Packing
from .philox import random_words

# Random numbers


def words_to_uniform(words: Tensor) -> Tensor:
    """(w + ½)·2⁻³² in (0, 1], float32: never 0, with a resolution of 2⁻³³ near 0."""
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

    E = −log(1 − u) has a resolution of 2⁻³³ near 0, where a race is won. A float32 Gumbel variable −log(−log u) stops
    at 2⁻²⁴, which lowers the effective temperature (arXiv 2409.02908). Large E is truncated at 16.6.
    """
    u = words_to_uniform(words).clamp(max=1.0 - 2.0**-24)
    return torch.log(-torch.log1p(-u))


def normal_like(x: Tensor, keys: Tensor) -> Tensor:
    """Standard normals of x's shape (B, …), float32."""
    return normal(keys, x[0].numel()).view(x.shape)


def upcast(x: Tensor) -> Tensor:
    """The dtype of computation: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(values: PerSample, like: Tensor) -> PerSample:
    """(B,) → (B, 1, …) in the dtype of `upcast(like)`, to broadcast against it."""
    if not isinstance(values, Tensor) or values.ndim == 0:
        return values
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.to(dtype).view(-1, *[1] * (like.ndim - 1))


# Perturbation


def gaussian_perturb(x: Tensor, alpha: Tensor, sigma: Tensor, keys: Tensor) -> Tensor:
    """x_t = α x₀ + σ ε. x (B, …) floating, alpha and sigma (B,), keys (B, 5). Computes in float32."""
    noise = normal_like(x, keys)
    return (per_sample(alpha, x) * upcast(x) + per_sample(sigma, x) * noise).to(x.dtype)


def mask_perturb(tokens: Tensor, prob: Tensor, keys: Tensor, mask_id: int) -> Tensor:
    """Each token becomes mask_id with probability prob[b]. tokens (B, L) int64, prob (B,), keys (B, 5)."""
    u = uniform(keys, tokens[0].numel()).view(tokens.shape)
    return torch.where(u <= per_sample(prob, tokens), mask_id, tokens)


def uniform_perturb(tokens: Tensor, prob: Tensor, keys: Tensor, states: int) -> Tensor:
    """With probability prob[b] a token is resampled uniformly from `states` states. tokens (B, L), prob (B,)."""
    u = uniform(keys, tokens[0].numel()).view(tokens.shape)
    words = random_words(keys, tokens[0].numel(), sub=1).view(tokens.shape)
    return torch.where(u <= per_sample(prob, tokens), words_to_index(words, states), tokens)


def words_to_index(words: Tensor, n: int) -> Tensor:
    """A uniform index in [0, n) from a 32-bit word: ⌊w n / 2³²⌋, biased by less than n·2⁻³²."""
    return (words * n) >> 32


# Losses


def eps_mse(eps: Tensor, keys: Tensor) -> Tensor:
    """(B,) mean of (ε̂ − ε)² over each sample; ε is the noise of `gaussian_perturb` with the same keys."""
    return (upcast(eps) - normal_like(eps, keys)).square().flatten(1).mean(1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, z_loss: float = 0.0
) -> Tensor:
    """(N,) cross-entropy −log softmax(hidden weightᵀ + bias)[target] + z_loss · lse², in float32.

    hidden (N, D), weight (K, D), bias (K,) or None, target (N,) int64 in [−1, K). Rows with target −1 are ignored:
    their loss and gradients are zero.
    """
    logits = upcast(torch.nn.functional.linear(hidden, weight, bias))
    lse = torch.logsumexp(logits, -1)
    picked = logits.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(target < 0, 0.0, lse - picked + z_loss * lse.square())


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_weight: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(Σ row_weight · losses, losses (N,)) of `linear_cross_entropy`; only the sum is differentiable."""
    losses = linear_cross_entropy(hidden, weight, bias, target, z_loss)
    return (upcast(row_weight) * losses).sum(), losses.detach()


# Gaussian steps


def guide(out: Tensor, uncond: Tensor | None, guidance: PerSample) -> Tensor:
    """w·out + (1 − w)·uncond in float32 with w = guidance, float or (B,); `out` where `uncond` is None."""
    if uncond is None:
        return upcast(out)
    w = per_sample(guidance, out)
    return w * upcast(out) + (1.0 - w) * upcast(uncond)


def ode_drift(x: Tensor, eps: Tensor, beta: PerSample, sigma: PerSample) -> Tensor:
    """Probability-flow drift −β (x + score) = −β (x − ε/σ)."""
    return -per_sample(beta, x) * (upcast(x) - eps / per_sample(sigma, x))


def heun_predict(
    x: Tensor,
    eps: Tensor,
    beta: PerSample,
    sigma: PerSample,
    dt: PerSample,
    uncond: Tensor | None = None,
    guidance: PerSample = 1.0,
) -> Tensor:
    """Euler predictor x̂ = x + dt f(x, ε) of the probability-flow ODE; see `kernels.heun_predict`."""
    eps = guide(eps, uncond, guidance)
    return (upcast(x) + per_sample(dt, x) * ode_drift(x, eps, beta, sigma)).to(x.dtype)


def heun_correct(
    x: Tensor,
    x_hat: Tensor,
    eps: Tensor,
    beta: PerSample,
    sigma: PerSample,
    dt: PerSample,
    uncond: Tensor | None = None,
    guidance: PerSample = 1.0,
) -> Tensor:
    """Heun corrector (x + x̂)/2 + dt/2 f(x̂, ε̂); see `kernels.heun_correct`."""
    drift = ode_drift(x_hat, guide(eps, uncond, guidance), beta, sigma)
    return (0.5 * (upcast(x) + upcast(x_hat)) + 0.5 * per_sample(dt, x) * drift).to(x.dtype)


def sde_step(
    x: Tensor,
    eps: Tensor,
    beta: PerSample,
    sigma: PerSample,
    dt: PerSample,
    keys: Tensor,
    uncond: Tensor | None = None,
    guidance: PerSample = 1.0,
    noise: float = 1.0,
) -> Tensor:
    """Euler–Maruyama step of the reverse SDE; see `kernels.sde_step`."""
    score2 = -2.0 * guide(eps, uncond, guidance) / per_sample(sigma, x)
    b, h = per_sample(beta, x), per_sample(dt, x)
    drift = -b * (upcast(x) + score2)
    return (upcast(x) + h * drift + noise * torch.sqrt(2.0 * b * -h) * normal_like(x, keys)).to(x.dtype)


def dpmpp_2m(
    x: Tensor,
    eps: Tensor,
    x0_prev: Tensor | None,
    alpha: PerSample,
    sigma: PerSample,
    decay: PerSample,
    gain: PerSample,
    mix: PerSample | None,
    uncond: Tensor | None = None,
    guidance: PerSample = 1.0,
) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) update, (x_next, x₀-prediction); see `kernels.dpmpp_2m`."""
    eps = guide(eps, uncond, guidance)
    x0 = (upcast(x) - per_sample(sigma, x) * eps) / per_sample(alpha, x)
    d = x0 if x0_prev is None else x0 + per_sample(mix, x) * (x0 - x0_prev)
    return (per_sample(decay, x) * upcast(x) + per_sample(gain, x) * d).to(x.dtype), x0


# Discrete steps

RULES = ("tau", "euler", "ancestral", "last")


def move_probability(rule: str, rate: Tensor, total: Tensor | float) -> Tensor:
    """P(a masked position moves), with R = rate · total, rate = h s′/(eˢ − 1) and total = Σ_v p(v) after guidance.

    tau: exactly one Poisson jump, R e^{−R}. euler: min(R, 1). ancestral: the exact posterior, min(rate, 1). last: 1.
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


def sample_categorical(logits: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """(R,) sample of softmax(logits) per row by an exponential race (Gumbel-max), argmax_v (logit_v − log E_v).

    logits (R, K) float32; rows (R, 2) int64, the sample and position of each row, which address its random numbers.
    """
    n = logits.shape[-1]
    start = rows[:, 1] * ((n + 3) // 4)
    log_e = words_to_log_exponential(random_words(keys[rows[:, 0]], n, sub=1, start=start))
    return (logits - log_e).argmax(-1)


def masked_log_scores(
    logits: Tensor, uncond: Tensor | None, guidance: PerSample | None, states: int, mask_logit: bool
) -> tuple[Tensor, PerSample]:
    """Guided log p(v) over the real states and Σ_v p(v), which is exactly 1.0 without guidance and mask logit."""
    columns = states + mask_logit
    log_p = torch.log_softmax(upcast(logits[..., :columns]), -1)[..., :states]
    if uncond is not None:
        assert guidance is not None
        log_q = torch.log_softmax(upcast(uncond[..., :columns]), -1)[..., :states]
        mixed = guidance * log_p + (1.0 - guidance) * log_q
        # a state with p(v) = 0 in the conditional branch keeps probability 0
        log_p = torch.where(log_p == -math.inf, log_p, mixed)
    elif not mask_logit:
        return log_p, 1.0
    return log_p, torch.logsumexp(log_p, -1).exp()


@dataclasses.dataclass(frozen=True)
class MaskedStep:
    """One reverse step of the masked process, without the logits. Arguments as in `kernels.tau_leap`; `guidance` is
    None without a second branch."""

    tokens: Tensor
    rate: Tensor
    keys: Tensor
    states: int
    rule: str = "tau"
    mask_logit: bool = False
    guidance: PerSample | None = None

    @property
    def guided(self) -> bool:
        return self.guidance is not None

    @property
    def needs_total(self) -> bool:
        """Whether P(move) depends on the logits, through Σ_v p(v)."""
        return (self.guided or self.mask_logit) and self.rule in ("tau", "euler")

    def moves(self, rows: Tensor, total: PerSample) -> Tensor:
        """(R,) bool: which of the masked `rows`, (R, 2) sample and position, move."""
        b, i = rows.unbind(1)
        u = uniform(self.keys, self.tokens.shape[1])[b, i]
        return u <= move_probability(self.rule, self.rate.to(torch.float32)[b], total)

    def candidates(self) -> Tensor:
        """(R, 2) sample and position of the rows that may move: those that do where this needs no logits, else all
        masked ones."""
        rows = (self.tokens == self.states).nonzero()
        return rows if self.guided or self.mask_logit else rows[self.moves(rows, 1.0)]

    def apply(self, rows: Tensor, logits: Tensor, uncond: Tensor | None = None) -> Tensor:
        """(B, L) tokens after the step; logits and uncond (R, C) are those of the candidates `rows`."""
        weight = self.guidance
        if isinstance(weight, Tensor) and weight.ndim:
            weight = weight.to(torch.float32)[rows[:, 0], None]
        log_p, total = masked_log_scores(logits, uncond, weight, self.states, self.mask_logit)
        if self.guided or self.mask_logit:
            move = self.moves(rows, total)
            rows, log_p = rows[move], log_p[move]
        out = self.tokens.clone()
        out[rows[:, 0], rows[:, 1]] = sample_categorical(log_p, self.keys, rows)
        return out


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
) -> Tensor:
    """One reverse step of the masked process, (B, L) tokens → (B, L) tokens; see `kernels.tau_leap`."""
    step = MaskedStep(tokens, rate, keys, states, rule, mask_logit, None if uncond is None else guidance)
    rows = step.candidates()
    b, i = rows.unbind(1)
    return step.apply(rows, logits[b, i], None if uncond is None else uncond[b, i])


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
) -> Tensor:
    """`tau_leap` of the logits hidden · weightᵀ + bias; see `kernels.tau_leap_linear`."""
    linear = torch.nn.functional.linear
    logits = linear(hidden, weight, bias)
    uncond = None if uncond is None else linear(uncond, weight, bias)
    return tau_leap(logits, tokens, rate, keys, states, rule, mask_logit, uncond, guidance)


def tau_leap_uniform(
    logits: Tensor, tokens: Tensor, rate: Tensor, odds: Tensor, keys: Tensor, rule: str = "tau"
) -> Tensor:
    """One reverse step of the uniform process, (B, L) tokens → (B, L) tokens; see `kernels.tau_leap_uniform`.

    The reverse rate is the sum of two parts, and the target is sampled from their mixture: p restricted to v ≠ x (a
    race without x) and the uniform distribution on v ≠ x.
    """
    states = logits.shape[-1]
    b, length = tokens.shape
    rows = torch.cartesian_prod(torch.arange(b, device=tokens.device), torch.arange(length, device=tokens.device))
    flat, x = upcast(logits).flatten(0, 1), tokens.flatten()
    if rule == "last":
        return sample_categorical(flat, keys, rows).view_as(tokens)
    px = torch.softmax(flat, -1).gather(-1, x[:, None]).squeeze(-1)
    odds, rate = odds.to(torch.float32)[rows[:, 0]], rate.to(torch.float32)[rows[:, 0]]
    by_model = odds * (1.0 - px)
    by_chance = (states - 1) * (1.0 - px * odds / (1.0 + odds))
    r = rate * (by_model + by_chance)
    move = uniform(keys, length).flatten() <= (r * torch.exp(-r) if rule == "tau" else r.clamp(max=1.0))
    from_model = uniform(keys, length, sub=2).flatten() * (by_model + by_chance) <= by_model
    other = words_to_index(random_words(keys, length, sub=3).flatten(), states - 1)
    other = other + (other >= x)
    winner = sample_categorical(flat.scatter(-1, x[:, None], -math.inf), keys, rows)
    return torch.where(move, torch.where(from_model, winner, other), x).view_as(tokens)


# Transformer operations


def adaln_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    plus_one: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(x)·γ + β; see `kernels.adaln_modulate`."""
    normed = torch.nn.functional.layer_norm(upcast(x), x.shape[-1:], eps=eps)
    gamma = upcast(scale) + 1.0 if plus_one else upcast(scale)
    return (normed * gamma[:, None] + upcast(shift)[:, None]).to(out_dtype or x.dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + gate·(branch + bias); see `kernels.gated_residual`."""
    branch = upcast(branch) if bias is None else upcast(branch) + upcast(bias)
    return torch.addcmul(upcast(x), upcast(gate)[:, None], branch).to(x.dtype)


def gated_adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    plus_one: bool = False,
    out_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·(branch + bias) and LayerNorm(x')·γ + β; see `kernels.gated_adaln`."""
    x = x if branch is None else gated_residual(x, branch, gate, bias)
    return x, adaln_modulate(x, scale, shift, eps, plus_one, out_dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias), with the error function; see `kernels.bias_gelu`."""
    return torch.nn.functional.gelu(upcast(x) + upcast(bias)).to(x.dtype)


def qk_norm_pack(
    qkv: list[Tensor], q_gamma: list[Tensor], k_gamma: list[Tensor], heads: int, packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint q, k, v (B, ΣL, H, Dh) with normalized q and k; see `kernels.qk_norm_pack`."""
    packed = []
    for x, gq, gk in zip(qkv, q_gamma, k_gamma, strict=True):
        q, k, v = x.unflatten(-1, (3, heads, -1)).unbind(2)
        norm = [  # y/‖y‖ · √Dh · γ; epsilon only matters for zero vectors
            (torch.nn.functional.rms_norm(upcast(y), y.shape[-1:], eps=1e-12) * upcast(g)).to(y.dtype)
            for y, g in ((q, gq), (k, gk))
        ]
        packed.append((*norm, v))
    q, k, v = (torch.cat(parts, 1) for parts in zip(*packed, strict=True))
    return (q, k, v) if packing is None else (q, packing.pack(k), packing.pack(v))


def joint_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | Packing | None = None) -> Tensor:
    """Softmax attention over the joint sequence, (B, L, H, Dh); see `kernels.joint_attention`."""
    if isinstance(key_mask, Packing):
        k, v = key_mask.unpack(k), key_mask.unpack(v)
    attended = key_mask.attended() if isinstance(key_mask, Packing) else key_mask
    mask = None if attended is None else attended[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)
