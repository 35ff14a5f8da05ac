"""Do CUDA graphs give what eager code gives? Fifty training steps of a table and a small joint sampling, both ways.

Graphs that cannot be captured run eagerly with a warning, which here is an error. Without a GPU there are no graphs:
the same code then compares eager runs with themselves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

from ...sample import cuda_graphs as graphs
from ...sample import sample
from ...sample.pipeline import build_pipeline
from ...train import graph_step as graphed
from ...train.trainer import Trainer
from ..speed.rows import Rows
from ..speed.systems import config_of, shaken
from ..speed.table import trainer

STEPS = 50
LOSS = 1e-2  # relative difference allowed between losses: sums in another order grow apart over the steps
TOKENS = 0.95  # share that must be equal: a race decided within rounding may fall otherwise
PICTURES = 1e-2  # mean absolute difference allowed, in [−1, 1]


def smoke(rows: Rows, device: torch.device, steps: int = STEPS) -> None:
    """Raise ValueError where graphs are not captured, or give something else."""
    with warned() as warnings:
        table(rows, device, steps)
        sampling(rows, device)
    if warnings:
        raise ValueError(f"{len(warnings)} graphs were not captured, first: {warnings[0]}")


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """Collects the warnings that say that something runs without a graph."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage()) if "CUDA graph" in record.getMessage() else None
    logger = logging.getLogger("anystate")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def table(rows: Rows, device: torch.device, steps: int) -> None:
    """Training steps of the default table recipe, not compiled."""
    runs: dict[str, Trainer] = {}
    for way, devices in (("graph", ("cuda",)), ("eager", ())):
        made = runs[way] = trainer(device, "fast", ["compile=never"], "default")
        kept, graphed.DEVICES = graphed.DEVICES, devices
        try:
            for _ in range(steps):
                losses = made.update()
                made.step += 1
        finally:
            graphed.DEVICES = kept
        for m, loss in losses.items():
            rows.add(f"smoke: table, loss of {m} after {steps} steps", {way: float(loss)}, "")
    if device.type == "cuda" and runs["graph"].engine.graph is None:
        raise ValueError("the training step of a table was not captured as a graph")
    for m in runs["eager"].system.space:
        both = rows.find(f"smoke: table, loss of {m} after {steps} steps")
        if abs(both["graph"] - both["eager"]) > LOSS * max(abs(both["eager"]), 1e-3):
            raise ValueError(
                f"a table's loss of {m} is {both['graph']:.6g} with graphs and {both['eager']:.6g} without"
            )


def sampling(rows: Rows, device: torch.device) -> None:
    """The digits network jointly, and given captions."""
    system = shaken(build_pipeline(config_of("digits", []), codecs=False))
    net = system.net.to(device).eval().requires_grad_(False)
    text = system.texts[0]
    known = torch.ones(16, *system.space[text].shape, dtype=torch.int64, device=device)
    for direction, given in (("joint", {}), (f"given {text}", {text: known})):
        drawn = {}
        for way, used in (("graph", net), ("eager", lambda *args, **options: net(*args, **options))):
            drawn[way] = sample(
                used,
                system.space,
                given,
                n=16,
                steps=8,
                guidance=system.guidance(bool(given)),
                samplers=system.samplers,
                device=device,
            )
        equal = float((drawn["graph"][text] == drawn["eager"][text]).double().mean())
        apart = float((drawn["graph"][system.images[0]] - drawn["eager"][system.images[0]]).abs().mean())
        rows.add(f"smoke: sampling {direction}, equal tokens", {"graph": equal}, "", allowed=TOKENS)
        rows.add(f"smoke: sampling {direction}, pictures apart", {"graph": apart}, "", allowed=PICTURES)
        if equal < TOKENS or apart > PICTURES:
            raise ValueError(f"sampling {direction}: {equal:.1%} of tokens equal, pictures {apart:.2g} apart")
    if device.type == "cuda" and not any(graph.replay for graph in graphs.graphed(net).graphs.values()):
        raise ValueError("no evaluation of the network was captured as a graph")
