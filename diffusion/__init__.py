"""The mathematics of diffusion on one state space and on products of them. The network is passed in as a callable."""

from .guidance import Guidance
from .processes import Gaussian, Masked, Process, Uniform
from .schedules import GAUSSIAN_SCHEDULES, Cosine, Linear, LogLinear, LogSNR, ScaledLinear
from .space import Space
from .time_grid import time_grid
from .training_times import TimeSampler
from .weighting import WEIGHTINGS, Weighting

__all__ = [
    "GAUSSIAN_SCHEDULES",
    "WEIGHTINGS",
    "Cosine",
    "Gaussian",
    "Guidance",
    "Linear",
    "LogLinear",
    "LogSNR",
    "Masked",
    "Process",
    "ScaledLinear",
    "Space",
    "TimeSampler",
    "Uniform",
    "Weighting",
    "time_grid",
]
