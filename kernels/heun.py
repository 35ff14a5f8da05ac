"""Sampler steps of Gaussian modalities, guidance included: `heun_predict`, `heun_correct`, `sde_step`, `dpmpp_2m`.

Floor: every input tensor read once, every output written once. Noise is generated in registers.
"""

import torch
from torch import Tensor

from . import reference
from .backend import (
    PerSample,
    block_size,
    check_device,
    check_floating,
    check_keys,
    check_per_sample,
    check_shape,
    custom_op,
    jit,
    per_sample,
    tl,
    triton,
    use_triton,
    warps,
)
from .random import normals_block


@jit
def scalar(p_values, i_sample):
    return tl.load(p_values + i_sample).to(tl.float32)


@jit
def guided(p_eps, p_uncond, p_guidance, i_sample, o, m, GUIDED: tl.constexpr):
    """w ε + (1 − w) ε_uncond in float32, or ε."""
    b_eps = tl.load(p_eps + o, mask=m, other=0.0).to(tl.float32)
    if GUIDED:
        w = scalar(p_guidance, i_sample)
        b_eps = w * b_eps + (1.0 - w) * tl.load(p_uncond + o, mask=m, other=0.0).to(tl.float32)
    return b_eps


@jit
def _step_kernel(
    p_x,
    p_x_hat,
    p_eps,
    p_uncond,
    p_guidance,
    p_beta,
    p_sigma,
    p_dt,
    p_keys,
    p_out,
    n,
    noise,
    KIND: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KIND: "predict" or "correct" for the probability-flow ODE, "sde" for the reverse SDE."""
    i_sample = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_element = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o_element < n
    o = i_sample * n + o_element
    beta = scalar(p_beta, i_sample)
    sigma = scalar(p_sigma, i_sample)
    dt = scalar(p_dt, i_sample)
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_score = -guided(p_eps, p_uncond, p_guidance, i_sample, o, m, GUIDED) / sigma
    if KIND == "predict":
        b_out = b_x + dt * (-beta * (b_x + b_score))
    elif KIND == "correct":
        b_x_hat = tl.load(p_x_hat + o, mask=m, other=0.0).to(tl.float32)
        b_out = 0.5 * (b_x + b_x_hat) + 0.5 * dt * (-beta * (b_x_hat + b_score))
    else:
        o_quad = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        b_noise = noise * tl.sqrt(2.0 * beta * -dt) * normals_block(p_keys, i_sample, o_quad, 0)
        b_out = b_x + dt * (-beta * (b_x + 2.0 * b_score)) + b_noise
    tl.store(p_out + o, b_out, mask=m)


@jit
def _dpmpp_kernel(
    p_x,
    p_eps,
    p_uncond,
    p_guidance,
    p_x0_prev,
    p_alpha,
    p_sigma,
    p_decay,
    p_gain,
    p_mix,
    p_out,
    p_x0,
    n,
    SECOND_ORDER: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sample = tl.program_id(0).to(tl.int64)
    o_element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o_element < n
    o = i_sample * n + o_element
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_eps = guided(p_eps, p_uncond, p_guidance, i_sample, o, m, GUIDED)
    b_x0 = (b_x - scalar(p_sigma, i_sample) * b_eps) / scalar(p_alpha, i_sample)
    b_d = b_x0
    if SECOND_ORDER:
        b_prev = tl.load(p_x0_prev + o, mask=m, other=0.0).to(tl.float32)
        b_d = b_x0 + scalar(p_mix, i_sample) * (b_x0 - b_prev)
    tl.store(p_out + o, scalar(p_decay, i_sample) * b_x + scalar(p_gain, i_sample) * b_d, mask=m)
    tl.store(p_x0 + o, b_x0, mask=m)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.contiguous() for value in tensors]


def launch_step(
    x: Tensor,
    x_hat: Tensor | None,
    eps: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | None,
    beta: Tensor,
    sigma: Tensor,
    dt: Tensor,
    keys: Tensor | None,
    noise: float,
    kind: str,
) -> Tensor:
    x, x_hat, eps, uncond, keys = _contiguous(x, x_hat, eps, uncond, keys)
    out = torch.empty_like(x)
    if x.numel():
        n = x[0].numel()
        block = block_size(n, 1024)
        _step_kernel[(len(x), triton.cdiv(n, block))](
            p_x=x,
            p_x_hat=x_hat,
            p_eps=eps,
            p_uncond=uncond,
            p_guidance=guidance,
            p_beta=beta,
            p_sigma=sigma,
            p_dt=dt,
            p_keys=keys,
            p_out=out,
            n=n,
            noise=noise,
            KIND=kind,
            GUIDED=uncond is not None,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


def launch_dpmpp(
    x: Tensor,
    eps: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | None,
    x0_prev: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    decay: Tensor,
    gain: Tensor,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x, eps, uncond, x0_prev = _contiguous(x, eps, uncond, x0_prev)
    out, x0 = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    if x.numel():
        n = x[0].numel()
        block = block_size(n, 1024)
        _dpmpp_kernel[(len(x), triton.cdiv(n, block))](
            p_x=x,
            p_eps=eps,
            p_uncond=uncond,
            p_guidance=guidance,
            p_x0_prev=x0_prev,
            p_alpha=alpha,
            p_sigma=sigma,
            p_decay=decay,
            p_gain=gain,
            p_mix=mix,
            p_out=out,
            p_x0=x0,
            n=n,
            SECOND_ORDER=x0_prev is not None,
            GUIDED=uncond is not None,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out, x0


_step = custom_op("gaussian_step", launch_step)
_dpmpp = custom_op("dpmpp_2m", launch_dpmpp)


@_step.register_fake
def _(x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_dpmpp.register_fake
def _(x, *others):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out, dtype=torch.float32)


def _check(x: Tensor, tensors: dict[str, Tensor | None], coefficients: dict[str, PerSample | None]) -> None:
    check_floating(x=x, **tensors)
    check_device(x.device, **tensors)
    for name, value in tensors.items():
        check_shape(name, value, x.shape)
    check_per_sample(x, **coefficients)


def _per_sample(x: Tensor, *values: PerSample) -> list[Tensor]:
    return [per_sample(value, x) for value in values]


def _weight(x: Tensor, uncond: Tensor | None, guidance: PerSample) -> Tensor | None:
    return None if uncond is None else per_sample(guidance, x)


def heun_predict(
    x: Tensor,
    eps: Tensor,
    beta: PerSample,
    sigma: PerSample,
    dt: PerSample,
    uncond: Tensor | None = None,
    guidance: PerSample = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Euler predictor x̂ = x + dt f(x, ε), f(x, ε) = −β (x − ε/σ), of the probability-flow ODE.

    x (B, …) is the state; eps and uncond, of the same shape, are the conditional and unconditional ε-prediction, mixed
    as guidance · eps + (1 − guidance) · uncond. beta, sigma, dt and guidance are floats or (B,); dt < 0 towards the
    data. Computes in float32 and returns x's dtype.
    """
    _check(x, {"eps": eps, "uncond": uncond}, {"beta": beta, "sigma": sigma, "dt": dt, "guidance": guidance})
    if use_triton(backend, x, x=x, eps=eps, uncond=uncond):
        weight = _weight(x, uncond, guidance)
        return _step(x, None, eps, uncond, weight, *_per_sample(x, beta, sigma, dt), None, 1.0, "predict")
    return reference.heun_predict(x, eps, beta, sigma, dt, uncond, guidance)


def heun_correct(
    x: Tensor,
    x_hat: Tensor,
    eps: Tensor,
    beta: PerSample,
    sigma: PerSample,
    dt: PerSample,
    uncond: Tensor | None = None,
    guidance: PerSample = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Heun corrector x + dt/2 (f₁ + f₂) = (x + x̂)/2 + dt/2 f(x̂, ε̂), since dt f₁ = x̂ − x.

    Arguments as in `heun_predict`; eps, uncond, beta and sigma belong to the predicted state x̂ at t + dt.
    """
    tensors = {"x_hat": x_hat, "eps": eps, "uncond": uncond}
    _check(x, tensors, {"beta": beta, "sigma": sigma, "dt": dt, "guidance": guidance})
    if use_triton(backend, x, x=x, **tensors):
        weight = _weight(x, uncond, guidance)
        return _step(x, x_hat, eps, uncond, weight, *_per_sample(x, beta, sigma, dt), None, 1.0, "correct")
    return reference.heun_correct(x, x_hat, eps, beta, sigma, dt, uncond, guidance)


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
    backend: str | None = None,
) -> Tensor:
    """Euler–Maruyama step of the reverse SDE, x − β dt (x + 2 score) + noise · √(2 β |dt|) z with score = −ε/σ.

    Arguments as in `heun_predict`; z ~ N(0, I) is drawn from keys (B, 5).
    """
    _check(x, {"eps": eps, "uncond": uncond}, {"beta": beta, "sigma": sigma, "dt": dt, "guidance": guidance})
    check_keys(keys, x)
    if use_triton(backend, x, x=x, eps=eps, uncond=uncond):
        weight = _weight(x, uncond, guidance)
        return _step(x, None, eps, uncond, weight, *_per_sample(x, beta, sigma, dt), keys, float(noise), "sde")
    return reference.sde_step(x, eps, beta, sigma, dt, keys, uncond, guidance, noise)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) update in data prediction (arXiv 2211.01095): (x_next, float32 x₀-prediction).

    D₀ = (x − σ ε)/α, D = D₀ + mix (D₀ − D₋₁), x_next = decay x + gain D. D₋₁ is `x0_prev`, the x₀-prediction of the
    previous step; None gives a first-order step, without `mix`. Coefficients are floats or (B,).
    """
    tensors = {"eps": eps, "x0_prev": x0_prev, "uncond": uncond}
    coefficients = {"alpha": alpha, "sigma": sigma, "decay": decay, "gain": gain, "mix": mix, "guidance": guidance}
    _check(x, tensors, coefficients)
    if use_triton(backend, x, x=x, **tensors):
        mix = None if x0_prev is None else per_sample(mix, x)
        weight = _weight(x, uncond, guidance)
        return _dpmpp(x, eps, uncond, weight, x0_prev, *_per_sample(x, alpha, sigma, decay, gain), mix)
    return reference.dpmpp_2m(x, eps, x0_prev, alpha, sigma, decay, gain, mix, uncond, guidance)
