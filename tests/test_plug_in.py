"""A kind of one's own, in a folder that has nothing else: it trains, resumes and samples, and no file is changed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import anystate
from anystate import Pipeline

ROOT = Path(anystate.__file__).parent
FOLDERS = ("configs", "kernels", "diffusion", "model", "sample", "train", "bench")

PLUG_IN = """
import math

import numpy as np
import torch

from anystate import Codec, GaussianModality, InMemory
from anystate.model.streams import Features


class AngleCodec(Codec):
    def __init__(self, turns):
        self.turns = turns

    @property
    def is_fitted(self):
        return self.turns is not None

    def fit(self, values, seed=0):
        self.turns = float(max(values))

    def encode(self, values):
        angle = torch.tensor(values, dtype=torch.float64) / self.turns * 2 * math.pi
        return torch.stack([angle.cos(), angle.sin()], 1).float()

    def decode(self, x):
        return (torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) % 1.0 * self.turns).tolist()

    def files(self):
        return {"turns.txt": str(self.turns).encode()}


class Angle(GaussianModality):
    unit: str = "degrees"

    def build_codec(self, files):
        return AngleCodec(float(files["turns.txt"]) if files else None)

    def build_process(self, codec):
        return self.gaussian(2)

    def build_stream(self, codec):
        return Features.of(self.stream, features=2, patch=2)

    def read(self, text):
        return float(text)

    def write(self, value, path):
        path.write_text(f"{value} {self.unit}")


def compass(n=60):
    angles = np.random.default_rng(0).uniform(0, 360, n)
    side = ["north" if math.cos(a / 180 * math.pi) > 0 else "south" for a in angles]
    return InMemory({"angle": list(angles), "side": side})
"""
CONFIG = """
name: compass
data: {source: "angle_kind:compass"}
modalities:
  angle: {kind: "angle_kind:Angle", stream: {width: 16}, t_min: 0.01}
  side: {kind: label, stream: {width: 16}}
network: {depth: 1, heads: 2, head_dim: 8}
train: {steps: 3, batch: 8, save_every: 2, log_every: 1}
sample: {steps: 3}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "angle_kind.py").write_text(PLUG_IN)
    (tmp_path / "compass.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("angle_kind", None)


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "anystate", *arguments, "--device", "cpu"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def package() -> dict[str, str]:
    """{file of the package: SHA-256}."""
    files = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".yaml")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_kind_in_a_fresh_folder_trains_resumes_and_samples(folder):
    done = run("train", "compass.yaml", "train.steps=2")
    assert done.returncode == 0, done.stderr
    done = run("train", "compass.yaml")
    assert done.returncode == 0, done.stderr
    assert "resuming runs/compass at step 2" in done.stdout
    losses = [json.loads(line) for line in (folder / "runs/compass/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses] == [1, 2, 3]
    assert all(np.isfinite(row["loss/angle"]) and np.isfinite(row["loss/side"]) for row in losses)
    checkpoint = folder / "runs/compass/step_00000003"
    assert 350 < float((checkpoint / "angle.turns.txt").read_text()) <= 360
    pipeline = Pipeline.from_pretrained("runs/compass")
    assert type(pipeline.modalities["angle"]).__name__ == "Angle"
    drawn = pipeline.decode(pipeline.sample(pipeline.encode({"side": ["north"] * 4}), steps=2))
    assert len(drawn["angle"]) == 4
    assert all(0.0 <= angle <= 360.0 for angle in drawn["angle"])
    assert drawn["side"] == ["north"] * 4


def test_settings_of_the_kind_are_checked_like_any_other(folder):
    for setting, message in (
        ("modalities.angle.unti=rad", "unknown key 'modalities.angle.unti'; allowed here: kind, stream"),
        ("modalities.angle.t_min=3", "modalities.angle.t_min = 3: input should be less than 1"),
        ("modalities.angle.kind=angle_kind:Angel", "the module angle_kind has no 'Angel'"),
    ):
        done = run("train", "compass.yaml", setting)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr


def test_no_file_of_the_package_knows_the_kind():
    assert not [path for path in package() if "AngleCodec" in Path(path).read_text(encoding="utf-8")]
