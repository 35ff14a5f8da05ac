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
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ...model.storage import atomic_write
from ...train.provenance import origin

ORIGIN = ("device", "threads", "cores", "load", "versions", "commit", "date")  # keys of `train.origin`


@dataclasses.dataclass(frozen=True)
class Row:
    """name: what was measured; ratio_to_plain: how many times better than the plain engine, None without one; about:
    whatever else should be known; origin: see `train.origin`."""

    name: str
    engine: str
    value: float
    unit: str
    ratio_to_plain: float | None
    about: dict
    origin: dict

    def __str__(self) -> str:
        ratio = "" if self.ratio_to_plain is None else f"{self.ratio_to_plain:8.2f} × plain"
        return f"{self.name:44} {self.engine:6} {self.value:12.5g} {self.unit:12}{ratio}"

    def flat(self) -> dict:
        """The row as it is written."""
        values = dataclasses.asdict(self)
        about, where = values.pop("about"), values.pop("origin")
        return {**values, **about, **where}

    @classmethod
    def of(cls, values: dict) -> Row:
        """The row that was written so."""
        own = [field.name for field in dataclasses.fields(cls)][:5]
        where = {name: values[name] for name in ORIGIN if name in values}
        about = {name: values[name] for name in values if name not in ORIGIN and name not in own}
        return cls(*(values[name] for name in own), about, where)


class Rows:
    """Collects rows; prints each and writes all to a file.

    A file whose name ends in .jsonl holds a line per row, flushed at once; where a row is written again, the last line
    of its name and engine counts. Several processes may write there one after the other: rows of this device and
    commit that it already holds belong to these.
    """

    def __init__(
        self, device: torch.device | str, file: Path | str | None = None, write: Callable[[str], None] = print
    ):
        self.origin, self.file, self.write = origin(device), file and Path(file), write
        self.lines = self.file is not None and self.file.suffix == ".jsonl"
        same = ("device", "commit")
        earlier = read_lines(self.file) if self.lines else []
        self.rows = [row for row in earlier if all(row.origin.get(key) == self.origin[key] for key in same)]

    def add(self, name: str, values: dict[str, float], unit: str, more_is_better: bool = True, **about) -> None:
        """One row per engine; `about` is whatever else should be known of them.

        Engines may come one after the other under the same name: once the plain one is there, all get their ratio.
        """
        before = {row.engine: row for row in self.rows if row.name == name}
        now = {engine: Row(name, engine, value, unit, None, about, self.origin) for engine, value in values.items()}
        together = {**before, **now}
        plain = together.get("plain")
        for engine, row in together.items():
            if plain and plain.value and row.value and engine != "plain":
                ratio = row.value / plain.value if more_is_better else plain.value / row.value
                together[engine] = dataclasses.replace(row, ratio_to_plain=ratio)
        changed = [row for engine, row in together.items() if row != before.get(engine)]
        self.rows = [row for row in self.rows if row.name != name] + list(together.values())
        for row in changed:
            self.write(str(row))
        self._keep(changed)

    def find(self, name: str) -> dict[str, float]:
        """{engine: value} of what was measured under a name."""
        return {row.engine: row.value for row in self.rows if row.name == name}

    def _keep(self, changed: list[Row]) -> None:
        if self.lines:
            append_lines(self.file, changed)
        elif self.file:
            atomic_write(self.file, json.dumps([row.flat() for row in self.rows], indent=1) + "\n")


def append_lines(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    cut = file.is_file() and file.read_bytes()[-1:] not in (b"\n", b"")  # by a kill in mid-line
    with file.open("a", encoding="utf-8") as out:
        out.write("\n" * cut + "".join(json.dumps(row.flat()) + "\n" for row in rows))
        out.flush()
        os.fsync(out.fileno())


def read_lines(file: Path) -> list[Row]:
    """The rows of a file of lines, the last of every name and engine; a line that a kill cut short is left out."""
    found: dict[tuple[str, str], Row] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = Row.of(json.loads(line))
            found.pop((row.name, row.engine), None)
            found[row.name, row.engine] = row
    return list(found.values())


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
