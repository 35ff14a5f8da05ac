"""`anystate bench train`: samples per second, step times, MFU and memory of ours and of the reference.

MFU is the rate of the model's FLOPs (three times those of a forward pass, without recomputation and padding) over the
measured matmul rate in the precision of training. Ours ("fast" in results) and the reference ("plain") get the same
batches, times and noise; where both are measured, their losses are compared before the second speed is printed. `fp8`
compares train.precision=fp8 with bf16 instead: speed, and the losses after the same steps, which must agree. MFU then
refers to the bf16 rate for both.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ...model import float8
from ...sample.pipeline import sample_flops
from ...train.trainer import Trainer
from ..reference import train as reference
from .kernels import Limits
from .results import ResultLog
from .systems import SyntheticTrainer, config_of
from .workers import interleave, quantile, workers

TOLERANCE = {"cpu": 2e-3, "cuda": 5e-2}  # relative, of the losses of a step; bf16 on a GPU
FP8_TOLERANCE = 0.02  # relative, of the mean losses over the second half of the steps
ORDER = ("fast", "plain")  # ours first: if time runs out, the reference is missing

MOST_PARTS = 64


def train(
    size: str,
    device: torch.device,
    log: ResultLog,
    compile: str = "always",
    steps: int = 30,
    batch: int | None = None,
    trace: Path | None = None,
    parts: Mapping[str, int] | None = None,
) -> None:
    """Measure one size of image-text training.

    Args:
        compile: of ours: always, never or auto.
        steps: timed steps of each implementation.
        trace: folder for the profiler's table and trace of ours.
        parts: see `measure`.
    """
    settings = checked_settings(size, compile, batch)
    measure(f"train {size}", text_image, (size, settings), device, log, steps, trace, parts)


def fp8(
    size: str,
    device: torch.device,
    log: ResultLog,
    compile: str = "always",
    steps: int = 30,
    batch: int | None = None,
) -> None:
    """Compare fp8 with bf16: speed and memory, and the losses after the same steps from the same seed.

    Raises:
        ValueError: this machine or size has no fp8, or losses differ by more than FP8_TOLERANCE; results are kept.
    """
    float8.check(device)
    # a short run learns nothing during the warm-up
    settings = [*checked_settings(size, compile, batch), "train.warmup_steps=0"]
    name = f"train {size}, fp8"
    ways = {p: (size, [*settings, f"train.precision={p}"]) for p in ("bf16", "fp8")}
    found: dict[str, Timed] = {}
    for group in timed({p: (text_image, device, "fast", args, None, 1) for p, args in ways.items()}, device, steps):
        report(name, group, device, log, steps)
        found |= group
    different = []
    for m, value in found["bf16"].losses.items():
        apart = abs(found["fp8"].losses[m] / value - 1.0)
        about = {"apart": apart, "tolerance": FP8_TOLERANCE, "agrees": apart <= FP8_TOLERANCE, "steps": steps}
        log.add(f"{name}: loss of {m} near step {steps}", {p: f.losses[m] for p, f in found.items()}, "", **about)
        different += [] if apart <= FP8_TOLERANCE else [f"that of {m} by {apart:.1%}"]
    if different:
        raise ValueError(f"{name}: losses differ from bf16's, {', '.join(different)}; allowed {FP8_TOLERANCE:.0%}")


def checked_settings(size: str, compile: str, batch: int | None) -> list[str]:
    """The user's settings of a size; raises their errors before any process starts."""
    settings = [f"compile={compile}"] + ([] if batch is None else [f"train.batch={batch}"])
    config_of(size, settings)
    return settings


def text_image(device: torch.device, settings: list[str], size: str) -> Trainer:
    """A trainer of a size on synthetic data."""
    return SyntheticTrainer(config_of(size, settings), device)


