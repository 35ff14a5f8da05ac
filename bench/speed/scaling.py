"""`anystate.bench.speed.scaling`: does cost grow as it should? Three plots.

Time a sample must be flat in the number of samples, memory flat in the number of steps, and the time of a τ-leap linear
in the vocabulary only where a jump falls, which is what jump-first sampling is for.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from ... import kernels
from ...sample import sample
from ...sample.pipeline import build_pipeline
from .kernel_cases import SIZES, Inputs, leap
from .kernels import quantiles
from .rows import Rows, clock, quantile
from .systems import config_of, shaken

SAMPLES = (16, 64, 256, 1024)
ROUNDS = 3
CHUNK = 256  # samples whose memory is measured
STATUS = Path("/proc/self/status")  # of Linux
STEPS = (5, 20, 80)
VOCABULARY = (1_000, 4_000, 16_000, 49_408)


def growth(size: str, device: torch.device, rows: Rows, out: Path) -> None:
    """Measure, and write growth.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    time, held = time_a_sample(size, device), {k: memory_of(size, device, k) for k in STEPS}
    jump = {rate: {k: leap_time(device, k, rate) for k in VOCABULARY} for rate in (0.02, 1.0)}
    for n, value in time.items():
        rows.add(f"growth {size}: time a sample, {n} samples", {"fast": value}, "ms", samples=n)
    for k, value in held.items():
        rows.add(f"growth {size}: peak memory of drawing {CHUNK} samples, {k} steps", {"fast": value}, "MB", steps=k)
    for rate, values in jump.items():
        for k, value in values.items():
            name = f"growth: τ-leap, {k} words, {rate:.0%} of positions jump"
            rows.add(name, {"fast": value}, "ms", states=k, rate=rate)
    plot(time, held, jump, out / "growth.png")


def drawing(size: str, device: torch.device, chunk: int = SAMPLES[0]):
    """A function (n, steps) that draws n joint samples in chunks."""
    config = config_of(size, [])
    system = shaken(build_pipeline(config, codecs=False))
    system.net.to(device).eval().requires_grad_(False)

    def draw(n: int, steps: int) -> None:
        sample(system.net, system.space, n=n, steps=steps, samplers=system.samplers, chunk=chunk)

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
    """Peak MB, beyond what lay there before, of a process that draws one large chunk; on a GPU that of the device."""
    command = [sys.executable, "-c", PEAK, size, str(device), str(steps)]
    env = os.environ | {"PYTHONPATH": _path(), "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: what is freed is given back
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise ValueError(f"growth: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(done.stdout.split()[-1])


PEAK = """
import sys, torch
from anystate.bench.speed.scaling import CHUNK, drawing, memory, peak
size, device, steps = sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3])
draw = drawing(size, device, CHUNK)
draw(CHUNK, 2)
before = memory(device)
draw(CHUNK, steps)
print(peak(device) - before)
"""


def memory(device: torch.device) -> float:
    """MB in use; the peak is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    if STATUS.is_file():  # getrusage would tell the peak of the process that started this one
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if STATUS.is_file():
        return int(re.search(r"VmHWM:\s*(\d+)", STATUS.read_text())[1]) / 1000
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


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
