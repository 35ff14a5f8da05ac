"""CUDA graphs against eager code: training steps of a table and small samplings must agree.

A graph that cannot be captured is replaced by eager code with a warning, which is an error here. Without a GPU there
are no graphs, and eager runs are compared with themselves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from ...model.cpu_memory import deterministic
from ...sample import sample
from ...sample.cuda_graphs import graphs_of
from ...sample.pipeline import Pipeline
from ...train.graph_step import GraphStep
from ...train.step import training_step
from ...train.trainer import Trainer
from ..speed.results import ResultLog
from ..speed.systems import untrained
from ..speed.table import trainer

STEPS = 50
MAX_LOSS_DIFFERENCE = 1e-2  # relative: rounding differences of sums in another order grow over the steps
MIN_EQUAL_TOKENS = 0.95  # share: rounding can decide a draw whose two best candidates are nearly equal
MAX_DIFFERENCE = 1e-2  # mean absolute, of images in [−1, 1] and of standardized numbers


def smoke(log: ResultLog, device: torch.device, steps: int = STEPS) -> None:
    """Raise ValueError if graphs are not captured or their results differ."""
    with collected_warnings() as warnings:
        rows = table(log, device, steps)
        sampling(log, device, rows)
    if warnings:
        raise ValueError(f"{len(warnings)} graphs were not captured, first: {warnings[0]}")


class _GraphWarnings(logging.Handler):
    """Collects the warnings about code that runs without a graph."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "CUDA graph" in record.getMessage():
            self.messages.append(record.getMessage())


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The list to which warnings about missing graphs are added inside the context."""
    handler, logger = _GraphWarnings(), logging.getLogger("anystate")
    logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)


def table(log: ResultLog, device: torch.device, steps: int) -> Pipeline:
    """Compare training steps of the default table recipe with eager ones: as a graph and, on a GPU, as a graph of
    compiled code; returns the model that the eager steps trained."""
    eager = trainer(device, ["compile=never"], "default")
    losses = {"eager": _train(eager, steps, use_graph=False)}
    settings = {"graph": "never"} | ({"compiled graph": "always"} if device.type == "cuda" else {})
    for name, setting in settings.items():
        run = trainer(device, [f"compile={setting}"], "default")
        losses[name] = _train(run, steps, use_graph=True)
        as_asked = isinstance(run._step, GraphStep) and run.state.compiled == (setting == "always")
        if device.type == "cuda" and not as_asked:
            raise ValueError(f"the training step of a table was not captured as a {name}")
    for m in eager.pipeline.space:
        values = {name: loss[m] for name, loss in losses.items()}
        log.add(f"smoke: table, loss of {m} after {steps} steps", values, "")
        for name, value in values.items():
            if abs(value - values["eager"]) > MAX_LOSS_DIFFERENCE * max(abs(values["eager"]), 1e-3):
                raise ValueError(f"the loss of {m} of a table is {value:.6g} as a {name}, {values['eager']:.6g} eager")
    return eager.ema_pipeline()


def _train(run: Trainer, steps: int, use_graph: bool) -> dict[str, float]:
    """The losses of the last of `steps` training steps."""
    for _ in range(steps):
        if use_graph:
            losses = run.update()
        else:
            with deterministic(run.device):
                losses = training_step(run.state)
        run.state.step += 1
    return {m: float(loss) for m, loss in losses.items()}


def sampling(log: ResultLog, device: torch.device, rows: Pipeline) -> None:
    """Compare joint samples of the digits network, samples conditioned on captions in bfloat16, and rows of a table."""
    digits = untrained("digits", []).to(device)
    (text,) = (m for m, process in digits.space.items() if process.discrete)
    captions = torch.ones(16, *digits.space[text].shape, dtype=torch.int64, device=device)
    _compare(log, "joint", digits, {}, device, "fp32")
    _compare(log, f"given {text}", digits, {text: captions}, device, "bf16")
    _compare(log, "rows", rows, {}, device, "fp32")


def _compare(
    log: ResultLog, name: str, pipeline: Pipeline, conditions: dict[str, Tensor], device: torch.device, precision: str
) -> None:
    """Log how samples with and without graphs differ; ValueError if they do by more than rounding."""
    for _ in range(2):  # the second batch replays all that the first one captured
        graph = _sample(pipeline, conditions, device, precision, use_graph=True)
    eager = _sample(pipeline, conditions, device, precision, use_graph=False)
    discrete = [m for m, process in pipeline.space.items() if process.discrete]
    equal = min((float((graph[m] == eager[m]).double().mean()) for m in discrete), default=1.0)
    numbers = [m for m in pipeline.space if m not in discrete]
    difference = max((float((graph[m] - eager[m]).abs().mean()) for m in numbers), default=0.0)
    log.add(f"smoke: sampling {name}, equal tokens", {"graph": equal}, "", allowed=MIN_EQUAL_TOKENS)
    log.add(f"smoke: sampling {name}, mean difference", {"graph": difference}, "", allowed=MAX_DIFFERENCE)
    if equal < MIN_EQUAL_TOKENS or difference > MAX_DIFFERENCE:
        raise ValueError(f"sampling {name}: {equal:.1%} of tokens equal, numbers differ by {difference:.2g}")
    if device.type == "cuda" and not _has_graphs(pipeline, device):
        raise ValueError(f"sampling {name}: no update was captured as a graph")


def _has_graphs(pipeline: Pipeline, device: torch.device) -> bool:
    graphs = graphs_of(pipeline.net, pipeline.space, device)
    return graphs is not None and any(replay for _, replays in graphs.batches.values() for replay in replays.values())


class _EagerNet:
    """The network as a plain callable, which the sampler never captures as graphs."""

    def __init__(self, net: torch.nn.Module):
        self.net, self.observes = net, net.observes

    def __call__(self, *args, **options) -> dict:
        return self.net(*args, **options)


def _sample(
    pipeline: Pipeline, conditions: dict[str, Tensor], device: torch.device, precision: str, use_graph: bool
) -> dict[str, Tensor]:
    return sample(
        pipeline.net if use_graph else _EagerNet(pipeline.net),
        pipeline.space,
        conditions,
        n=16,
        steps=8,
        guidance=pipeline.guidance(bool(conditions)),
        samplers=pipeline.samplers,
        device=device,
        precision=precision,
    )