def measure(
    name: str,
    make: Callable[..., Trainer],
    args: tuple,
    device: torch.device,
    log: ResultLog,
    steps: int,
    trace: Path | None,
    parts: Mapping[str, int] | None = None,
) -> None:
    """Measure both implementations, or those in `parts`, with trainers from `make(device, settings, …)`.

    Args:
        parts: {implementation: gradient accumulation steps to begin with}; default 1 for both.

    Raises:
        ValueError: the losses of the first step differ from those of the other implementation, also of an earlier call.
    """
    parts = dict.fromkeys(ORDER, 1) if parts is None else parts
    folder = trace and trace / name.replace(" ", "-")
    each = {e: (make, device, e, args, folder if e == "fast" else None, n) for e, n in parts.items()}
    for found in timed(each, device, steps):
        for m in next(iter(found.values())).facts["losses"]:
            about = f"{name}: loss of {m} in the first step"
            log.add(about, {implementation: f.facts["losses"][m] for implementation, f in found.items()}, "")
            check_losses(about, log.find(about), TOLERANCE[device.type])
        report(name, found, device, log, steps)


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of every timed step, facts from `start`, mean losses of the last steps, peak GB (None on the CPU)."""

    seconds: list[float]
    facts: dict
    losses: dict[str, float]
    memory: float | None


def timed(each: dict[str, tuple], device: torch.device, steps: int) -> Iterator[dict[str, Timed]]:
    """Times of trainers made by `calls(*args)`.

    On the CPU their steps alternate and all are in one result. On a GPU each has the memory to itself, and its
    result is yielded at once.
    """
    with workers(calls, each, together=device.type == "cpu") as groups:
        for group in groups:
            facts = {way: worker("start").result for way, worker in group.items()}
            interleave(group, "step", 3)
            seconds, found = interleave(group, "step", steps), {}
            for way, worker in group.items():
                memory, losses = worker("step").memory, worker("losses").result
                found[way] = Timed(seconds[way], facts[way], losses, memory)
            yield found
            for worker in group.values():
                worker("profile")


@functools.cache
def matmul_rate(kind: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product on this machine; its memory is freed for the worker processes."""
    rate = Limits.measure(kind, dtype).flop_per_s
    torch.cuda.empty_cache()
    return rate


def report(name: str, found: dict[str, Timed], device: torch.device, log: ResultLog, steps: int) -> None:
    """Log speed and memory."""
    facts = {way: f.facts for way, f in found.items()}
    first = next(iter(facts.values()))
    batch, flops = first["batch"], first["flops"]
    about = {"batch": batch, "parts": {way: values["parts"] for way, values in facts.items()}, "steps": steps}
    median = {way: quantile(f.seconds, 0.5) for way, f in found.items()}
    log.add(f"{name}: samples per second", {w: batch / s for w, s in median.items()}, "1/s", **about)
    rate = matmul_rate(device.type, first["dtype"])
    of = {"flops": flops, "flop_per_s": rate, "dtype": str(first["dtype"]).removeprefix("torch.")}
    log.add(f"{name}: MFU", {w: flops / s / rate for w, s in median.items()}, "", **of)
    for share in (0.2, 0.5, 0.8):
        values = {w: 1000 * quantile(f.seconds, share) for w, f in found.items()}
        log.add(f"{name}: step, {share:.0%} of times below", values, "ms", False, **about)
    log.add(f"{name}: first step, compiler included", {w: v["first"] for w, v in facts.items()}, "s", False)
    if device.type == "cuda":
        log.add(f"{name}: peak memory", {w: f.memory for w, f in found.items()}, "GB", False, **about)


