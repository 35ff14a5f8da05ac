"""Counted memory traffic and products of the cross-entropies."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json
from anystate.bench.speed.cross_entropy_traffic import count_rows
print(json.dumps([count_rows(), count_rows(2048, 64, 4096)]))
"""


def test_counts():
    """In a separate process without TRITON_INTERPRET, in which kernels are not launched."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    official, small = ({row["name"]: row["value"] for row in rows} for rows in json.loads(run.stdout))

    def of(way, what="memory traffic", rows=official):
        return rows[f"cross-entropy, {way}: {what}"]

    again, at_once = "ours, logits computed again", "ours, gradients in the forward pass"
    assert of(again) < 0.7 * of("ours before")
    assert of(at_once) < 0.6 * of("ours before")
    assert of(at_once) < of("plain") < of("liger")
    ways = ("ours before", again, at_once, "plain", "liger", "cce")
    assert [of(way, "products") for way in ways] == [4, 4, 3, 3, 3, 4]

    # one slice: logits written, read by the kernels and products; hidden states and weight read by two products each,
    # their gradients written in float32, read and written in bfloat16; one row of sums in 64
    logits, parts = 2 * 2048 * 4096, 2048 * 64 + 4096 * 64
    sums = 2 * 4 * 4096 * 2048 / 64
    expected = logits * (1 + 1 + 2 + 2) + parts * (2 + 2 + 4 + 4 + 2) + sums
    assert abs(of(at_once, rows=small) * 1e9 - expected) < 0.01 * expected
