"""From a config to its state spaces."""

from __future__ import annotations

from collections.abc import Sequence

from ..configs.config import Config, Image, Schedule, Text
from ..configs.table import CategoricalConfig, NumericalConfig, TableConfig
from .processes import Gaussian, Masked, Process, Uniform
from .schedules import GAUSSIAN_SCHEDULES, GaussianSchedule, LogLinear
from .space import Space


def build_space(config: Config) -> Space:
    """The product of the processes of a config's modalities."""
    return Space({name: _process(c) for name, c in config.modalities.items()})


def build_table_space(config: TableConfig, numerical: int, states: Sequence[int]) -> Space:
    """The space of a table: `num`, its numerical columns, and `cat`, its categorical ones, whichever it has.

    Args:
        numerical: number of numerical columns.
        states: number of states of each categorical column; the group's process has the largest of them.
    """
    processes: dict[str, Process] = {}
    if numerical:
        processes["num"] = _gaussian((numerical,), config.numerical)
    if states:
        processes["cat"] = _masked(len(states), max(states), config.categorical)
    return Space(processes)


def gaussian_schedule(c: Schedule) -> GaussianSchedule:
    """The schedule a config names, with its options.

    Raises:
        ValueError: an option that this schedule does not have.
    """
    try:
        return GAUSSIAN_SCHEDULES[c.name](**c.options)
    except TypeError:
        raise ValueError(f"schedule {c.name} does not take the options {c.options}") from None


def _process(c: Image | Text) -> Process:
    if isinstance(c, Image):
        return _gaussian((c.channels, c.size, c.size), c)
    if c.process == "uniform":
        return Uniform(c.length, c.states, LogLinear(c.delta), c.t_min)
    return _masked(c.length, c.states, c, pad_id=c.pad, attend_pads=c.attend_pads)


def _gaussian(shape: tuple[int, ...], c: Image | NumericalConfig) -> Gaussian:
    return Gaussian(shape, gaussian_schedule(c.schedule), c.t_min, c.time_conditioning, c.prediction_type)


def _masked(length: int, states: int, c: Text | CategoricalConfig, **pads) -> Masked:
    balanced = c.loss.weighting == "balanced"
    schedule = LogLinear(c.delta)
    return Masked(length, states, schedule, c.t_min, c.loss_on, c.mask_logit, balanced=balanced, **pads)
