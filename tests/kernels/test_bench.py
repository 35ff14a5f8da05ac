"""The benchmark and the verification of the kernels."""

import functools
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anystate.bench.speed import kernels as bench
from anystate.bench.speed.kernel_cases import CASES, operation_of, trajectory
from anystate.bench.speed.kernel_inputs import SIZES, Inputs
from anystate.bench.speed.verify import verify
from anystate.kernels import reference


@pytest.fixture
def quick(monkeypatch):
    """Short measurements."""
    monkeypatch.setattr(bench, "BUDGET_MS", 1.0)
    monkeypatch.setattr(bench, "COPY_BYTES", {"cuda": 2**20, "cpu": 2**20})
    monkeypatch.setattr(bench, "MATMUL_WIDTH", {"cuda": 256, "cpu": 64})


def test_run_writes_rows_and_a_plot(quick, tmp_path, device):
    lines = []
    ops = ["heun_predict", "tau_leap_50_steps", "linear_cross_entropy"]
    code = bench.run(ops, "tiny", tmp_path / "k.json", tmp_path / "k.png", device=device, write=lines.append)
    assert code == 0
    content = json.loads((tmp_path / "k.json").read_text())
    assert {"device", "versions", "commit", "bytes_per_s", "flop_per_s", "size", "rows"} <= content.keys()
    rows = {(row["op"], row["mode"], row["implementation"]): row for row in content["rows"]}
    assert ("linear_cross_entropy", "training", "plain") in rows
    assert ("tau_leap_50_steps", "forward", "poisson") in rows
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["share_of_floor"] > 0 for row in rows.values())
    assert len(lines) == 2 + len(rows)
    assert (tmp_path / "k.png").stat().st_size > 0


class Operations(TorchDispatchMode):
    """Collects the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.gradients and "attention" not in n])
def test_timed_training_runs_only_the_operation(name, device):
    """Upstream gradients and copies of gradients would add to the measured time of the kernels."""
    arguments = CASES[name].inputs(Inputs(SIZES["tiny"], device, torch.float32))
    operation = functools.partial(operation_of(name), backend="triton")
    training = dict(bench.modes(name, operation, arguments))["training"]
    with Operations() as seen:
        training()
    assert any(called.startswith("anystate.") for called in seen.names)
    assert not {"aten.ones_like", "aten.full_like", "aten.fill_.Scalar", "aten.clone", "aten.copy_"} & set(seen.names)


def test_unknown_names_are_refused(device):
    with pytest.raises(ValueError, match=r"^op: unknown tau; known are"):
        bench.run(["tau"])
    with pytest.raises(ValueError, match=r"^size: must be one of tiny, small, official, got 'huge'"):
        bench.run(size="huge")


def test_every_operation_passes_verification(device):
    lines = []
    assert verify(size="tiny", write=lines.append), "\n".join(lines)
    assert len(lines) >= len(CASES)


def test_a_wrong_operation_fails_verification(device, monkeypatch):
    right = reference.gated_residual
    monkeypatch.setattr(reference, "gated_residual", lambda x, branch, gate: right(x, branch, gate * 1.01))
    lines = []
    assert not verify(["gated_residual"], write=lines.append)
    assert lines[0].startswith("FAIL  gated_residual")


def test_failures_are_reported_and_do_not_stop_the_run(quick, device, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise NotImplementedError("no such instruction\non this GPU")

    monkeypatch.setattr(reference, "gated_residual", broken)
    lines = []
    assert not verify(["gated_residual", "mask_perturb"], size="tiny", write=lines.append)
    assert lines[0].startswith("FAIL  gated_residual")
    assert lines[0].endswith("NotImplementedError: no such instruction on this GPU")
    assert lines[-1].startswith("pass  mask_perturb")
    assert bench.run(["gated_residual", "mask_perturb"], "tiny", tmp_path / "k.json", device=device, write=print) == 1
    content = json.loads((tmp_path / "k.json").read_text())
    assert content["failures"][0].startswith("gated_residual")
    assert content["failures"][0].endswith("NotImplementedError: no such instruction on this GPU")
    assert {row["op"] for row in content["rows"]} >= {"mask_perturb"}


def test_a_trajectory_reads_each_row_of_logits_once():
    """A trajectory of 50 steps reads each row of logits once, where dense steps read it 50 times. Including the bytes
    of the tokens this is at least 20 times less."""
    size, itemsize = SIZES["official"], 2
    arguments = CASES["tau_leap_50_steps"].inputs(Inputs(SIZES["tiny"], "cpu", torch.float32))
    n, length = size.sampled, size.length
    arguments |= {
        "logits": torch.zeros(n, length, 1),
        "tokens": torch.ones(n, length, dtype=torch.int64),
        "rate": torch.ones(n),
        "keys": Inputs(size, "cpu", torch.float32).keys(n),
        "states": 1,
    }
    rows = []

    def counting(**kwargs):
        out = reference.tau_leap(**kwargs)
        rows.append(int((out != kwargs["tokens"]).sum()))
        return out

    assert (trajectory(counting, arguments) == 0).all()
    assert sum(rows) == n * length
    row, tokens = size.states * itemsize, 2 * 8 * n * length
    assert 50 * n * length * row >= 20 * (sum(rows) * row + 50 * tokens)


def test_cases_cover_every_operation(device):
    from anystate import kernels

    covered = {operation_of(name).__name__ for name in CASES}
    no_operations = {"ColumnGroup", "ColumnLogits", "Draw", "LazyLogits", "Packing", "Rng", "pack_keys"}
    assert covered == set(kernels.__all__) - no_operations - {"uniform", "normal"}
