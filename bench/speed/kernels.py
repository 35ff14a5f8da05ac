"""`anystate bench kernels`: each operation against its floor, PyTorch eager, torch.compile and well-kept peers.

The floor is the least work of `kernel_cases` at the speeds measured here first: bytes over the bandwidth of a large
copy, or FLOPs over the rate of a large matmul, whichever takes longer. Times on a GPU are taken with a cold L2 cache.
"""

from __future__ import annotations

import dataclasses
import json as json_format
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ...kernels import reference
from ...model.storage import atomic_write
from ...train.provenance import origin
from . import compile_only as compiled_kernels
from .kernel_cases import CASES, SIZES, Inputs, operation_of, outputs_of, with_gradients
from .rows import Rows, clock

BUDGET_MS = 200.0  # of measuring per implementation
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
MATMUL_WIDTH = {"cuda": 8192, "cpu": 768}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row: an implementation of an operation, its times, how much it moved, how near the floor it came."""

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
    """20, 50 and 80% of the time in milliseconds, after a warm-up."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return tuple(do_bench(function, warmup=25, rep=int(BUDGET_MS), quantiles=[0.2, 0.5, 0.8]))
    function()
    now = clock(torch.device(device))
    times, end = [], time.perf_counter() + BUDGET_MS / 1000
    while len(times) < 5 or time.perf_counter() < end:
        start = now()
        function()
        times.append(1000 * (now() - start))
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def peak_megabytes(function: Callable[[], object], device: str) -> float | None:
    """The most memory beyond what was there before, results included; None where there is no GPU to ask."""
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
    """What this machine reaches: bytes/s of a copy (read and written) and FLOP/s of a matmul in `dtype`."""

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

    def floor_ms(self, work: tuple[int, int]) -> float:
        return 1000 * max(work[0] / self.bytes_per_s, work[1] / self.flop_per_s)


def implementations(name: str, device: str, compile: bool = True) -> dict[str, Callable]:
    """{label: operation}; compiled ones only on a GPU, where they compete, and of operations with gradients: compiling
    the others' random numbers takes longer than a measurement is worth."""
    ours, eager = operation_of(name), operation_of(name, reference)
    found = {"anystate": ours, "eager": eager}
    if device.startswith("cuda") and compile and CASES[name].gradients:
        torch.compiler.reset()
        found["compile"] = torch.compile(eager)
    return found | CASES[name].peers()


def runs(name: str, operation: Callable, arguments: dict) -> Iterator[tuple[str, Callable[[], object]]]:
    """(mode, function) of one implementation: forward, and forward with backward where it trains."""
    case = CASES[name]

    def forward():
        with torch.no_grad():
            return case.call(operation, arguments)

    yield "forward", forward
    if not case.gradients:
        return
    leafy, leaves = with_gradients(arguments, case.gradients)
    upstream = [torch.ones_like(output) for output in outputs_of(forward())]  # not part of the operation's time

    def training():
        # not `backward`, which copies a gradient that is the upstream one itself
        torch.autograd.grad(outputs_of(case.call(operation, leafy)), leaves, upstream)

    yield "training", training


