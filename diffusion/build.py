"""From sections of a config to their processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..configs.config import Loss, Schedule
from .processes import Gaussian, Masked
from .schedules import GAUSSIAN_SCHEDULES, GaussianSchedule, LogLinear


class GaussianSection(Protocol):
    """The settings of Gaussian diffusion."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def t_min(self) -> float: ...
    @property
    def time_conditioning(self) -> str: ...
    @property
    def prediction_type(self) -> str: ...


class MaskedSection(Protocol):
    """The settings of masked diffusion."""

    @property
    def delta(self) -> float: ...
    @property
    def t_min(self) -> float: ...
    @property
    def loss_on(self) -> str: ...
    @property
    def loss(self) -> Loss: ...


def gaussian(shape: Sequence[int], c: GaussianSection) -> Gaussian:
    """The Gaussian process of samples of a shape."""
    return Gaussian(shape, gaussian_schedule(c.schedule), c.t_min, c.time_conditioning, c.prediction_type)


def masked(length: int, states: int, c: MaskedSection, **options) -> Masked:
    """The masked process of `length` tokens; `options` are further arguments of `Masked`."""
    balanced = c.loss.weighting == "balanced"
    return Masked(length, states, LogLinear(c.delta), c.t_min, c.loss_on, balanced=balanced, **options)


def gaussian_schedule(c: Schedule) -> GaussianSchedule:
    """The schedule a config names, with its options.

    Raises:
        ValueError: an option that this schedule does not have.
    """
    try:
        return GAUSSIAN_SCHEDULES[c.name](**c.options)
    except TypeError:
        raise ValueError(f"schedule {c.name} does not take the options {c.options}") from None
