"""The command line as a user meets it: every bad input is one line and exit code 2."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_overrides, call):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert call("train", "digits", *tiny_overrides, "--out", out, "--device", "cpu") == 0
    return out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "digits", "train.stepz=3"], ["unknown key 'train.stepz'", "steps"]),
        (["train", "digits", "modalities.image.strem.width=3"], ["unknown key 'modalities.image.strem'", "stream"]),
        (["train", "digits", "train.lr=fast"], ["train.lr = 'fast'"]),
        (["train", "digits", "train.steps=-3"], ["train.steps = -3", "greater than 0"]),
        (["train", "digits", "sample.guidance.interval=[0.8, 0.2]"], ["sample.guidance", "[0.8, 0.2]"]),
        (["train", "digits", "train.steps"], ["'train.steps'", "key=value"]),
        (["train", "nowhere.yaml"], ["'nowhere.yaml' not found", "digits"]),
        (["train", "digits", "data.name=npz", "data.path=gone.npz"], ["'gone.npz' not found"]),
        (["train", "digits", "modalities.text.alphabet=ab"], ["outside the vocabulary"]),
        (["train", "digits", "modalities.text.length=4"], ["characters, the model takes 4"]),
        (["train", "digits", "modalities.image.size=12"], ["(12, 12, 1)", "(8, 8, 1)"]),
        (["train", "digits", "modalities.image.stream.patch=3"], ["patch 3 does not divide"]),
        (["train", "digits", "--device", "cuda:9"], ["cuda:9"]),
        (["sample", "nothing"], ["no checkpoint at 'nothing'"]),
        (["paint"], ["paint"]),
    ],
)
def test_bad_input(tmp_path, args, words, refused):
    out = ["--out", tmp_path / "out"] if args[0] in ("train", "sample") else []
    line = refused(*args, *out)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "-3"], ["steps must be at least 1, got -3"]),
        (["--n", "0"], ["--n must be at least 1"]),
        (["--given", "text=a seven!"], ["outside the vocabulary", "!"]),
        (["--given", "text=a seven and then another"], ["characters, the model takes"]),
        (["--given", "image=gone.png"], ["'gone.png' not found"]),
        (["--given", "sound=x"], ["no modality 'sound'", "image, text"]),
        (["--given", "text"], ["NAME=VALUE"]),
        (["--given", "text=zero", "--level", "text=1.5"], ["[0, 1]", "1.5"]),
        (["--given", "text=zero", "--level", "text=half"], ["'half' is not a number"]),
        (["--level", "text=0.5"], ["nothing of that modality is given"]),
        (["--guidance", "2", "--interval", "0.8", "0.2"], ["0.8", "0.2"]),
        (["--guidance", "2", "--final-time", "0"], ["final_time"]),
        (["--sampler", "image=tau_leap"], ["heun", "'tau_leap'"]),
        (["--weights", "best"], ["ema or raw", "'best'"]),
    ],
)
def test_bad_requests(run, tmp_path, options, words, refused):
    line = refused("sample", run, "--out", tmp_path / "s", "--device", "cpu", *options)
    for word in words:
        assert word in line
    assert not (tmp_path / "s").exists()


def test_picture_of_the_wrong_size(run, tmp_path, refused):
    Image.new("L", (9, 7)).save(tmp_path / "wide.png")
    line = refused("sample", run, "--out", tmp_path / "s", "--given", f"image={tmp_path}/wide.png")
    assert "8x8" in line
    assert "9x7" in line


def test_not_a_picture(run, tmp_path, refused):
    (tmp_path / "text.png").write_text("hello")
    line = refused("sample", run, "--out", tmp_path / "s", "--given", f"image={tmp_path}/text.png")
    assert "not a readable picture" in line


def test_truncated_checkpoint(run, tmp_path, refused):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = max(copy.glob("step_*")) / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    assert "truncated or damaged" in refused("sample", copy, "--out", tmp_path / "s")


@pytest.mark.parametrize("direction", ["joint", "text", "image", "half"])
def test_sampling_every_direction(run, tmp_path, direction, call):
    """Files are written: pictures of the right size, a caption a line, manifest, contact sheet."""
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "x.png")
    given = {
        "joint": [],
        "text": ["--given", "text=a seven", "--given", "text=zero"],
        "image": ["--given", f"image={tmp_path}/x.png", "--guidance", "2"],
        "half": ["--given", "text=a seven", "--level", "text=0.5"],
    }[direction]
    out = tmp_path / "out"
    assert call("sample", run, "--out", out, "--n", "2", "--device", "cpu", *given, "--trajectory") == 0
    n = 4 if direction == "text" else 2
    pictures = sorted((out / "image").glob("*.png"))
    assert len(pictures) == n
    assert all(Image.open(p).size == (8, 8) for p in pictures)
    captions = (out / "text.txt").read_text().split("\n")
    assert len(captions) == n + 1
    if direction == "text":
        assert captions[:4] == ["a seven", "a seven", "zero", "zero"]
    if direction == "image":
        assert np.array_equal(
            np.asarray(Image.open(pictures[0]).convert("L")), np.asarray(Image.open(tmp_path / "x.png"))
        )
    if direction != "half":
        assert "▯" not in "".join(captions), "a mask reached the user"
    assert json.loads((out / "manifest.json").read_text())["samples"] == n
    assert len(list((out / "trajectory").glob("*.png"))) == 4
    assert call("sample", run, "--out", out, "--n", "2") == 2, "existing output must not be overwritten silently"


def test_dry_run_prints_the_resolved_config(capsys, call):
    assert call("train", "digits", "train.lr=0.5", "--dry-run") == 0
    assert "lr: 0.5" in capsys.readouterr().out


def test_demo_writes_metrics_and_report(tmp_path, tiny_overrides, call):
    out = tmp_path / "demo"
    assert call("demo", "--out", out, "--device", "cpu", "--seed", "3", *tiny_overrides) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    keys = ["text_to_image", "image_to_text", "joint", "nearest_train_ratio", "seconds", "seed"]
    assert list(metrics) == keys
    assert metrics["seed"] == 3
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "<svg" in page
    for foreign in ("http://", "https://", 'src="/'):
        assert foreign not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
            "http://creativecommons.org", ""
        ).replace("https://matplotlib.org", ""), "the page must not need anything from outside"
