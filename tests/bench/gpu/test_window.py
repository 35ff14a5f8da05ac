"""The three calls on a GPU: every part at tiny sizes without one, resumption, and the choice of block sizes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import anystate
from anystate.bench.gpu import smoke as gpu_smoke
from anystate.bench.gpu import sweep as gpu_sweep
from anystate.bench.gpu import window as gpu_window
from anystate.bench.gpu.parts import CALLS, EXTRA
from anystate.bench.gpu.quality_parts import PAPER_RUN
from anystate.bench.gpu.window import UNFINISHED, Window, completed, run_limited
from anystate.bench.speed.results import Result, ResultLog, append_results, read_results
from anystate.kernels import tiles
from anystate.model.provenance import provenance

ROOT = Path(anystate.__file__).parent
NAMES = {call: [part.name for part in parts] for call, parts in CALLS.items()}
MEASURED = {  # a result that each part must write, by the beginning of its name
    "limits": "limit: copy",
    "verify": "verify linear_cross_entropy backward, float32",
    "smoke": "smoke: sampling given text, equal tokens",
    "train-official": "train tiny: MFU",
    "kernels": "kernel gated_residual_fp32_stream training",
    "sweep": "sweep qk_norm_pack_backward 16 bfloat16, ROWS 1 num_warps 2",
    "sample-official": "sample tiny, given text, batch 4, 4 steps: samples per second",
    "table-train": "table default: train: samples per second",
    "table-sample": "table default: sample 64 rows, same steps",
    "train-official-plain": "train tiny: loss of image in the first step",
    "kernel-tests": "kernel tests",
    "table-default": "table default: adult, seed 0: trend",
    "table-paper": "table paper: adult, trend",
}


@pytest.mark.long
@pytest.mark.parametrize("call", CALLS)
def test_every_part_at_tiny_sizes_without_a_gpu(call, tmp_path):
    environment = os.environ | {"OUT": str(tmp_path / "out"), "ANYSTATE_GPU_FOLDER": str(tmp_path / "gpu")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    script = ROOT / "bench/gpu/window.sh"
    done = subprocess.run(
        ["bash", script, str(call), "--dry-run"], env=environment, capture_output=True, text=True, timeout=450
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = read_results(tmp_path / "out" / "gpu-dry-run.jsonl")
    names = [row.name for row in rows]
    for part in NAMES[call]:
        assert f"part {part}" in names
        assert any(name.startswith(MEASURED[part]) for name in names), part
    assert len(done.stdout.splitlines()) > len(names)  # at least one line per measurement
    assert all({"device", "commit", "versions"} <= set(row.provenance) for row in rows)
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert all(file.is_file() for file in files)
    assert f"call {call} on dry run: {NAMES[call][0]}" in done.stdout
    assert not (tmp_path / "gpu/runs").exists()  # a real call would resume a run of the same name


def test_limits_of_calls_and_order_of_their_parts():
    assert gpu_window.SECONDS + gpu_window.GRACE < 560
    for call, parts in CALLS.items():
        assert sum(part.seconds for part in parts) <= gpu_window.SECONDS < 560, call
    assert NAMES[2].index("sample-official") < NAMES[2].index("train-official-plain")
    assert set(MEASURED) == {name for names in NAMES.values() for name in names}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["1"], "no GPU here"), (["3", "--only", "nothing"], "no part 'nothing'; there are limits, verify")],
)
def test_bad_requests_are_one_line(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert gpu_window.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


class Machine:
    """A GPU of that name whose parts end with these exit codes, default 0, and write a result each."""

    def __init__(self, monkeypatch, tmp_path, name="Some GPU", results=True, **codes):
        self.codes, self.ran, self.name = codes, [], name
        self.out, self.workdir = tmp_path / "out", tmp_path / "workdir"
        monkeypatch.setattr(gpu_window, "gpu_name", lambda: name)
        monkeypatch.setattr(gpu_window, "run_limited", self.run_limited)
        monkeypatch.setattr(gpu_window, "ROOT", tmp_path)

    def run_limited(self, part, arguments, limit, dry, write):
        self.ran.append((part.name, limit))
        code = self.codes.get(part.name, 0)
        results = Path(arguments[arguments.index("--results") + 1])
        where = provenance("cpu") | {"device": self.name}
        rows = [Result("speed", "fast", 1.0, "1/s", None, {}, where)]
        rows += [Result(f"part {part.name}", "window", 1.0, "s", None, {}, where)] if code == 0 else []
        append_results(results, rows)
        (Path(arguments[arguments.index("--files") + 1]) / f"{part.name}.txt").write_text("beside")
        return code, 1.0

    def call(self, number, only=None):
        self.ran.clear()
        return Window(number, False, only, self.out, self.workdir).run()


def test_the_same_command_resumes_a_call(monkeypatch, tmp_path):
    codes = {"verify": 1, "kernels": 130}
    machine = Machine(monkeypatch, tmp_path, **codes)
    assert machine.call(1) == 1
    assert [name for name, _ in machine.ran] == NAMES[1]  # a part that fails does not stop the others
    limits = [part.seconds for part in CALLS[1]]  # each also has the time that earlier ones did not use
    assert [limit for _, limit in machine.ran] == pytest.approx([sum(limits[: n + 1]) for n in range(6)], abs=5)
    machine.codes = {}
    (machine.out / "gpu-some-gpu.jsonl").unlink()  # $OUT is emptied between calls; the machine has a copy
    assert machine.call(1) == 0
    assert [name for name, _ in machine.ran] == ["verify", "kernels"]
    assert machine.call(1) == 0
    assert not machine.ran


def test_a_new_machine_continues_with_the_files_of_an_earlier_one(monkeypatch, tmp_path):
    first = Machine(monkeypatch, tmp_path / "first", **{"table-paper": UNFINISHED})
    checkpoint = first.workdir / "runs" / PAPER_RUN / "step_00002000"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text("a: 1")
    assert first.call(3) == 0
    assert "to be continued: table-paper" in (first.out / "gpu-some-gpu-3.txt").read_text()
    second = Machine(monkeypatch, tmp_path / "second")
    left = tmp_path / "second/bench/results"
    left.mkdir(parents=True)
    for file in first.out.iterdir():
        (left / file.name).write_bytes(file.read_bytes())
    assert second.call(3) == 0
    assert [name for name, _ in second.ran] == ["table-paper"]
    assert (second.workdir / "runs" / PAPER_RUN / "step_00002000/config.yaml").read_text() == "a: 1"
    with tarfile.open(second.out / "gpu-some-gpu-3.tar.gz") as archive:
        assert {"more-some-gpu-3/table-default.txt", "more-some-gpu-3/table-paper.txt"} <= set(archive.getnames())


def test_parts_of_another_commit_or_gpu_are_measured_again(tmp_path):
    file, here = tmp_path / "rows.jsonl", provenance("cpu") | {"device": "Some GPU"}
    for n, other in enumerate(({}, {"commit": "0000000"}, {"device": "Other GPU"})):
        append_results(file, [Result(f"part {n}", "window", 1.0, "s", None, {}, here | other)])
    assert completed(file, "Some GPU") == {"0"}


def test_parts_without_time_are_reported(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu_window, "SECONDS", 4)
    assert machine.call(2) == 1
    assert not machine.ran
    assert "NOT DONE: sample-official" in (machine.out / "gpu-some-gpu-2.txt").read_text()


def test_parts_chosen_by_name_get_all_the_time(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)
    assert machine.call(3, ["emoji", "limits"]) == 0
    assert [name for name, _ in machine.ran] == ["emoji", "limits"]
    assert all(limit > 500 for _, limit in machine.ran)
    assert {part.name for part in EXTRA} == {"fp8", "emoji"}


def test_a_part_is_stopped_at_its_limit(tmp_path):
    (part,) = (part for part in CALLS[1] if part.name == "smoke")
    lines = []
    arguments = ["--part", "smoke", "--dry-run", "--results", tmp_path / "r.jsonl", "--files", tmp_path]
    code, spent = run_limited(part, [*arguments, "--workdir", tmp_path], 1.0, True, lines.append)
    assert code != 0
    assert spent < 15


def test_graphs_that_cannot_be_captured_fail_the_smoke_test(monkeypatch):
    rows = ResultLog("cpu", None, lambda line: None)

    def table(*_):
        logging.getLogger("anystate.train.graph_step").warning(
            "no CUDA graph for the training step, it runs eagerly: x"
        )

    monkeypatch.setattr(gpu_smoke, "table", table)
    monkeypatch.setattr(gpu_smoke, "sampling", lambda *_: None)
    with pytest.raises(ValueError, match="1 graphs were not captured, first: no CUDA graph for the training step"):
        gpu_smoke.smoke(rows, torch.device("cpu"))


def swept(file: Path, kind: str = "cuda") -> None:
    rows = ResultLog("cpu", file, lambda line: None)
    times = {"": 1.0, "ROWS 1": 0.9, "ROWS 4": 1.2}
    for label, time in times.items():
        tile = {} if not label else {"ROWS": int(label[-1])}
        about = {"op": "adaln_modulate", "width": 1024, "dtype": "float32", "tile": tile, "kind": kind}
        rows.add(f"sweep adaln_modulate 1024 float32, {label}", {"anystate": time}, "ms", False, **about)
        rows.add(f"sweep qk_norm_pack, {label}", {"anystate": 0.99}, "ms", False, **about | {"op": "qk_norm_pack"})
    rows.add("limit: copy", {"torch": 1.0}, "GB/s")


def test_best_tiles_of_a_sweep(tmp_path, monkeypatch, capsys):
    """Entries are added for tiles that are faster than the launcher's defaults by more than noise; others stay."""
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps({"adaln_modulate 512 float32": {"ROWS": 2}}))
    monkeypatch.setattr(tiles, "FILE", table)
    monkeypatch.setattr(tiles.read, "__defaults__", (table,))
    monkeypatch.setattr(tiles.write, "__defaults__", (table,))
    swept(tmp_path / "gpu.jsonl")
    gpu_sweep.main(str(tmp_path / "gpu.jsonl"))
    assert json.loads(table.read_text()) == {
        "adaln_modulate 1024 float32": {"ROWS": 1},
        "adaln_modulate 512 float32": {"ROWS": 2},
    }
    assert "adaln_modulate 1024 float32: ROWS 1" in capsys.readouterr().out
    swept(tmp_path / "cpu.jsonl", kind="cpu")
    with pytest.raises(SystemExit, match="no tile is faster"):
        gpu_sweep.main(str(tmp_path / "cpu.jsonl"))
