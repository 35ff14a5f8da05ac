"""Sampling: what is given, what is generated, along which times and by which rule."""

from .sampler import Given, sample
from .steppers import KINDS, Sampler

__all__ = ["KINDS", "Given", "Sampler", "sample"]
