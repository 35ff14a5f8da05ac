"""Sweep of block sizes on a GPU, and the measured bandwidth and matmul rate.

`bench/gpu/window.sh 1` runs the sweep on a GPU. Afterwards the fastest block sizes are written to `kernels/tiles.json`:

    python -m anystate.bench.gpu.sweep bench/results/gpu-MACHINE.jsonl
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ...kernels import tiles
from ..speed.kernel_inputs import SIZES, Inputs
from ..speed.results import Result, ResultLog, read_results
from .trials import Trial, trials

MAX_RELATIVE_TIME = 0.97  # of the default; tiles that are hardly faster are not kept
MATMULS = {  # (rows, inner width, outer width) in the blocks and the head of the official network
    "official": (
        (8192, 8192, 8192),
        (65536, 1024, 1536),
        (65536, 512, 1024),
        (65536, 1024, 4096),
        (65536, 4096, 1024),
        (30720, 1024, 2048),
        (30720, 2176, 1024),
        (30720, 2048, 1024),
    ),
    "tiny": ((64, 64, 64), (128, 24, 48)),
}
COPY_BYTES = {"official": 2**30, "tiny": 2**20}


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median time of a call, on a GPU with a cold L2 cache."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return do_bench(function, warmup=20, rep=60, return_mode="median")
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def limits(log: ResultLog, device: str, size: str) -> None:
    """Speed of the hardware: a large copy, and bfloat16 matmuls with those of the gradients of their weights."""
    source = torch.empty(COPY_BYTES[size], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    speed = 2 * source.numel() / milliseconds(lambda: target.copy_(source), device) / 1e6
    log.add("limit: copy, read and written", {"torch": speed}, "GB/s")
    inputs = Inputs(SIZES[size], device, torch.bfloat16)
    for m, k, n in MATMULS[size]:
        x, weight, grad = inputs.normal(m, k), inputs.normal(n, k), inputs.normal(m, n)
        for name, pair in ((f"{m}×{k}×{n}", (x, weight.t())), (f"{n}×{m}×{k}", (grad.t(), x))):
            rate = 2 * m * k * n / milliseconds(functools.partial(torch.mm, *pair), device) / 1e9
            log.add(f"limit: bfloat16 product {name}", {"torch": rate}, "TFLOP/s")


def sweep(log: ResultLog, device: str, size: str) -> None:
    """Time every trial. A choice that fails is reported and skipped.

    Raises:
        ValueError: at the end, if the defaults of a launcher failed.
    """
    broken = []
    for trial in trials(device, size):
        times: dict[tuple, float] = {}
        for choice in ({}, *trial.choices):
            measure(trial, choice, times, log, device)
        if () not in times:
            broken.append(trial.op)
        if trial.then and times:
            best = dict(min(times, key=times.get))
            for extra in trial.then:
                measure(trial, best | extra, times, log, device)
        key = tiles.key_of(trial.op, trial.width, trial.dtype)
        if key in (found := best_tiles(log.results)):
            log.write(f"best: {' '.join(map(str, key))}: {label(found[key])}")
    design_measurements(log, device, size)
    if broken:
        raise ValueError(f"sweep: the default failed for {', '.join(broken)}")


def measure(trial: Trial, choice: dict[str, int], times: dict[tuple, float], log: ResultLog, device: str) -> None:
    op, width, dtype = tiles.key_of(trial.op, trial.width, trial.dtype)
    about = {"op": op, "width": width, "dtype": dtype, "tile": choice, "kind": device.split(":")[0]}
    if trial.moved:
        about["moved_bytes"] = trial.moved
    with tiles.trial(trial.op, trial.width, trial.dtype, **choice):
        spent = add(log, f"{op} {width} {dtype}, {label(choice)}", "anystate", trial.launch, device, **about)
    if spent is not None:
        times[tuple(choice.items())] = spent


def add(log: ResultLog, name: str, by: str, function: Callable[[], object], device: str, **about) -> float | None:
    """Time a function and log the result; a failure, such as a tile that needs too much memory, is only reported."""
    try:
        spent = milliseconds(function, device)
    except Exception as error:  # of the compiler or driver
        log.write(f"failed: sweep {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    log.add(f"sweep {name}", {by: spent}, "ms", False, **about)
    return spent


def label(choice: dict[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in choice.items()) or "default"


def design_measurements(log: ResultLog, device: str, size: str) -> None:
    """Measurements for the design of the kernels: accumulation inside a matmul, casts."""
    i = Inputs(SIZES[size], device, torch.bfloat16)
    n, states, width = i.size.rows, i.size.states, i.size.width
    head = i.normal(states, width, dtype=torch.float32)
    add(log, "the head cast to bfloat16", "torch", lambda: head.to(i.dtype), device)
    if device.startswith("cuda"):  # CPU has no bfloat16 matmul with a float32 result
        grad, part = i.normal(n, min(2048, states)), i.normal(min(2048, states), width)
        total = torch.zeros(n, width, device=device)
        product = functools.partial(torch.mm, grad, part, out_dtype=torch.float32)
        inside = functools.partial(torch.addmm, total, grad, part, out_dtype=torch.float32)
        about = {}
        with contextlib.suppress(RuntimeError, TypeError):  # reported below
            about["apart"] = float((inside() - product()).abs().max())
        name = "hidden gradient of a slice of the head"
        add(log, f"{name}, mm then added", "torch", lambda: total.add_(product()), device)
        add(log, f"{name}, addmm", "torch", lambda: inside(out=total), device, **about)


def best_tiles(rows: Iterable[Result]) -> dict[tiles.Key, dict[str, int]]:
    """{(operation, width, dtype): tile} where a tile is faster than the defaults of the launcher."""
    groups: dict[tiles.Key, list[Result]] = {}
    for row in rows:
        if "tile" in row.about:
            groups.setdefault((row.about["op"], row.about["width"], row.about["dtype"]), []).append(row)
    found = {}
    for key, group in groups.items():
        default = [row.value for row in group if not row.about["tile"]]
        best = min(group, key=lambda row: row.value)
        if default and best.value <= MAX_RELATIVE_TIME * default[0]:
            found[key] = best.about["tile"]
    return found


def main(file: str) -> None:
    """Update `kernels/tiles.json` with the best tiles of a results file."""
    found = best_tiles(row for row in read_results(Path(file)) if row.about.get("kind") == "cuda")
    if not found:
        sys.exit(f"{file}: no tile is faster than the defaults in a sweep on a GPU")
    tiles.write(tiles.read() | found)
    for key, choice in found.items():
        print(f"{' '.join(map(str, key))}: {label(choice)}")
    print(f"wrote {tiles.FILE}")


if __name__ == "__main__":
    main(*sys.argv[1:])
