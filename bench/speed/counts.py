"""`anystate bench counts`: memory traffic, kernels and launches of the GPU engine, counted without a GPU.

A count depends on the code and on the versions of torch and Triton alone, so the counts of an earlier commit are the
state before a change. Traffic is that of everything but matrix products and attention, see `cuda_lowering`. The time on
the host is measured on this machine; it is comparable only where both columns are of one machine.
"""

from __future__ import annotations

import itertools
import json
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...kernels import LazyLogits
from ...kernels.backend import INTERPRETED, OPERATIONS
from ...model import float8
from ...model.build import build_codecs, build_network, build_space
from ...model.provenance import provenance
from ...model.storage import atomic_write
from ...sample import sample
from ...sample.pipeline import Pipeline
from . import compile_only, cross_entropy_traffic
from .cuda_lowering import Graph, Lowering
from .h100 import as_on_h100
from .launches import LaunchCounter, recorded_graphs, update_launches
from .systems import config_of, untrained
from .table_counts import table_step

Row: TypeAlias = dict[str, str | float | None]  # name, value, unit, before

BATCH = 256  # of the official recipe
BLOCKS = ["network.depth=3", "modalities.image.stream.tower=3", "modalities.text.stream.tower=3"]
MOVED = ("fused", "operation", "other")  # kinds of kernels that are neither matrix products nor attention
GB = 1e9


def row(name: str, value: float, unit: str) -> Row:
    return {"name": name, "value": round(value, 6), "unit": unit, "before": None}


# Blocks of the official network


def middle_blocks(net: nn.Module) -> dict[str, nn.Module]:
    """One joint block and one single-stream block of each stream that has a block before and after it."""
    towers = {f"{m} tower block": blocks[1] for m, blocks in net.tower.items() if len(blocks) > 2}
    return {"joint block": net.trunk[1]} | towers


def block_graphs(batch: int = BATCH, settings: list[str] | None = None) -> dict[str, list[Graph]]:
    """{block: its forward and backward graphs} in a training step of the official network in bfloat16 autocast."""
    config = config_of("official", [*BLOCKS, *(settings or [])])
    codecs, lowerings = build_codecs(config), {}
    space = build_space(config, codecs)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_h100(), torch.autocast("cpu", torch.bfloat16):
        net = build_network(config, codecs)
        if config.train.precision == "fp8":
            float8.convert(net, torch.device("cuda"))
        net.whole_blocks = True  # as when blocks are compiled one by one
        for name, block in middle_blocks(net).items():
            lowerings[name] = Lowering()
            block.compile(backend=lowerings[name], fullgraph=True, dynamic=False)
        x = {m: torch.zeros(batch, *p.shape, dtype=torch.int64 if p.discrete else None) for m, p in space.items()}
        masks = {m: torch.ones(x[m].shape, dtype=torch.bool) for m in x if hasattr(space[m], "pad_id")}
        predictions = net(x, {m: torch.ones(batch) for m in space}, masks)
        sum(hidden(out).sum() for out in predictions.values()).backward()
    return {name: lowering.graphs for name, lowering in lowerings.items()}


def hidden(prediction: Tensor | LazyLogits) -> Tensor:
    return prediction.hidden if isinstance(prediction, LazyLogits) else prediction


def block_rows(graphs: dict[str, list[Graph]]) -> list[Row]:
    """Traffic and kernels of blocks, forward and backward."""
    rows = []
    for name, (forward, backward) in graphs.items():
        for what, kinds in (("memory traffic", MOVED), ("operands of products", ("product",))):
            parts = {"forward": forward.bytes(*kinds), "backward": backward.bytes(*kinds)}
            rows += [row(f"{name}, {part}: {what}", count / GB, "GB") for part, count in parts.items()]
            rows.append(row(f"{name}: {what}", sum(parts.values()) / GB, "GB"))
        rows.append(row(f"{name}: kernels", forward.launches + backward.launches, "kernels"))
    return rows


def fp8_rows() -> list[Row]:
    """The same of blocks with products in fp8."""
    found = block_rows(block_graphs(settings=["train.precision=fp8"]))
    return [{**counted, "name": f"fp8, {counted['name']}"} for counted in found]


# Other counts


def table_rows() -> list[Row]:
    return [row(f"table step: kernels, {stage}", count, "kernels") for stage, count in table_step().items()]


def cross_entropy_rows() -> list[Row]:
    return [row(**found) for found in cross_entropy_traffic.count_rows()]


