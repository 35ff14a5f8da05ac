"""Timing of functions in separate processes.

One process per implementation, because settings of a process (allocator, compiler) would otherwise affect both.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

Make = Callable[..., tuple[dict[str, Callable], torch.device]]  # returns {name: function} and the device


def timer(device: torch.device) -> Callable[[], float]:
    """A function that returns seconds, after all work on the device has ended.

    On the CPU with one thread it is the process time, which does not count other programs.
    """
    if device.type == "cuda":
        return functools.partial(_cuda_timer, device)
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _cuda_timer(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()


def quantile(values: list[float], share: float) -> float:
    """The `share`-quantile of the values, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


class Call(NamedTuple):
    """Seconds and result of a call; memory is the peak on the GPU in GB, None on the CPU."""

    seconds: float
    result: object
    memory: float | None


class Worker:
    """A process that builds what is measured, and calls its functions by name.

    Args:
        make: a function of a module, called with `args` in the process; returns {name: function} and the device.
    """

    def __init__(self, make: Make, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, name: str) -> Call:
        """Call a function in the process.

        Raises:
            ValueError: the function raised, with its message, or the process ended.
        """
        self.pipe.send(name)
        try:
            call = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise ValueError("a measuring process ended unexpectedly; its message is above") from None
        if isinstance(call, str):
            raise ValueError(call)
        return call

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


def _serve(pipe: Connection, make: Make, args: tuple) -> None:
    """Call functions by the names that arrive, until the pipe is closed."""
    try:
        functions, device = make(*args)
        now = timer(device)
        while True:
            pipe.send(_timed_call(functions[pipe.recv()], device, now))
    except EOFError:
        return
    except Exception as error:  # whatever a compiler or driver raises: the other workers go on
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _timed_call(function: Callable[[], object], device: torch.device, now: Callable[[], float]) -> Call:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = now()
    result = function()
    seconds = now() - start
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return Call(seconds, result, memory)


@contextlib.contextmanager
def workers(make: Make, args: dict[str, tuple], together: bool) -> Iterator[Iterator[dict[str, Worker]]]:
    """Start a worker {name: Worker} for every entry of `args`.

    Yields an iterator over groups to be measured together: one group of all, or, where each needs the machine alone,
    one group per worker, started after the one before has stopped.
    """
    groups = [list(args)] if together else [[name] for name in args]
    alive: list[Worker] = []
    try:
        yield _started(groups, make, args, alive)
    finally:
        _stop(alive)


def _started(
    groups: list[list[str]], make: Make, args: dict[str, tuple], alive: list[Worker]
) -> Iterator[dict[str, Worker]]:
    for names in groups:
        group = {}
        for name in names:
            group[name] = Worker(make, *args[name])
            alive.append(group[name])
        yield group
        _stop(alive)


def _stop(alive: list[Worker]) -> None:
    while alive:
        alive.pop().stop()


def interleave(group: dict[str, Worker], name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of a function in each worker.

    Workers alternate within a round, so that a disturbance of the machine affects all of them.
    """
    seconds: dict[str, list[float]] = {worker: [] for worker in group}
    for _ in range(rounds):
        for worker, call in group.items():
            seconds[worker].append(call(name).seconds)
    return seconds
