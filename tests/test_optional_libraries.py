"""What needs no table needs no pandas: the demo installs none. What compiles nothing does not import the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT_PANDAS = """
import importlib.util
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.partition(".")[0] == "pandas" else None

    def create_module(self, spec):
        raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Blocked())
from anystate.cli import main
from anystate.configs.load import load_config

for config in ("digits", "emoji/stage1", "text_image/stage1"):
    load_config(config)
import anystate.bench.demo.demo
import anystate.bench.quality.evaluate
import anystate.sample.generate
import anystate.train.data.load

main(["train", "table/default", "--dry-run"])
"""


def test_images_and_text_need_no_pandas_and_tables_say_what_they_need():
    done = subprocess.run([sys.executable, "-c", WITHOUT_PANDAS], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == "error: tables need pandas: pip install 'anystate[table]'"


def test_sampling_with_compile_never_does_not_import_the_compiler(tmp_path):
    """That would take as long as importing PyTorch. `compile: auto` counts FLOPs, and PyTorch's counter imports it."""
    code = f"""
import sys
from anystate.cli import main
run = "{Path(__file__).parent / "old_runs/digits"}"
try:
    main(["sample", run, "--n", "1", "--steps", "1", "--out", "{tmp_path / "drawn"}"])
finally:
    print(*(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
