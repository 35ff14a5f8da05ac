"""Operations of diffusion training and sampling on tensors; independent of schedules, networks and configurations."""

from .adaln import adaln_modulate
from .attention import joint_attention, pack_keys
from .bias_gelu import bias_gelu
from .column_logits import ColumnGroup, ColumnLogits
from .eps_mse import eps_mse
from .gated_adaln import gated_adaln
from .gated_residual import gated_residual
from .heun import dpmpp_2m, heun_correct, heun_predict, sde_step
from .lazy_logits import LazyLogits
from .linear_cross_entropy import linear_cross_entropy
from .linear_cross_entropy_sum import linear_cross_entropy_sum
from .packing import Packing
from .perturb import gaussian_perturb, mask_perturb, uniform_perturb
from .philox import Draw, Rng
from .qk_norm import qk_norm_pack
from .random import normal, uniform
from .tau_leap import tau_leap
from .tau_leap_linear import tau_leap_linear
from .tau_leap_uniform import tau_leap_uniform

__all__ = [
    "ColumnGroup",
    "ColumnLogits",
    "Draw",
    "LazyLogits",
    "Packing",
    "Rng",
    "adaln_modulate",
    "bias_gelu",
    "dpmpp_2m",
    "eps_mse",
    "gated_adaln",
    "gated_residual",
    "gaussian_perturb",
    "heun_correct",
    "heun_predict",
    "joint_attention",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "mask_perturb",
    "normal",
    "pack_keys",
    "qk_norm_pack",
    "sde_step",
    "tau_leap",
    "tau_leap_linear",
    "tau_leap_uniform",
    "uniform",
    "uniform_perturb",
]
