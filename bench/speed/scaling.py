"""`anystate bench scaling`: how cost scales with samples, steps and vocabulary, in three plots.

Expected: time per sample does not depend on the number of samples, memory does not depend on the number of steps, and
the time of a τ-leap is linear in the vocabulary only for positions that jump.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ... import kernels
from ...sample import sample
from .kernel_inputs import SIZES, Inputs, leap
from .kernels import quantiles
from .results import ResultLog
from .systems import untrained
from .workers import quantile, timer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES = (16, 64, 256, 1024)
ROUNDS = 3
MEMORY_BATCH = 256  # samples whose memory is measured
STATUS = Path("/proc/self/status")  # Linux only
STEPS = (5, 20, 80)
VOCABULARY = (1_000, 4_000, 16_000, 49_408)
JUMP_RATES = (0.02, 1.0)  # shares of the masked positions that jump


def measure_scaling(size: str, device: torch.device, log: ResultLog, out: Path) -> None:
    """Measure, and write scaling.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    times = time_per_sample(size, device)
    memory = {steps: peak_memory(size, device, steps) for steps in STEPS}
    leaps = {rate: {states: leap_time(device, states, rate) for states in VOCABULARY} for rate in JUMP_RATES}
    for n, value in times.items():
        log.add(f"scaling {size}: time per sample, {n} samples", {"fast": value}, "ms", samples=n)
    for steps, value in memory.items():
        name = f"scaling {size}: peak memory of {MEMORY_BATCH} samples, {steps} steps"
        log.add(name, {"fast": value}, "MB", steps=steps)
    for rate, values in leaps.items():
        for states, value in values.items():
            name = f"scaling: τ-leap, vocabulary {states}, {rate:.0%} of positions jump"
            log.add(name, {"fast": value}, "ms", states=states, rate=rate)
    plot(times, memory, leaps, out / "scaling.png")


class JointSampler:
    """Joint samples of an untrained network, in batches of `batch_size`."""

    def __init__(self, size: str, device: torch.device, batch_size: int = SAMPLES[0]):
        self.pipeline = untrained(size, []).to(device)
        self.batch_size = batch_size

    def __call__(self, n: int, steps: int) -> None:
        pipeline = self.pipeline
        sample(
            pipeline.net,
            pipeline.space,
            n=n,
            steps=steps,
            samplers=pipeline.samplers,
            batch_size=self.batch_size,
        )


def time_per_sample(size: str, device: torch.device) -> dict[int, float]:
    """{samples drawn in one call: milliseconds per sample}, medians of rounds in which the numbers alternate."""
    draw, now = JointSampler(size, device), timer(device)
    draw(SAMPLES[0], 5)
    times: dict[int, list[float]] = {n: [] for n in SAMPLES}
    for _ in range(ROUNDS):
        for n in SAMPLES:
            times[n].append(1000 * _seconds_per_sample(draw, now, n))
    return {n: quantile(values, 0.5) for n, values in times.items()}


def _seconds_per_sample(draw: JointSampler, now: Callable[[], float], n: int) -> float:
    """Over as many calls as the largest number of samples takes."""
    calls = SAMPLES[-1] // n
    start = now()
    for _ in range(calls):
        draw(n, 5)
    return (now() - start) / (calls * n)


def peak_memory(size: str, device: torch.device, steps: int) -> float:
    """Peak MB of sampling one large batch, in a process of its own, without the memory in use before."""
    command = [sys.executable, "-m", f"{__name__}", size, str(device), str(steps)]
    path = os.pathsep.join(p for p in sys.path if p)  # where this package was imported from
    env = os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns freed memory at once
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise ValueError(f"bench scaling: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(done.stdout.split()[-1])


def main(size: str, device_name: str, steps: str) -> None:
    """Print the peak memory; the process of `peak_memory` runs this."""
    device = torch.device(device_name)
    draw = JointSampler(size, device, MEMORY_BATCH)
    draw(MEMORY_BATCH, 2)
    before = reset_peak(device)
    draw(MEMORY_BATCH, int(steps))
    print(peak(device) - before)


def reset_peak(device: torch.device) -> float:
    """Start a new measurement of the peak; returns the MB in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    if STATUS.is_file():  # the peak of getrusage includes the parent process
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> float:
    """Peak MB since the last `reset_peak`, of the process or, on a GPU, of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if STATUS.is_file():
        return int(re.search(r"VmHWM:\s*(\d+)", STATUS.read_text())[1]) / 1000
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def leap_time(device: torch.device, states: int, rate: float) -> float:
    """Milliseconds of one τ-leap on logits of that many states when the share `rate` of the masked positions jumps."""
    shape = dataclasses.replace(SIZES["small"], states=states, length=64)
    arguments = leap(Inputs(shape, str(device), torch.float32))
    arguments["rate"] = torch.full_like(arguments["rate"], rate)
    arguments["rule"] = "ancestral"
    return quantiles(lambda: kernels.tau_leap(**arguments), str(device))[1]


def plot(times: dict[int, float], memory: dict[int, float], leaps: dict[float, dict[int, float]], file: Path) -> None:
    """Three panels: time per sample, peak memory, and time of a τ-leap by jump rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    _plot_constant(left, times, "time per sample (expected: constant)", "samples", "ms")
    _plot_constant(middle, memory, "peak memory (expected: constant)", "steps", "MB")
    _plot_leaps(right, leaps)
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _plot_constant(ax: Axes, values: dict[int, float], title: str, xlabel: str, ylabel: str) -> None:
    ax.plot(*zip(*values.items(), strict=True), marker="o")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log", ylim=(0, 1.2 * max(values.values())))
    _set_ticks(ax, values)


def _plot_leaps(ax: Axes, leaps: dict[float, dict[int, float]]) -> None:
    from matplotlib.ticker import FuncFormatter

    for rate, values in leaps.items():
        ax.plot(*zip(*values.items(), strict=True), marker="o", label=f"{rate:.0%} of masked positions jump")
    lowest, highest = leaps[min(leaps)], leaps[max(leaps)]
    ax.set(title="τ-leap", xlabel="vocabulary", ylabel="ms", xscale="log", yscale="log")
    ax.set_ylim(0.5 * min(lowest.values()), 8 * max(highest.values()))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.legend(frameon=False, loc="upper left")
    _set_ticks(ax, lowest)


def _set_ticks(ax: Axes, values: dict[int, float]) -> None:
    ax.set_xticks(list(values), [f"{value:,}" for value in values])
    ax.minorticks_off()


if __name__ == "__main__":
    main(*sys.argv[1:])
