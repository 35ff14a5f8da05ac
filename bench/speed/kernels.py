"""`anystate bench kernels`: times of each operation, compared with its floor and with other implementations.

The floor in time is the least work of `kernel_floors` at the measured speed of this machine: bytes over the bandwidth
of a large copy, or FLOPs over the rate of a large matmul, whichever takes longer. The other implementations are the
reference in eager PyTorch, torch.compile of it, and the baselines of `kernel_cases`. On a GPU the L2 cache is cold.
"""

from __future__ import annotations

import dataclasses
import json as json_format
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

from ...kernels import reference
from ...model.provenance import provenance
from ...model.storage import atomic_write
from . import compile_only as compiled_kernels
from .kernel_cases import CASES, operation_of, outputs_of, with_gradients
from .kernel_floors import Work
from .kernel_inputs import SIZES, Arguments, Inputs
from .results import ResultLog
from .workers import timer

BUDGET_MS = 200.0  # measuring time per implementation
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
MATMUL_WIDTH = {"cuda": 8192, "cpu": 768}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of the table: times, throughput and share of the floor of one implementation of an operation."""

    op: str
    mode: str
    implementation: str
    size: str
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gb_per_s: float
    tflop_per_s: float
    floor_ms: float
    share_of_floor: float
    peak_mb: float | None

    def __str__(self) -> str:
        peak = "" if self.peak_mb is None else f"{self.peak_mb:9.1f}"
        return (
            f"{self.op:24} {self.mode:8} {self.implementation:10} {self.p50_ms:10.4f} {self.gb_per_s:9.1f} "
            f"{self.tflop_per_s:8.2f} {self.share_of_floor:7.1%} {peak}"
        )


HEADER = f"{'op':24} {'mode':8} {'by':10} {'median ms':>10} {'GB/s':>9} {'TFLOP/s':>8} {'floor':>7} {'peak MB':>9}"


# Measuring


def quantiles(function: Callable[[], object], device: str) -> tuple[float, float, float]:
    """20%, 50% and 80% quantiles of the time of a call in milliseconds, after a warm-up."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return tuple(do_bench(function, warmup=25, rep=int(BUDGET_MS), quantiles=[0.2, 0.5, 0.8]))
    function()
    now = timer(torch.device(device))
    times, end = [], time.perf_counter() + BUDGET_MS / 1000
    while len(times) < 5 or time.perf_counter() < end:
        start = now()
        function()
        times.append(1000 * (now() - start))
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def peak_megabytes(function: Callable[[], object], device: str) -> float | None:
    """Peak GPU memory of a call in MB, results included, without the memory in use before; None on CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@dataclasses.dataclass(frozen=True)
class Limits:
    """Measured speed of this machine: bytes/s of a copy (read and written) and FLOP/s of a matmul."""

    bytes_per_s: float
    flop_per_s: float

    @classmethod
    def measure(cls, device: str, dtype: torch.dtype) -> Limits:
        kind = device.split(":")[0]
        source = torch.empty(COPY_BYTES[kind], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = quantiles(lambda: target.copy_(source), device)[1]
        width = MATMUL_WIDTH[kind]
        a = torch.randn(width, width, device=device).to(dtype)
        product = quantiles(lambda: a @ a, device)[1]
        return cls(2 * source.numel() / copy * 1000, 2 * width**3 / product * 1000)

    def floor_ms(self, work: Work) -> float:
        return 1000 * max(work[0] / self.bytes_per_s, work[1] / self.flop_per_s)


def implementations(name: str, device: str, compile: bool = True) -> dict[str, Callable]:
    """{label: operation}. torch.compile is included on a GPU for operations with gradients; for the others compiling
    the random numbers takes too long."""
    eager = operation_of(name, reference)
    found = {"anystate": operation_of(name), "eager": eager}
    if device.startswith("cuda") and compile and CASES[name].gradients:
        torch.compiler.reset()
        found["compile"] = torch.compile(eager)
    return found | CASES[name].baselines()


def modes(name: str, operation: Callable, arguments: Arguments) -> Iterator[tuple[str, Callable[[], object]]]:
    """(mode, function) of one implementation: "forward", and "training" (forward and backward) with gradients."""
    case = CASES[name]

    def forward() -> object:
        with torch.no_grad():
            return case.call(operation, arguments)

    yield "forward", forward
    if not case.gradients:
        return
    differentiable, leaves = with_gradients(arguments, case.gradients)
    upstream = [torch.ones_like(output) for output in outputs_of(forward())]  # created once, outside the measured time

    def training() -> None:
        # not `backward`, which would copy a gradient that is the upstream gradient itself
        torch.autograd.grad(outputs_of(case.call(operation, differentiable)), leaves, upstream)

    yield "training", training


def work_of(name: str, arguments: Arguments) -> dict[str, Work]:
    """{mode: least work} of a case."""
    case = CASES[name]
    with torch.no_grad():
        out = case.call(operation_of(name), arguments)
    work = {"forward": case.work(arguments, out)}
    if case.work_backward:
        backward = case.work_backward(arguments, out)
        work["training"] = work["forward"][0] + backward[0], work["forward"][1] + backward[1]
    return work


def measure(
    name: str,
    size: str,
    device: str,
    dtype: torch.dtype,
    limits: Limits,
    failed: Callable[[str], None],
    compile: bool = True,
) -> Iterator[Measurement]:
    """Measure every implementation of one case in every mode; `failed` is called with a line for each failure."""
    arguments = CASES[name].inputs(Inputs(SIZES[size], device, dtype))
    work = work_of(name, arguments)
    for label, operation in implementations(name, device, compile).items():
        for mode, function in modes(name, operation, arguments):
            try:
                p20, p50, p80 = quantiles(function, device)
                peak = peak_megabytes(function, device)
            except Exception as error:  # of a compiler or driver; the other implementations are still measured
                failed(f"{name} {mode} by {label}: {_message(error)}")
                continue
            moved, computed = work[mode]
            floor = limits.floor_ms(work[mode])
            yield Measurement(
                op=name,
                mode=mode,
                implementation=label,
                size=size,
                dtype=str(dtype).removeprefix("torch."),
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                gb_per_s=moved / p50 / 1e6,
                tflop_per_s=computed / p50 / 1e9,
                floor_ms=floor,
                share_of_floor=floor / p50,
                peak_mb=peak,
            )


def _message(error: Exception) -> str:
    """One line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# Output


