"""`anystate bench counts`: the counts themselves, on graphs whose kernels are known, and the goals of the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import anystate
from anystate.bench.speed import counts

FILE = Path(anystate.__file__).parent / "bench/results/counts.json"
NO_TOWERS = ["modalities.image.stream.tower=0", "modalities.text.stream.tower=0"]

KNOWN = """
import json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from anystate import kernels
from anystate.bench.speed.cuda_lowering import Lowering, compiled_by, lowered
from anystate.bench.speed.h100 import as_on_h100
from anystate.bench.speed.table_counts import StagedLaunches

def chain(x, w):
    return torch.nn.functional.gelu(x @ w) * 2 + 1

def gate(x, branch, gate):
    return kernels.gated_residual(x, branch, gate)

with FakeTensorMode(allow_non_fake_inputs=True):
    x, w = torch.zeros(512, 1024), torch.zeros(1024, 256)
    branch, g = torch.zeros(2, 512, 1024), torch.zeros(2, 1024)
    graphs = lowered(chain, x, w), lowered(gate, branch, branch, g.requires_grad_())

launches = StagedLaunches(lowering := Lowering())
with as_on_h100(), compiled_by(lowering):
    compiled = launches.in_stage("compiled", torch.compile(chain))
    eager = launches.in_stage("eager", lambda: torch._foreach_add(200 * [torch.zeros(3)], 1.0))
    for _ in range(2):
        with launches.counted():
            compiled(torch.zeros(8, 8), torch.zeros(8, 8)), eager()
            torch.zeros(3).view(3, 1)
stages = dict(launches.by_stage)

listed = [[[g.backward, g.launches, [k[1:] for k in g.kernels]] for g in found] for found in graphs]
print(json.dumps([*listed, stages]))
"""
JOINT = f"""
import json
from anystate.bench.speed import counts
print(json.dumps(counts.block_rows(counts.block_graphs(settings={NO_TOWERS!r}))))
"""


def python(source: str):
    """What a program prints as JSON; without the interpreter, which launches no kernels."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ANYSTATE_BACKEND")}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def committed() -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(FILE.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.long
def test_graphs_with_known_kernels():
    (chain,), (forward, backward), stages = python(KNOWN)
    product, out = 4 * (512 * 1024 + 1024 * 256 + 512 * 256), 4 * 512 * 256
    assert chain == [False, 2, [["product", product, 1], ["fused", 2 * out, 1]]]
    rows, vectors = 4 * 2 * 512 * 1024, 4 * 2 * 1024
    assert forward[2] == [["operation", 2 * rows + vectors, 1]]  # x and the branch are one tensor
    assert backward[0]
    ((moved, launches),) = [kernel[1:] for kernel in backward[2] if kernel[0] == "operation"]
    assert moved > 3 * rows
    assert launches >= 2  # its kernel, and the sum over its runs
    assert backward[1] >= launches
    # 200 tensors of a list and of the result are launched by 64, and torch.zeros is a launch
    assert stages == {"compiled": 2, "eager": 1 + 4, "EMA and the rest": 1 + 2}


@pytest.mark.long
def test_joint_block_moves_a_quarter_less_than_before():
    rows = {row["name"]: row["value"] for row in python(JOINT)}
    before = committed()["joint block: memory traffic"]["before"]
    assert 20 < before < 22  # GPU_REVIEW.md: 21.2 GB
    assert rows["joint block: memory traffic"] <= 0.75 * before
    parts = [rows[f"joint block, {part}: memory traffic"] for part in ("forward", "backward")]
    assert rows["joint block: memory traffic"] == pytest.approx(sum(parts))
    assert rows["joint block: kernels"] < committed()["joint block: kernels"]["before"]


def test_no_launch_outside_of_the_graph():
    values = {row["name"].split(": ")[1]: row["value"] for row in counts.sampling_rows(n=2, steps=3)}
    assert values["launches outside of the graph"] == 0
    assert values["launches beside the network"] > 0


def test_committed_counts_meet_the_goals():
    """The table's step is counted anew by `make test-long` (tests/train/test_graph_step.py)."""
    rows = committed()
    assert rows["joint block: memory traffic"]["value"] <= 0.75 * rows["joint block: memory traffic"]["before"]
    assert rows["table step: kernels, all"]["value"] <= 260
    assert not any(row["value"] for name, row in rows.items() if "outside of the graph" in name)


def test_before_is_merged(tmp_path):
    rows = [counts.row("a", 1.0, "GB"), counts.row("b", 2.0, "GB")]
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"commit": "x", "versions": {}, "rows": [counts.row("a", 3.0, "GB")]}))
    merged = counts.with_before(rows, counts.read_counts(file)["rows"])
    assert [row["before"] for row in merged] == [3.0, None]
    file.write_text("[]")
    with pytest.raises(ValueError, match="was not written by anystate bench counts"):
        counts.read_counts(file)
