"""From a config to its state spaces."""

from __future__ import annotations

from collections.abc import Sequence

from ..configs.config import Config, Image, Schedule, Text
from ..configs.table import TableConfig
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
        n = config.numerical
        processes["num"] = Gaussian((numerical,), gaussian_schedule(n.schedule), n.t_min, n.time_conditioning, n.predicts)
    if states:
        c = config.categorical
        schedule = LogLinear(c.delta)
        processes["cat"] = Masked(len(states), max(states), schedule, c.t_min, c.counted, c.mask_logit)
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
        schedule = gaussian_schedule(c.schedule)
        return Gaussian((c.channels, c.size, c.size), schedule, c.t_min, c.time_conditioning, c.predicts)
    schedule = LogLinear(c.delta)
    if c.process == "uniform":
        return Uniform(c.length, c.states, schedule, c.t_min)
    return Masked(c.length, c.states, schedule, c.t_min, c.counted, c.mask_logit, c.pad, c.attend_pads)