def sampling_rows(size: str = "tiny", n: int = 4, steps: int = 6) -> list[Row]:
    """Launches of an update: outside of its CUDA graph, and inside of it beside the network's own."""
    pipeline = untrained(size, [])
    tokens = next(m for m, process in pipeline.space.items() if process.discrete)
    given = {tokens: torch.ones(n, *pipeline.space[tokens].shape, dtype=torch.int64)}
    rows = []
    for what, conditions in (("joint", {}), (f"given {tokens}", given)):
        with recorded_graphs():
            for _ in range(3):  # the first runs without graphs, the second captures them
                outside = launches_between_updates(pipeline, conditions, n, steps)
        inside = max(sum(found.values()) for found in update_launches(pipeline, conditions, n, steps).values())
        rows.append(row(f"update of sampling, {what}: launches outside of the graph", max(outside), "launches"))
        rows.append(row(f"update of sampling, {what}: launches beside the network", inside, "launches"))
    return rows


def launches_between_updates(pipeline: Pipeline, conditions: dict[str, Tensor], n: int, steps: int) -> list[int]:
    """The launches of every update of a sampling, without those that a graph replays."""
    counts: list[int] = []
    options = {"guidance": pipeline.guidance(bool(conditions)), "samplers": pipeline.samplers}
    with LaunchCounter() as counter:
        options["progress"] = lambda: counts.append(counter.launches)
        sample(pipeline.net, pipeline.space, conditions, n=n, steps=steps, **options)
    return [after - before for before, after in itertools.pairwise(counts)]


def kernel_rows() -> list[Row]:
    """Resources of every kernel on an H100."""
    units = {"registers": "registers", "shared_bytes": "B", "spilled_bytes": "B", "ctas_per_sm": "CTAs"}
    return [
        row(f"{usage.op}, {usage.kernel}: {name.replace('_', ' ')}", getattr(usage, name), unit)
        for usage in compile_only.table(targets=(90,))
        for name, unit in units.items()
    ]


def dispatch_rows() -> list[Row]:
    """Time on the host to dispatch an operation of ours, beyond that of its launch, which is replaced."""
    forward, backward = OPERATIONS["eps_mse"], OPERATIONS["eps_mse_backward"]
    eps, keys, grad = torch.zeros(4, 8), torch.zeros(4, 5, dtype=torch.int64), torch.ones(4)
    leaf, launches = torch.zeros(4, 8, requires_grad=True), (forward.launch, backward.launch)
    forward.launch, backward.launch = (lambda eps, keys: torch.empty(4)), (lambda grad, eps, keys: torch.empty(4, 8))
    try:
        launch = microseconds(forward.launch, eps, keys)
        times = {
            "forward with gradients": microseconds(forward, leaf, keys),
            "forward without": microseconds(forward, eps, keys),
            "backward": microseconds(backward, grad, eps, keys),
        }
    finally:
        forward.launch, backward.launch = launches
    return [row(f"dispatch of an operation, {what}: time on the host", t - launch, "µs") for what, t in times.items()]


def microseconds(function: Callable, *args, calls: int = 1000, repeats: int = 100) -> float:
    """Processor time of one call, the smallest of several repetitions."""
    function(*args)
    times = timeit.repeat(lambda: function(*args), number=calls, repeat=repeats, timer=time.process_time)
    return min(times) / calls * 1e6


# All of them


def count_all() -> list[Row]:
    """All counts, in the order of the table."""
    return [
        *block_rows(block_graphs()),
        *fp8_rows(),
        *table_rows(),
        *cross_entropy_rows(),
        *sampling_rows(),
        *dispatch_rows(),
        *kernel_rows(),
    ]


def with_before(rows: list[Row], before: list[Row]) -> list[Row]:
    """The rows, each with the value that the same row has in an earlier count."""
    values = {earlier["name"]: earlier["value"] for earlier in before}
    return [{**found, "before": values.get(found["name"])} for found in rows]


def read_counts(file: Path) -> dict:
    """What `write_counts` wrote.

    Raises:
        ValueError: the file is not one of counts.
    """
    try:
        counts = json.loads(file.read_text(encoding="utf-8"))
        return {"commit": counts["commit"], "versions": counts["versions"], "rows": counts["rows"]}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"--before: {file} was not written by anystate bench counts") from None


def run(file: Path | None, before: Path | None, write: Callable[[str], None] = print) -> None:
    """Print all counts, and write them to a file with the commit and the versions.

    before: a file of an earlier commit, whose values become the column `before`.
    """
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET: unset it to count kernels")
    earlier = None if before is None else read_counts(before)
    rows = with_before(count_all(), [] if earlier is None else earlier["rows"])
    for found in rows:
        old = "" if found["before"] is None else f"   before {found['before']:12.6g}"
        write(f"{found['name']:84} {found['value']:12.6g} {found['unit']:10}{old}")
    if file is not None:
        made = provenance("cpu")
        counts = {name: made[name] for name in ("commit", "versions", "date")} | {"before_commit": None}
        if earlier is not None:
            counts |= {"before_commit": earlier["commit"]}
        atomic_write(file, json.dumps(counts | {"rows": rows}, indent=1, ensure_ascii=False) + "\n")
