"""A training step as one CUDA graph, with a stand-in for the capture on the CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from anystate.configs.load import load_config
from anystate.model import compilation as compiling
from anystate.sample import cuda_graphs as graphs
from anystate.train import graph_step as graphed
from anystate.train.data.dataset import InMemory
from anystate.train.trainer import Trainer

CUDA = torch.cuda.is_available()
TINY = ["network.width=16", "network.depth=2", "network.heads=2", "train.batch=64", "train.steps=8"]
TINY += ["train.warmup_steps=2"]
TINY += ["train.log_every=1", "train.save_every=4", "sample.steps=6", "train.precision=fp32"]


@pytest.fixture
def train(tmp_path):
    """train("train.steps=4", name="a") → a Trainer on 300 rows of a table; the same name resumes."""
    r = np.random.default_rng(0)
    table = pd.DataFrame({"a": r.choice(["x", "y", "z"], 300), "b": r.normal(size=300), "c": r.integers(0, 9, 300)})

    def make(*overrides: str, name: str = "run") -> Trainer:
        config, rows = load_config("table/default", [*TINY, *overrides]), InMemory({"row": table})
        return Trainer(config, tmp_path / name, "cuda" if CUDA else "cpu", (rows, rows), quiet=True)

    return make


@pytest.fixture
def graphable(monkeypatch):
    """A stand-in for capture on the CPU: warm-ups as on a GPU; replays write into the first result's memory."""
    counts = {"captured": 0, "replayed": 0}

    def capture(function):
        for _ in range(graphs.WARM_UPS):
            losses, norm = function()
        counts["captured"] += 1

        def replay():
            counts["replayed"] += 1
            new, now = function()
            norm.copy_(now)
            for m, value in new.items():
                losses[m].copy_(value)

        return replay, (losses, norm)

    if not CUDA:
        monkeypatch.setattr(graphed, "DEVICES", ("cpu",))
        monkeypatch.setattr(graphs, "capture", capture)
    return counts


def steps(trainer: Trainer, n: int = 4) -> list[dict[str, float]]:
    losses = []
    for _ in range(n):
        losses.append({m: float(v) for m, v in trainer.update().items()})
        trainer.state.step += 1
    return losses


def assert_same(a: Trainer, b: Trainer, atol: float = 1e-6) -> None:
    a, b = a.state, b.state
    for x, y in zip([*a.parameters, *a.ema.parameters()], [*b.parameters, *b.ema.parameters()], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_graphed_steps_equal_eager_steps(train, graphable, monkeypatch):
    one = train(name="graph")
    ours = steps(one)
    assert isinstance(one._step, graphed.GraphStep)
    monkeypatch.setattr(graphed, "DEVICES", ())
    two = train(name="eager")
    theirs = steps(two)
    assert not isinstance(two._step, graphed.GraphStep)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert_same(one, two, atol=1e-5)  # a learning rate in float32; a step is some 1e-3
    if not CUDA:
        assert graphable == {"captured": 1, "replayed": 4}


def test_a_graphed_run_resumes(train, graphable):
    whole, first = train(name="whole"), train(name="parts")
    whole.run()
    first.run(stop=4)
    again = train(name="parts")
    assert again.state.step == 4
    again.run()
    assert isinstance(again._step, graphed.GraphStep)
    assert_same(whole, again, atol=0)


def test_a_failed_capture_does_not_change_the_run(train, graphable, monkeypatch, caplog):
    def refuse(function):
        function()
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    one = train(name="refused")
    ours = steps(one)
    assert not isinstance(one._step, graphed.GraphStep)
    assert "runs eagerly: not permitted" in caplog.text
    monkeypatch.setattr(graphed, "DEVICES", ())
    two = train(name="eager")
    for a, b in zip(ours, steps(two), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert_same(one, two, atol=1e-5)  # a learning rate in float32


@pytest.mark.long
@pytest.mark.skipif(CUDA, reason="a stand-in for the compiler")
def test_a_step_compiled_as_a_whole_equals_an_eager_step(train, graphable, monkeypatch):
    """Losses and gradients are one graph without breaks, compiled once. Inductor's code for the CPU is not run: the
    overflow of a product of random words is undefined in C++."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: None)
    compile_small = functools.partial(compiling.compile_small, backend="aot_eager")
    monkeypatch.setattr(graphed, "compile_small", compile_small)
    one, two = train("compile=always", name="compiled"), train("compile=never", name="graph")
    assert (one.state.compiled, two.state.compiled) == (True, False)
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert_same(one, two, atol=2e-5)  # a step is some 1e-3
    assert float(one.state.grad_norm) == pytest.approx(float(two.state.grad_norm), rel=1e-4)
    assert isinstance(one._step, graphed.GraphStep)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_gradients_are_clipped_to_the_largest_norm(train, monkeypatch, limit):
    monkeypatch.setattr(graphed, "DEVICES", ())
    trainer = train(f"train.max_grad_norm={'null' if limit is None else limit}")
    used: list[torch.Tensor] = []
    state = trainer.state
    monkeypatch.setattr(state.optimizer, "step", lambda: used.extend(p.grad.clone() for p in state.parameters))
    trainer.update()
    norm, before = float(torch.nn.utils.get_total_norm(used)), float(state.grad_norm)
    assert before > 0.1
    assert norm == pytest.approx(limit or before, rel=1e-3)


@pytest.mark.skipif(CUDA, reason="a stand-in for a compiler that fails")
def test_a_step_that_does_not_compile_runs_eagerly(train, graphable, monkeypatch, caplog):
    def refuse(function, backend="inductor"):
        def run():
            raise torch._dynamo.exc.Unsupported("no code for this")

        return run

    monkeypatch.setattr(compiling, "compiler_missing", lambda device: None)
    monkeypatch.setattr(graphed, "compile_small", refuse)
    one, two = train("compile=always", name="refused"), train("compile=never", name="graph")
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert not isinstance(one._step, graphed.GraphStep)
    assert "runs eagerly: no code for this" in caplog.text


@pytest.mark.long
@pytest.mark.skipif(CUDA, reason="counts on the CPU")
def test_kernels_of_a_step_of_the_official_recipe():
    """In a process of its own, where Triton is not the interpreter."""
    code = (
        "import json; from anystate.bench.speed.table_counts import table_step; print(json.dumps(table_step('paper')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = json.loads(run.stdout.splitlines()[-1])
    assert kernels["compiled"] > 100
    assert kernels["all"] <= 260, kernels


@pytest.mark.skipif(CUDA, reason="counts on the CPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["whole", "blocks"])
def test_compiled_table_has_no_graph_breaks_and_compiles_once(train, device, monkeypatch):
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: None)
    trainer = train(name=device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiling.compile_net(trainer.state.net, torch.device(device), backend="eager")
    steps(trainer, 2)
    graphs_made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    steps(trainer, 2)
    assert not torch._dynamo.utils.counters["graph_break"]
    kinds = 1 if device == "cpu" else 2  # to the first block no branch comes from a block before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs_made == kinds
