"""`anystate eval` from the command line: every family, resuming, refused input; labels during training."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from anystate.bench.quality.hooks import evaluate as evaluate_in_training
from anystate.sample import pipeline as build
from anystate.train.trainer import Trainer


@pytest.fixture
def measured(call):
    """measured(run, out=folder, metrics=…) → what `anystate eval` wrote."""

    def measure(run, out, metrics="elbo,labels", n=10, **more) -> dict:
        options = [part for name, value in more.items() for part in (f"--{name}", value)]
        assert call("eval", run, "--out", out, "--metrics", metrics, "--n", n, "--device", "cpu", *options) == 0
        return json.loads((out / "results.json").read_text())

    return measure


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A digits model of six steps."""
    out = tmp_path_factory.mktemp("eval") / "run"
    Trainer(tiny(), out, "cpu", quiet=True).run()
    return out


@pytest.fixture(scope="module")
def emoji_run(tmp_path_factory, tiny, tones_overrides):
    """A model of the small data set with skin tones, evaluated during training."""
    config = tiny(*tones_overrides, "train.eval_every=3")
    out = tmp_path_factory.mktemp("emoji_run") / "run"
    Trainer(config, out, "cpu", on_evaluate=evaluate_in_training, quiet=True).run()
    return out


def test_digits(measured, run, tmp_path, capsys):
    found = measured(run, out=tmp_path / "e", json=tmp_path / "copy" / "r.json")
    assert "text_given" in capsys.readouterr().out
    assert json.loads((tmp_path / "copy" / "r.json").read_text()) == found
    assert found["settings"]["steps"] == 3
    assert found["settings"]["seed"] == 0
    assert len(found["environment"]["commit"]) >= 7
    bounds = found["results"]["elbo"]
    assert {bounds[f"text_{how}"]["unit"] for how in ("alone", "given")} == {"bits/token"}
    assert {bounds[f"image_{how}"]["unit"] for how in ("alone", "given")} == {"bits/dim"}
    untrained = math.log2(31)  # all characters and the pad, equally likely
    assert 0.3 * untrained < bounds["text_alone"]["value"] < 1.3 * untrained
    assert all(bounds[key]["error"] > 0 for key in ("image_alone", "text_alone"))
    labels = found["results"]["labels"]
    assert labels["judge on real pictures all attributes"]["value"] > 0.95
    assert 0.0 <= labels["text_to_image digit"]["value"] <= 1.0


def test_samples_are_reused_and_extended(measured, run, tmp_path, monkeypatch):
    """A second call samples nothing, a larger n only the missing batches, a damaged file only its own batch."""
    out = tmp_path / "e"
    first = measured(run, out=out, metrics="labels", n=12)
    files = sorted(out.glob("*/*.safetensors"))
    assert len(files) == 3 * 2  # batches of 8
    drawn, real = [], build.sample

    def counted(*args, **kwargs):
        drawn.append(kwargs["start_index"])
        return real(*args, **kwargs)

    monkeypatch.setattr(build, "sample", counted)
    assert measured(run, out=out, metrics="labels", n=12)["results"] == first["results"]
    assert drawn == []
    measured(run, out=out, metrics="labels", n=20)
    assert drawn == [16, 16, 16]
    drawn.clear()
    content = files[0].read_bytes()
    files[0].write_bytes(content[:100])
    assert measured(run, out=out, metrics="labels", n=12)["results"] == first["results"]
    assert drawn == [0]
    assert files[0].read_bytes() == content


def test_results_of_all_families_are_in_one_file(measured, run, tmp_path):
    measured(run, out=tmp_path, metrics="labels")
    both = measured(run, out=tmp_path, metrics="elbo")
    assert set(both["results"]) == {"labels", "elbo"}


def test_other_settings_are_refused(measured, run, tmp_path, refused):
    measured(run, out=tmp_path, metrics="labels")
    error = refused("eval", run, "--out", tmp_path, "--metrics", "labels", "--seed", "5", "--device", "cpu")
    assert "seed = 0, requested 5: choose another --out" in error


