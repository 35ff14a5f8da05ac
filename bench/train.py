"""`anystate bench train`: samples per second, step times, MFU and memory of both engines side by side.

MFU is the share of the measured matmul rate that the FLOPs of the model's products take (three times those of a
forward pass; recomputation and padding do not count). Both engines get the same batches, times and noise, and no number
is printed before their losses agreed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from ..train.engine import sample_flops
from ..train.loop import Trainer
from .kernels import Limits
from .rows import Rows, clock, in_turns, quantile, workers
from .systems import Bench, config_of

TOLERANCE = {"cpu": 2e-3, "cuda": 5e-2}  # relative, of the losses of a step; bf16 on a GPU

MOST_PARTS = 64


def train(
    size: str,
    device: torch.device,
    rows: Rows,
    compile: str = "always",
    steps: int = 30,
    batch: int | None = None,
    trace: Path | None = None,
) -> None:
    """Measure one size of image-text training.

    Args:
        compile: of the fast engine: always, never or auto.
        steps: timed steps of each engine.
        trace: folder for the profiler's table and trace of the fast engine.
    """
    settings = [f"compile={compile}"] + ([] if batch is None else [f"train.batch={batch}"])
    config_of(size, settings)  # errors of the user before any process
    measure(f"train {size}", text_image, (size, settings), device, rows, steps, trace)


def text_image(device: torch.device, engine: str, settings: list[str], size: str) -> Trainer:
    return Bench(config_of(size, [*settings, f"engine={engine}"]), device)


def measure(
    name: str,
    make: Callable[..., Trainer],
    args: tuple,
    device: torch.device,
    rows: Rows,
    steps: int,
    trace: Path | None,
) -> None:
    """Both engines of `make(device, engine, settings, …)`; on a GPU one after the other, each with the memory alone."""
    seconds, memory, facts = {}, {}, {}
    folder = trace and trace / name.replace(" ", "-")
    each = {engine: (make, device, engine, args, folder) for engine in ("plain", "fast")}
    with workers(calls, each, together=device.type == "cpu") as groups:
        for group in groups:
            facts |= {engine: worker("start").result for engine, worker in group.items()}
            in_turns(group, "step", 3)
            seconds |= in_turns(group, "step", steps)
            for engine, worker in group.items():
                memory[engine] = worker("step").memory
                if trace and engine == "fast":
                    worker("profile")
    check_losses(name, {engine: values["losses"] for engine, values in facts.items()}, TOLERANCE[device.type])
    batch, flops = facts["fast"]["batch"], facts["fast"]["flops"]
    about = {"batch": batch, "parts": {e: values["parts"] for e, values in facts.items()}, "steps": steps}
    median = {engine: quantile(times, 0.5) for engine, times in seconds.items()}
    rows.add(f"{name}: samples per second", {e: batch / s for e, s in median.items()}, "1/s", **about)
    for share in (0.2, 0.5, 0.8):
        values = {e: 1000 * quantile(times, share) for e, times in seconds.items()}
        rows.add(f"{name}: step, {share:.0%} of times below", values, "ms", False, **about)
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = Limits.measure(device.type, precision).flop_per_s
    rows.add(f"{name}: MFU", {e: flops / s / rate for e, s in median.items()}, "", flops=flops, flop_per_s=rate)
    rows.add(f"{name}: first step, compiler included", {e: v["first"] for e, v in facts.items()}, "s", False)
    if device.type == "cuda":
        rows.add(f"{name}: peak memory", memory, "GB", False, **about)


def calls(make: Callable[..., Trainer], device: torch.device, engine: str, args: tuple, folder: Path | None):
    """What a measuring process can do with a trainer."""
    size, settings = args
    state: dict = {}

    def start() -> dict:
        """Make the trainer, its batches in as few parts as fit the memory, and take its first step."""
        parts, now = 1, clock(device)
        while parts <= MOST_PARTS:
            trainer = make(device, engine, [*settings, f"train.accumulate={parts}"], size)
            flops, began = 3.0 * sample_flops(trainer.system) * trainer.config.train.batch, now()
            try:
                losses = {m: float(value) for m, value in trainer.update().items()}
            except torch.OutOfMemoryError:
                del trainer
                gc.collect()
                torch.cuda.empty_cache()
                parts *= 2
                continue
            state["trainer"] = trainer
            seconds, batch = now() - began, trainer.config.train.batch
            trainer.step += 1
            return {"losses": losses, "batch": batch, "parts": parts, "flops": flops, "first": seconds}
        raise ValueError(f"a batch does not fit the memory, not even in {MOST_PARTS} parts")

    def step() -> None:
        state["trainer"].update()
        state["trainer"].step += 1

    return {"start": start, "step": step, "profile": lambda: profile(step, device, folder)}, device


def check_losses(name: str, losses: dict[str, dict[str, float]], tolerance: float) -> None:
    """Raise ValueError unless both engines had the same losses in the same step."""
    for m, value in losses["plain"].items():
        if abs(losses["fast"][m] - value) > tolerance * max(abs(value), 1e-3):
            raise ValueError(f"{name}: the engines disagree, loss of {m} is {losses['fast'][m]:.6g}, plain {value:.6g}")


def profile(step: Callable[[], None], device: torch.device, folder: Path) -> None:
    """Where the time goes: a table of operations, and a trace for chrome://tracing or Perfetto."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(3):
            step()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=80)
    (folder / "profile.txt").write_text(table + "\n")
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
