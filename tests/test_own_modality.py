"""`docs/examples/own_modality.py` in a fresh folder, with the package installed from a built wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anystate

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("own_modality")]
ROOT = Path(anystate.__file__).parent
EXAMPLE = ROOT / "docs" / "examples" / "own_modality.py"
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", ".gpu", "runs", "tests", "build", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", str(folder / "source"), *options, "-w", str(folder)], check=True)
    (wheel,) = folder.glob("anystate-*.whl")
    subprocess.run([*pip, "install", str(wheel), *options, "--target", str(folder / "site")], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def trained(site, tmp_path_factory):
    """The folder of the example after its run: 200 steps instead of 2,000."""
    folder = tmp_path_factory.mktemp("stranger")
    shutil.copy(EXAMPLE, folder)
    return folder, run(folder, site, "own_modality.py", "200").stdout


def run(folder: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )


def test_the_example_is_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 120


def test_it_uses_the_installed_package(site, trained):
    place = run(trained[0], site, "-c", "import anystate; print(anystate.__file__)").stdout.strip()
    assert Path(place).parent == site / "anystate"


def test_it_trains_and_samples_every_direction(trained):
    folder, out = trained
    assert (folder / "runs" / "own_modality" / "step_00000200" / "wave.limit.json").is_file()
    for words in ("of its wave", "of this text", "all at once"):
        assert words in out


def test_it_is_evaluated_from_the_command_line(site, trained):
    folder, _ = trained
    options = ["--metrics", "agreement", "-n", "64", "--steps", "5", "--json", "results.json"]
    run(folder, site, "-m", "anystate", "eval", "runs/own_modality", *options)
    values = json.loads((folder / "results.json").read_text())["results"]["agreement"]
    # the form of a real wave is easy to see; after 200 steps (0.55 at seed 0) the model is above chance, a quarter
    assert values["classifier on real wave: form"]["value"] > 0.9
    assert values["form given wave"]["value"] > values["majority: form"]["value"] + 0.15


def test_samples_from_the_command_line(site, trained):
    folder, _ = trained
    options = ["-n", "3", "--condition", "text=a slow sine", "--steps", "5", "-o", "samples"]
    run(folder, site, "-m", "anystate", "sample", "runs/own_modality", *options)
    assert len(list((folder / "samples" / "wave").iterdir())) == 3
    assert (folder / "samples" / "form.txt").read_text().count("\n") == 3