def measure(
    name: str,
    size: str,
    device: str,
    dtype: torch.dtype,
    limits: Limits,
    failed: Callable[[str], None],
    compile: bool = True,
) -> Iterator[Measurement]:
    """Every implementation of one case in every mode; `failed` gets a line for each that does not run."""
    case = CASES[name]
    arguments = case.inputs(Inputs(SIZES[size], device, dtype))
    with torch.no_grad():
        out = case.call(operation_of(name), arguments)
    work = {"forward": case.work(arguments, out)}
    if case.work_backward:
        work["training"] = tuple(map(sum, zip(work["forward"], case.work_backward(arguments, out), strict=True)))
    for label, operation in implementations(name, device, compile).items():
        for mode, function in runs(name, operation, arguments):
            try:
                p20, p50, p80 = quantiles(function, device)
                peak = peak_megabytes(function, device)
            except Exception as error:  # whatever a compiler or driver raises: the others still count
                failed(f"{name} {mode} by {label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                continue
            moved, computed = work[mode]
            floor = limits.floor_ms(work[mode])
            yield Measurement(
                name,
                mode,
                label,
                size,
                str(dtype).removeprefix("torch."),
                p20,
                p50,
                p80,
                moved / p50 / 1e6,
                computed / p50 / 1e9,
                floor,
                floor / p50,
                peak,
            )


# Output


def plot_shares(rows: list[Measurement], title: str, file: Path) -> None:
    """Bars: the floor's share of each implementation's median time; 1 is the hardware's limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(f"{row.op} {row.mode}" for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.15 * len(labels) * len(names)), layout="constrained")
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        mine = {f"{row.op} {row.mode}": row.share_of_floor for row in rows if row.implementation == name}
        places = [labels.index(label) + (k - len(names) / 2 + 0.5) * height for label in mine]
        axes.barh(places, list(mine.values()), height, label=name)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("least possible time / measured time")
    axes.set_title(title)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def print_resources(ops: list[str] | None, write: Callable[[str], None]) -> int:
    """The table of registers, shared memory and spills; the number of kernels that spill."""
    write(f"{'op':22} {'kernel':24} {'target':7} {'registers':>9} {'shared B':>9} {'spilled B':>9}")
    spilling = 0
    for row in compiled_kernels.table(ops):
        spilling += row.spilled_bytes > 0
        numbers = f"{row.registers:9} {row.shared_bytes:9} {row.spilled_bytes:9}"
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
    rows: Rows | None = None,
    compile: bool = True,
) -> int:
    """Measures and writes a table; returns an exit code, 1 if something did not run or spills registers.

    Args:
        ops: cases of `kernel_cases.CASES`, or operations of `compile_only.cases()`; all by default.
        size: tiny, small or official.
        json, plot: files to write the rows and the bars to.
        compile_only: print the compiler's resource table instead; needs no GPU.
        rows: keeps every measurement as well.
        compile: on a GPU also what torch.compile makes of the reference.
    """
    if compile_only:
        return int(print_resources(_known(ops, compiled_kernels.cases()), write) > 0)
    if size not in SIZES:
        raise ValueError(f"size: must be one of {', '.join(SIZES)}, got {size!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    limits = Limits.measure(device, dtype)
    where = {**origin(device), **dataclasses.asdict(limits)}
    write(f"{where['device']}: copy {limits.bytes_per_s / 1e9:.1f} GB/s, matmul {limits.flop_per_s / 1e12:.2f} TFLOP/s")
    write(HEADER)
    measured, failures = [], []
    for name in _known(ops, CASES) or CASES:
        try:
            for row in measure(name, size, device, dtype, limits, failures.append, compile):
                measured.append(row)
                write(str(row))
                if rows is not None:
                    about = dataclasses.asdict(row)
                    label = f"kernel {about.pop('op')} {about.pop('mode')}"
                    rows.add(label, {about.pop("implementation"): about.pop("p50_ms")}, "ms", False, **about)
        except Exception as error:  # ours did not run, so nothing of this case can be measured
            failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if json:  # after every case, so that a run that is cut short keeps what it measured
            plain = [dataclasses.asdict(row) for row in measured]
            content = where | {"size": size, "failures": failures, "rows": plain}
            atomic_write(Path(json), json_format.dumps(content, indent=1) + "\n")
    for line in failures:
        write(f"failed: {line}")
    if plot and measured:
        plot_shares(measured, f"{where['device']}, {size} size", Path(plot))
    return int(bool(failures))


def _known(ops: list[str] | None, known) -> list[str] | None:
    unknown = [name for name in ops or [] if name not in known]
    if unknown:
        raise ValueError(f"op: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return ops