class TimedTrainer:
    """A trainer whose steps are measured: ours, or the reference on the same batches, times and noise."""

    def __init__(self, trainer: Trainer, implementation: str):
        self.trainer, self.implementation, state = trainer, implementation, trainer.state
        self.losses: list[dict[str, torch.Tensor]] = []
        if implementation == "plain":
            self.optimizer = reference.adamw(state.net, state.weighting, state.settings)

    def step(self) -> dict[str, torch.Tensor]:
        """One optimizer step; {modality: mean unweighted loss}."""
        self.losses.append(self.trainer.update() if self.implementation == "fast" else self._reference_step())
        self.trainer.state.step += 1
        return self.losses[-1]

    def mean_losses(self) -> dict[str, float]:
        """Means over the second half of the steps so far."""
        kept = self.losses[len(self.losses) // 2 :]
        return {m: float(torch.stack([torch.as_tensor(values[m]) for values in kept]).mean()) for m in kept[0]}

    def _reference_step(self) -> dict[str, float]:
        state = self.trainer.state
        return reference.training_step(
            state.net,
            state.ema,
            {m: state.weighting[m] for m in state.module.names},
            self.optimizer,
            state.space,
            state.times,
            state.data.batch(state.seed, state.step, state.rows, state.settings.batch),
            state.settings,
            state.seed,
            state.step,
            state.module.observed,
            torch.bfloat16 if state.bf16 else torch.float32,
        )


def calls(
    make: Callable[..., Trainer],
    device: torch.device,
    implementation: str,
    args: tuple,
    folder: Path | None,
    parts: int,
) -> tuple[dict[str, Callable], torch.device]:
    """The functions of a measuring process."""
    size, settings = args
    measured: list[TimedTrainer] = []

    def start() -> dict:
        """Make the trainer, with as few gradient accumulation steps as fit the memory, and take its first step."""
        made, facts = first_step(make, device, implementation, size, settings, parts)
        measured.append(made)
        return facts

    functions = {
        "start": start,
        "step": lambda: measured[0].step() and None,
        "losses": lambda: measured[0].mean_losses(),
        "profile": lambda: profile(measured[0].step, device, folder),
    }
    return functions, device


def first_step(
    make: Callable[..., Trainer], device: torch.device, implementation: str, size: str, settings: list[str], parts: int
) -> tuple[TimedTrainer, dict]:
    """A trainer after its first step, with at least `parts` gradient accumulation steps, and facts about it."""
    while parts <= MOST_PARTS:
        own = [*settings, *(["compile=never"] if implementation == "plain" else [])]
        trainer = make(device, [*own, f"train.gradient_accumulation_steps={parts}"], size)
        batch = trainer.config.train.batch
        facts = {"batch": batch, "parts": parts, "flops": 3.0 * sample_flops(trainer.pipeline) * batch}
        facts["dtype"] = torch.bfloat16 if trainer.in_bf16() else torch.float32
        made, began = TimedTrainer(trainer, implementation), time.perf_counter()
        try:
            losses = {m: float(value) for m, value in made.step().items()}
        except torch.OutOfMemoryError:
            losses = None  # nothing else here: the exception keeps the step's memory until this block ends
        if losses is not None:  # wall time: compilers are processes of their own
            return made, {"losses": losses, "first": time.perf_counter() - began, **facts}
        del trainer, made
        torch._dynamo.reset()  # code compiled for other batch sizes counts towards the limit of compilations
        gc.collect()
        torch.cuda.empty_cache()
        parts *= 2
    raise ValueError(f"a batch does not fit the memory, not even in {MOST_PARTS} parts")


def check_losses(name: str, losses: dict[str, float], tolerance: float) -> None:
    """Raise ValueError if the loss of ours differs from that of the reference, where both are measured."""
    if not set(ORDER) <= set(losses):
        return
    ours, plain = losses["fast"], losses["plain"]
    if abs(ours - plain) > tolerance * max(abs(plain), 1e-3):
        raise ValueError(f"{name} differs from the reference: {ours:.6g}, reference {plain:.6g}")


def profile(step: Callable[[], None], device: torch.device, folder: Path | None) -> None:
    """Write a table of operations and a trace for chrome://tracing or Perfetto into `folder`; None: neither."""
    if folder is None:
        return
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
