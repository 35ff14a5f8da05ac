"""Which block sizes are the fastest on this machine's GPU, and how fast it copies and multiplies.

The window on a GPU (`bench/gpu/window.sh 1`) times them; at home the best are kept in `kernels/tiles.json`:

    python -m anystate.bench.gpu.sweep bench/results/gpu-MACHINE.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ...kernels import adaln, qk_norm, tiles
from ..speed.kernel_cases import SIZES, Inputs, cross_entropy, gate, leap, leap_linear, nbytes, pack
from ..speed.kernel_cases import adaln as adaln_inputs
from ..speed.rows import Row, Rows, read_lines

# their packages' attributes are the operations of the same name
tau_leap, tau_leap_linear, linear_cross_entropy = (
    importlib.import_module(f"...kernels.{name}", __package__)
    for name in ("tau_leap", "tau_leap_linear", "linear_cross_entropy")
)

WORTH = 0.97  # of the default's time: what is hardly faster is not kept
PROGRAMS = tuple({"programs": n} for n in (512, 1024))  # of a backward kernel; the default is 2048
ROW_TILES = tuple({"ROWS": r, "num_warps": w} for r, w in ((1, 1), (1, 2), (1, 4), (2, 4), (4, 4), (4, 8)))
HEAD_TILES = tuple(
    {"BLOCK_R": r, "BLOCK_V": v, "BLOCK_D": d, "num_warps": w, "num_stages": s, "programs": p}
    for r, v, d, w, s, p in (
        (64, 64, 64, 4, 3, 4),
        (64, 64, 64, 4, 4, 4),
        (64, 64, 64, 4, 4, 1),
        (128, 64, 64, 8, 3, 2),
    )
)
RULE = {"rule": "tau", "mask_logit": False, "uncond": None, "guidance": None}
SLICES = (2048, 3072, 4096)  # states of the head at a time
PRODUCTS = {  # rows, inner and outer width of products in the blocks and the head of the official network
    "official": (
        *((8192, 8192, 8192), (65536, 1024, 1536), (65536, 512, 1024), (65536, 1024, 4096), (65536, 4096, 1024)),
        *((30720, 1024, 2048), (30720, 2176, 1024), (30720, 2048, 1024)),
    ),
    "tiny": ((64, 64, 64), (128, 24, 48)),
}
COPIED = {"official": 2**30, "tiny": 2**20}  # bytes


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median time of a call, on a GPU with a cold L2 cache."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return do_bench(function, warmup=20, rep=60, return_mode="median")
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def limits(rows: Rows, device: str, size: str) -> None:
    """What the hardware reaches: a large copy, and bfloat16 products with the gradients of their weights."""
    source = torch.empty(COPIED[size], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    speed = 2 * source.numel() / milliseconds(lambda: target.copy_(source), device) / 1e6
    rows.add("limit: copy, read and written", {"torch": speed}, "GB/s")
    inputs = Inputs(SIZES[size], device, torch.bfloat16)
    for m, k, n in PRODUCTS[size]:
        x, weight, grad = inputs.normal(m, k), inputs.normal(n, k), inputs.normal(m, n)
        for name, pair in ((f"{m}×{k}×{n}", (x, weight.t())), (f"{n}×{m}×{k}", (grad.t(), x))):
            rate = 2 * m * k * n / milliseconds(functools.partial(torch.mm, *pair), device) / 1e9
            rows.add(f"limit: bfloat16 product {name}", {"torch": rate}, "TFLOP/s")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One operation as its launcher runs it, and what to lay over the launcher's own choice.

    choices: each is timed; then: each is timed on top of the best of them. moved: the fewest bytes, 0 if not counted.
    """

    op: str
    width: int
    dtype: torch.dtype
    launch: Callable[[], object]
    choices: tuple[dict[str, int], ...]
    then: tuple[dict[str, int], ...] = ()
    moved: int = 0


