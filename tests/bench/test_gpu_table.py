"""bench/gpu_table.sh as far as it goes in a moment; its whole run is tried by hand at a tiny size."""

from __future__ import annotations

import subprocess
from pathlib import Path

import anystate

SCRIPT = Path(anystate.__file__).parent / "bench/gpu_table.sh"


def test_the_script_parses_and_its_programs_compile():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    programs = SCRIPT.read_text().split("<<'PY'\n")[1:]
    assert len(programs) == 2
    for program in programs:
        compile(program.split("\nPY\n")[0], str(SCRIPT), "exec")


def test_an_unknown_part_is_one_line(tmp_path):
    done = subprocess.run(["bash", SCRIPT, "nonsense"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "unknown part 'nonsense': default, long, paper or all\n"