def plot_shares(rows: list[Measurement], title: str, file: Path) -> None:
    """Bar chart of floor / median time of each implementation; 1 is the limit of the hardware."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(f"{row.op} {row.mode}" for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.15 * len(labels) * len(names)), layout="constrained")
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        shares = {f"{row.op} {row.mode}": row.share_of_floor for row in rows if row.implementation == name}
        positions = [labels.index(label) + (k - len(names) / 2 + 0.5) * height for label in shares]
        axes.barh(positions, list(shares.values()), height, label=name)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("floor / measured time")
    axes.set_title(title)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def print_resources(ops: list[str] | None, write: Callable[[str], None]) -> int:
    """Write the table of registers, shared memory and spills; returns the number of kernels that spill."""
    heads = ("registers", "shared B", "spilled B", "warps", "CTAs/SM")
    write(f"{'op':22} {'kernel':24} {'target':7} " + " ".join(f"{head:>9}" for head in heads))
    spilling = 0
    for row in compiled_kernels.table(ops):
        spilling += row.spilled_bytes > 0
        numbers = " ".join(f"{number:9}" for number in row[3:])
        write(f"{row.op:22} {row.kernel:24} {row.target:7} {numbers}")
    return spilling


def run(
    ops: list[str] | None = None,
    size: str = "small",
    json: Path | str | None = None,
    plot: Path | str | None = None,
    compile_only: bool = False,
    device: str | None = None,
    write: Callable[[str], None] = print,
    log: ResultLog | None = None,
    compile: bool = True,
) -> int:
    """Measure and write a table; returns the exit code, 1 if an implementation failed or a kernel spills registers.

    Args:
        ops: cases of `kernel_cases.CASES`, or operations of `compile_only.CASES`; default all.
        size: tiny, small or official.
        json, plot: files for the measurements and the bar chart.
        compile_only: write the compiler's resource table instead; needs no GPU.
        log: a log that every measurement is added to.
        compile: on a GPU also measure torch.compile of the reference.
    """
    if compile_only:
        return int(print_resources(_check_names(ops, compiled_kernels.CASES), write) > 0)
    if size not in SIZES:
        raise ValueError(f"size: must be one of {', '.join(SIZES)}, got {size!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    limits = Limits.measure(device, dtype)
    about = {**provenance(device), **dataclasses.asdict(limits)}
    write(f"{about['device']}: copy {limits.bytes_per_s / 1e9:.1f} GB/s, matmul {limits.flop_per_s / 1e12:.2f} TFLOP/s")
    write(HEADER)
    measured, failures = [], []
    for name in _check_names(ops, CASES) or CASES:
        try:
            for row in measure(name, size, device, dtype, limits, failures.append, compile):
                measured.append(row)
                write(str(row))
                if log is not None:
                    _add(row, log)
        except Exception as error:  # the operation itself failed, so that its floor is unknown
            failures.append(f"{name}: {_message(error)}")
        if json:  # after every case, so that an interrupted run keeps its measurements
            content = {
                **about,
                "size": size,
                "failures": failures,
                "rows": [dataclasses.asdict(row) for row in measured],
            }
            atomic_write(Path(json), json_format.dumps(content, indent=1) + "\n")
    for line in failures:
        write(f"failed: {line}")
    if plot and measured:
        plot_shares(measured, f"{about['device']}, {size} size", Path(plot))
    return int(bool(failures))


def _add(row: Measurement, log: ResultLog) -> None:
    about = dataclasses.asdict(row)
    label = f"kernel {about.pop('op')} {about.pop('mode')}"
    log.add(label, {about.pop("implementation"): about.pop("p50_ms")}, "ms", False, **about)


def _check_names(ops: list[str] | None, allowed: Collection[str]) -> list[str] | None:
    unknown = [name for name in ops or [] if name not in allowed]
    if unknown:
        raise ValueError(f"op: unknown {', '.join(unknown)}; known are {', '.join(allowed)}")
    return ops
