"""`anystate bench growth`: does cost grow as it should? Three plots.

Time a sample must be flat in the number of samples, memory flat in the number of steps, and the time of a τ-leap linear
in the vocabulary only where a jump falls, which is what jump-first sampling is for.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

from .. import kernels
from ..sample import sample
from ..train.build import build
from .kernel_cases import SIZES, Inputs, leap
from .kernels import quantiles
from .rows import Rows, clock, quantile
from .systems import config_of, shaken

SAMPLES = (16, 64, 256, 1024)
ROUNDS = 3
STEPS = (5, 20, 80)
VOCABULARY = (1_000, 4_000, 16_000, 49_408)


def growth(size: str, device: torch.device, rows: Rows, out: Path) -> None:
    """Measure, and write growth.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    time, memory = time_a_sample(size, device), {k: memory_of(size, device, k) for k in STEPS}
    jump = {rate: {k: leap_time(device, k, rate) for k in VOCABULARY} for rate in (0.02, 1.0)}
    for n, value in time.items():
        rows.add(f"growth {size}: time a sample, {n} samples", {"fast": value}, "ms", samples=n)
    for k, value in memory.items():
        rows.add(f"growth {size}: peak memory, {k} steps", {"fast": value}, "MB", steps=k)
    for rate, values in jump.items():
        for k, value in values.items():
            name = f"growth: τ-leap, {k} words, {rate:.0%} of positions jump"
            rows.add(name, {"fast": value}, "ms", states=k, rate=rate)
    plot(time, memory, jump, out / "growth.png")


def drawing(size: str, device: torch.device):
    """A function (n, steps) that draws n joint samples in chunks of the smallest number."""
    config = config_of(size, [])
    system = shaken(build(config, codecs=False))
    system.net.to(device).eval().requires_grad_(False)

    def draw(n: int, steps: int) -> None:
        sample(system.net, system.space, n=n, steps=steps, samplers=system.samplers, chunk=SAMPLES[0])

    return draw


def time_a_sample(size: str, device: torch.device) -> dict[int, float]:
    """{samples drawn in one call: milliseconds of each}, medians of rounds in which every number takes its turn."""
    draw, now = drawing(size, device), clock(device)
    draw(SAMPLES[0], 5)
    times: dict[int, list[float]] = {n: [] for n in SAMPLES}
    for _ in range(ROUNDS):
        for n in SAMPLES:
            calls = SAMPLES[-1] // n
            start = now()
            for _ in range(calls):
                draw(n, 5)
            times[n].append(1000 * (now() - start) / (calls * n))
    return {n: quantile(values, 0.5) for n, values in times.items()}


def memory_of(size: str, device: torch.device, steps: int) -> float:
    """Peak MB of a process that draws one chunk; on a GPU that of the device."""
    command = [sys.executable, "-c", PEAK, size, str(device), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": _path()})
    if done.returncode:
        raise ValueError(f"growth: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(done.stdout.split()[-1])


PEAK = """
import resource, sys, torch
from anystate.bench.growth import SAMPLES, drawing
size, device, steps = sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3])
drawing(size, device)(SAMPLES[0], steps)
if device.type == "cuda":
    print(torch.cuda.max_memory_allocated(device) / 1e6)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def _path() -> str:
    """Where this package was imported from, for a process of its own."""
    return os.pathsep.join(p for p in sys.path if p)


def leap_time(device: torch.device, states: int, rate: float) -> float:
    """Milliseconds of one τ-leap on logits of so many words when that share of the masked positions jumps."""
    shape = dataclasses.replace(SIZES["small"], states=states, length=64)
    arguments = leap(Inputs(shape, str(device), torch.float32))
    arguments["rate"] = torch.full_like(arguments["rate"], rate)
    arguments["rule"] = "ancestral"
    return quantiles(lambda: kernels.tau_leap(**arguments), str(device))[1]


def plot(time: dict, memory: dict, jump: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    axes[0].plot(*zip(*time.items(), strict=True), marker="o")
    axes[0].set(title="flat: time a sample", xlabel="samples", ylabel="ms", xscale="log", ylim=(0, None))
    axes[1].plot(*zip(*memory.items(), strict=True), marker="o")
    axes[1].set(title="flat: peak memory", xlabel="steps", ylabel="MB", xscale="log", ylim=(0, None))
    for rate, values in jump.items():
        axes[2].plot(*zip(*values.items(), strict=True), marker="o", label=f"{rate:.0%} of masked positions jump")
    axes[2].set(title="τ-leap: linear only where a jump falls", xlabel="vocabulary", ylabel="ms", xscale="log")
    axes[2].set(yscale="log", ylim=(0.5 * min(jump[min(jump)].values()), 8 * max(jump[max(jump)].values())))
    axes[2].yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes[2].legend(frameon=False, loc="upper left")
    for ax, values in ((axes[0], time), (axes[1], memory), (axes[2], jump[min(jump)])):
        ax.set_xticks(list(values), [f"{value:,}" for value in values])
        ax.minorticks_off()
    for ax, values in ((axes[0], time), (axes[1], memory)):
        ax.set_ylim(0, 1.2 * max(values.values()))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
