"""Sampling: conditions, samplers, the any-to-any loop, and trained models as pipelines."""

from .condition import Condition
from .sampler import sample
from .steppers import SAMPLERS, Sampler

__all__ = ["SAMPLERS", "Condition", "Sampler", "sample"]
