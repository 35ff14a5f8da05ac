"""Operations of diffusion training and sampling on tensors; independent of schedules, networks and configurations."""

from .adaln import adaln_modulate, gated_residual
from .attention import joint_attention
from .eps_mse import eps_mse
from .heun import dpmpp_2m, heun_correct, heun_predict, sde_step
from .lazy_logits import LazyLogits
from .linear_cross_entropy import linear_cross_entropy
from .perturb import gaussian_perturb, mask_perturb, uniform_perturb
from .philox import Draw, Rng
from .qk_norm import qk_norm_pack
from .random import normal, uniform
from .tau_leap import tau_leap, tau_leap_uniform
from .tau_leap_linear import tau_leap_linear

__all__ = [
    "Draw",
    "LazyLogits",
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
