"""Every kernel builds for GPUs of three generations, without spilling a register."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
from anystate.bench.compile_only import table
print(json.dumps(table(targets=({target},))))
"""


@pytest.mark.parametrize("target", [80, 90, 100])
def test_no_spills(target):
    """In a process of its own: where kernels are interpreted there is nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(target=target)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    assert len(rows) >= 20
    assert all(row[2] == f"sm_{target}" and 0 < row[3] <= 255 for row in rows)
    spilling = [row for row in rows if row[5]]
    assert not spilling, spilling
