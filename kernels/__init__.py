"""Tensors in, tensors out: the operations of diffusion training and sampling. Knows no schedule, model or config."""

from .logits import Logits
from .philox import Draw, Rng
from .reference import (
    adaln_modulate,
    dpmpp_2m,
    eps_mse,
    gated_residual,
    gaussian_perturb,
    heun_correct,
    heun_predict,
    joint_attention,
    linear_cross_entropy,
    mask_perturb,
    normal,
    qk_norm_pack,
    sde_step,
    tau_leap,
    tau_leap_linear,
    tau_leap_uniform,
    uniform,
    uniform_perturb,
)

__all__ = [
    "Draw",
    "Logits",
    "Rng",
    "adaln_modulate",
    "dpmpp_2m",
    "eps_mse",
    "gated_residual",
    "gaussian_perturb",
    "heun_correct",
    "heun_predict",
    "joint_attention",
    "linear_cross_entropy",
    "mask_perturb",
    "normal",
    "qk_norm_pack",
    "sde_step",
    "tau_leap",
    "tau_leap_linear",
    "tau_leap_uniform",
    "uniform",
    "uniform_perturb",
]
