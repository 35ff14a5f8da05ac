"""Rows of numbers: how they are timed, what lies beside each, how they are written.

Every `anystate bench` command takes `--json F` and writes a list of rows there, after each measurement, so that a run
that is cut short keeps what it measured. A row says what was measured, by which engine, the value with its unit, the
ratio to the plain engine, and where it comes from: device, versions, commit, date.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..train.files import write_whole
from ..train.origin import origin


@dataclasses.dataclass(frozen=True)
class Row:
    """name: what was measured; ratio_to_plain: how many times better than the plain engine, None without one."""

    name: str
    engine: str
    value: float
    unit: str
    ratio_to_plain: float | None
    about: dict

    def __str__(self) -> str:
        ratio = "" if self.ratio_to_plain is None else f"{self.ratio_to_plain:8.2f} × plain"
        return f"{self.name:44} {self.engine:6} {self.value:12.5g} {self.unit:12}{ratio}"


class Rows:
    """Collects rows; prints each and writes all to a file."""

    def __init__(
        self, device: torch.device | str, file: Path | str | None = None, write: Callable[[str], None] = print
    ):
        self.origin, self.file, self.write = origin(device), file and Path(file), write
        self.rows: list[Row] = []

    def add(self, name: str, values: dict[str, float], unit: str, more_is_better: bool = True, **about) -> None:
        """One row per engine; `about` is whatever else should be known of them."""
        plain = values.get("plain")
        for engine, value in values.items():
            ratio = None
            if plain and value and engine != "plain":
                ratio = value / plain if more_is_better else plain / value
            self.rows.append(Row(name, engine, value, unit, ratio, about))
            self.write(str(self.rows[-1]))
        if self.file:
            write_whole(self.file, json.dumps(self.plain_data(), indent=1) + "\n")

    def plain_data(self) -> list[dict]:
        """The rows as they are written."""
        rows = []
        for row in self.rows:
            values = dataclasses.asdict(row)
            about = values.pop("about")
            rows.append({**values, **about, **self.origin})
        return rows


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, after all work on the device; with one thread on the CPU its own, so other programs do not count."""
    if device.type == "cuda":

        def after_all() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return after_all
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


class Worker:
    """A process of its own that makes something and calls its functions when told.

    Engines are measured in processes of their own because settings of a process (allocator, compiler) belong to them.

    Args:
        make: a function of a module, called with `args` in the process; returns {name: function} and the device.
    """

    def __init__(self, make: Callable[..., tuple[dict[str, Callable], torch.device]], *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, name: str) -> Call:
        """Call a function in the process. Raises what it raised, as a ValueError."""
        self.pipe.send(name)
        try:
            call = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise ValueError("a measuring process ended before it answered; its message is above") from None
        if isinstance(call, str):
            raise ValueError(call)
        return call

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


class Call(NamedTuple):
    """What a call took and returned; memory is the peak on the GPU in GB, None on the CPU."""

    seconds: float
    result: object
    memory: float | None


def _serve(pipe, make: Callable[..., tuple[dict[str, Callable], torch.device]], args: tuple) -> None:
    try:
        functions, device = make(*args)
        now = clock(device)
        while True:
            name = pipe.recv()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = now()
            result = functions[name]()
            seconds = now() - start
            memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
            pipe.send(Call(seconds, result, memory))
    except EOFError:
        return
    except Exception as error:  # whatever a compiler or driver raises: the others still count
        pipe.send(" ".join(str(error).split()) or type(error).__name__)


@contextlib.contextmanager
def workers(make: Callable[..., tuple[dict[str, Callable], torch.device]], args: dict[str, tuple], together: bool):
    """{name: Worker} of every entry of `args`, all at once or, where they need the machine alone, one after the other.

    Yields an iterator over groups to be measured together.
    """
    groups = [list(args)] if together else [[name] for name in args]
    alive: list[Worker] = []

    def each():
        for group in groups:
            made = {name: Worker(make, *args[name]) for name in group}
            alive.extend(made.values())
            yield made
            while alive:
                alive.pop().stop()

    try:
        yield each()
    finally:
        while alive:
            alive.pop().stop()


def in_turns(group: dict[str, Worker], name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` calls by each worker, taken in turns, so that what slows the machine slows all alike."""
    seconds = {worker: [] for worker in group}
    for _ in range(rounds):
        for worker, call in group.items():
            seconds[worker].append(call(name).seconds)
    return seconds


def quantile(values: list[float], share: float) -> float:
    """The value below which that share lies, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()