def trials(device: str, size: str) -> Iterator[Trial]:
    """In order of importance."""
    inputs = Inputs(SIZES[size], device, torch.bfloat16)
    yield from row_trials(inputs, torch.float32)
    yield from head_trials(inputs)
    yield from pack_trials(inputs)
    yield from row_trials(inputs, torch.bfloat16)


def row_trials(i: Inputs, stream: torch.dtype) -> Iterator[Trial]:
    """adaLN and gated residual; the stream is float32 in training, modulation and branch bfloat16."""
    width, a, g = i.size.width, adaln_inputs(i, stream), gate(i, stream)
    x, branch = a["x"], g["branch"]
    yield Trial(
        *("adaln_modulate", width, stream),
        lambda: adaln.launch_adaln(x, a["scale"], a["shift"], 1e-5, False),
        ROW_TILES,
        moved=2 * nbytes(x),
    )
    yield Trial(
        *("adaln_modulate_backward", width, stream),
        lambda: adaln.launch_adaln_backward(x, x, a["scale"], 1e-5, False),
        ROW_TILES,
        PROGRAMS,
        moved=3 * nbytes(x),
    )
    yield Trial(
        *("gated_residual", width, stream),
        lambda: adaln.launch_gate(x, branch, g["gate"]),
        ROW_TILES,
        moved=2 * nbytes(x) + nbytes(branch),
    )
    yield Trial(
        *("gated_residual_backward", width, stream),
        lambda: adaln.launch_gate_backward(x, branch, g["gate"]),
        ROW_TILES,
        PROGRAMS,
        moved=nbytes(x) + 2 * nbytes(branch),
    )


def head_trials(i: Inputs) -> Iterator[Trial]:
    """Cross-entropy, forward and backward, by slices of the head; τ-leaping by tiles of it."""
    size, head, leaps = i.size, cross_entropy(i), leap_linear(i)
    upstream = torch.rand(size.rows, generator=i.generator, device=i.device)

    def both_ways() -> None:
        _, lse = linear_cross_entropy.launch_forward(**head, z_loss=0.0)
        linear_cross_entropy.launch_backward(upstream, **head, lse=lse, z_loss=0.0, needs=[True] * 3)

    chunks = tuple({"chunk_bytes": size.rows * min(width, size.states) * i.dtype.itemsize} for width in SLICES)
    yield Trial("linear_cross_entropy", size.width, i.dtype, both_ways, chunks)
    yield Trial(
        *("tau_leap_linear", size.width, i.dtype),
        lambda: tau_leap_linear.launch(**leaps, **RULE),
        HEAD_TILES,
        moved=nbytes(leaps["weight"]),
    )


def pack_trials(i: Inputs) -> Iterator[Trial]:
    a, size = pack(i), i.size
    qkv, gammas, width = a["qkv"], (a["q_gamma"], a["k_gamma"]), size.heads * size.head_width
    grads = [i.normal(size.batch, size.patches + size.length, size.heads, size.head_width) for _ in range(3)]
    warps = tuple({"num_warps": n} for n in (1, 2))
    yield Trial("qk_norm_pack", width, i.dtype, lambda: qk_norm.launch_pack(qkv, *gammas), warps, moved=2 * nbytes(qkv))
    yield Trial(
        *("qk_norm_pack_backward", width, i.dtype),
        lambda: qk_norm.launch_pack_backward(*grads, qkv, *gammas),
        warps,
        PROGRAMS,
        moved=8 * nbytes(qkv) // 3,
    )


def sweep(rows: Rows, device: str, size: str) -> None:
    """Time every trial; a choice that does not run is said and left out.

    Raises:
        ValueError: after all, where a launcher's own choice did not run.
    """
    broken = []
    for trial in trials(device, size):
        times: dict[tuple, float] = {}
        for choice in ({}, *trial.choices):
            measure(trial, choice, times, rows, device)
        if () not in times:
            broken.append(trial.op)
        if trial.then and times:
            best = dict(min(times, key=times.get))
            for more in trial.then:
                measure(trial, best | more, times, rows, device)
    for key, choice in best_tiles(rows.rows).items():
        rows.write(f"best: {' '.join(map(str, key))}: {label(choice)}")
    others(rows, device, size)
    if broken:
        raise ValueError(f"not even the default runs: {', '.join(broken)}")