def features():
    """A small network on grey 8×8 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.conv(x / 255.0).mean((2, 3))


def test_fid_and_its_reference(measured, run, tmp_path, refused):
    """Computed from the training images and stored; then read; or computed from a folder of images."""
    mine = {"metrics": "fid", "features": f"{__name__}:features", "n": 40}
    found = measured(run, out=tmp_path / "a", reference=tmp_path / "ref.npz", **mine)["results"]["fid"]
    assert found["joint"]["reference"] == 1438
    assert found["real held-out pictures"]["value"] < 0.1 * found["joint"]["value"]
    kept = (tmp_path / "ref.npz").stat().st_mtime_ns
    again = measured(run, out=tmp_path / "b", reference=tmp_path / "ref.npz", **mine)["results"]["fid"]
    assert again == found
    assert (tmp_path / "ref.npz").stat().st_mtime_ns == kept
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "folder" / "deep" / f"{i}.png")
    other = measured(run, out=tmp_path / "c", reference=tmp_path / "folder", **mine)["results"]["fid"]
    assert other["joint"]["reference"] == 5
    (tmp_path / "empty").mkdir()
    args = ["eval", run, "--out", tmp_path / "d", "--metrics", "fid", "--features", f"{__name__}:features"]
    for reference, message in (("empty", "found 0 images"), ("gone.npy", "'%s' not found" % (tmp_path / "gone.npy"))):
        assert message in refused(*args, "--reference", tmp_path / reference, "--device", "cpu")


def test_results_on_two_ranks(measured, run, tmp_path):
    """Batches are split over the ranks, and the main one measures them: the results of a single rank."""
    torch.jit.script(features()).save(str(tmp_path / "net.pt"))
    more = {"metrics": "labels,fid", "features": tmp_path / "net.pt", "n": 20}
    one = measured(run, out=tmp_path / "one", **more)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "anystate", "eval", str(run), "--metrics", "labels,fid", "--features", str(tmp_path / "net.pt")]
    command += ["-n", "20", "--out", str(tmp_path / "two"), "--device", "cpu"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["results"] == one["results"]


def test_clip_score(measured, run, tmp_path, clip_model):
    found = measured(run, out=tmp_path, metrics="clip", clip=clip_model)["results"]["clip"]
    assert set(found) == {"joint", "text_to_image", "image_to_text", "real held-out pairs"}
    assert all(0.0 <= entry["value"] <= 100.0 for entry in found.values())


def test_labels_of_data_with_bases_and_modifiers(measured, emoji_run, tmp_path):
    labels = measured(emoji_run, out=tmp_path, metrics="labels", n=8)["results"]["labels"]
    assert labels["judge on real pictures attributes"]["value"] > 0.9
    for name in ("image_to_text exact", "image_to_text tone", "text_to_image base", "joint valid"):
        assert 0.0 <= labels[name]["value"] <= 1.0
    assert labels["text_to_image RMSE to the reference"]["value"] > 10


def test_labels_during_training(emoji_run):
    rows = [json.loads(line) for line in (emoji_run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "labels/image_to_text exact" in row]
    assert steps == [3, 6]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--metrics", "beauty"], ["'beauty'", "elbo, labels, fid, clip"]),
        (["--n", "1"], ["--n"]),
        (["--data", "nowhere"], ["'nowhere' not found", "ANYSTATE_DATA"]),
        (["--metrics", "elbo", "--repeats", "1"], ["--repeats"]),
        (["--metrics", "fid", "--features", "nothing"], ["neither inception"]),
        (["--metrics", "clip", "--clip", "/nowhere"], ["no CLIP model could be loaded"]),
        (["--weights", "best"], ["not one of 'ema', 'raw'"]),
    ],
)
def test_bad_requests(refused, run, tmp_path, options, parts):
    error = refused("eval", run, "--out", tmp_path / "e", "--device", "cpu", *options)
    for part in parts:
        assert part in error
    assert not list(tmp_path.glob("e/*/*.safetensors"))