def measure(trial: Trial, choice: dict[str, int], times: dict[tuple, float], rows: Rows, device: str) -> None:
    op, width, dtype = tiles.key_of(trial.op, trial.width, trial.dtype)
    about = {"op": op, "width": width, "dtype": dtype, "tile": choice, "kind": device.split(":")[0]}
    about |= {"moved_bytes": trial.moved} if trial.moved else {}
    with tiles.trial(trial.op, trial.width, trial.dtype, **choice):
        spent = add(rows, f"{op} {width} {dtype}, {label(choice)}", "anystate", trial.launch, device, **about)
    if spent is not None:
        times[tuple(choice.items())] = spent


def add(rows: Rows, name: str, by: str, function: Callable[[], object], device: str, **about) -> float | None:
    """Time a function and keep the row; what does not run (a tile too large for the chip, say) is said and left out."""
    try:
        spent = milliseconds(function, device)
    except Exception as error:
        rows.write(f"failed: sweep {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    rows.add(f"sweep {name}", {by: spent}, "ms", False, **about)
    return spent


def label(choice: dict[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in choice.items()) or "default"


def others(rows: Rows, device: str, size: str) -> None:
    """What the next changes to the kernels depend on: float32 sums inside a product, casts, τ-leaping from logits."""
    i = Inputs(SIZES[size], device, torch.bfloat16)
    n, states, width = i.size.rows, i.size.states, i.size.width
    head, leaps = i.normal(states, width, dtype=torch.float32), leap(i)
    add(rows, "the head cast to bfloat16", "torch", lambda: head.to(i.dtype), device)
    add(rows, "τ-leaping from logits", "anystate", lambda: tau_leap.launch_masked(**leaps, **RULE), device)
    if device.startswith("cuda"):  # nothing else adds products of bfloat16 up in float32
        grad, part = i.normal(n, min(2048, states)), i.normal(min(2048, states), width)
        total = torch.zeros(n, width, device=device)
        product = functools.partial(torch.mm, grad, part, out_dtype=torch.float32)
        inside = functools.partial(torch.addmm, total, grad, part, out_dtype=torch.float32)
        about = {}
        with contextlib.suppress(RuntimeError, TypeError):  # as the rows below will say
            about["apart"] = float((inside() - product()).abs().max())
        name = "hidden gradient of a slice of the head"
        add(rows, f"{name}, mm then added", "torch", lambda: total.add_(product()), device)
        add(rows, f"{name}, addmm", "torch", lambda: inside(out=total), device, **about)


def best_tiles(rows: Iterable[Row]) -> dict[tiles.Key, dict[str, int]]:
    """{(operation, width, dtype): tile} wherever one beats the launcher's own choice."""
    groups: dict[tiles.Key, list[Row]] = {}
    for row in rows:
        if "tile" in row.about:
            groups.setdefault((row.about["op"], row.about["width"], row.about["dtype"]), []).append(row)
    found = {}
    for key, group in groups.items():
        default = [row.value for row in group if not row.about["tile"]]
        best = min(group, key=lambda row: row.value)
        if default and best.value <= WORTH * default[0]:
            found[key] = best.about["tile"]
    return found


def main(file: str) -> None:
    """Lay the best tiles of a measured sweep over the committed table."""
    found = best_tiles(row for row in read_lines(Path(file)) if row.about.get("kind") == "cuda")
    if not found:
        sys.exit(f"{file} holds no sweep in which anything beats the kernels' own choice")
    tiles.write(tiles.read() | found)
    for key, choice in found.items():
        print(f"{' '.join(map(str, key))}: {label(choice)}")
    print(f"wrote {tiles.FILE}")


if __name__ == "__main__":
    main(*sys.argv[1:])
