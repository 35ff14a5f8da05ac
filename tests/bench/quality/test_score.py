"""`anystate score`: folders of images against the closed form, and refused input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from torch import nn

from anystate.bench.quality.frechet import frechet, moments
from anystate.bench.quality.image_folder import ImageFolder


class Corner(nn.Module):
    """The colour of the first pixel: features that a test can choose."""

    def forward(self, x):
        return x[:, :, 0, 0].double()


def corner():
    return Corner()


FEATURES = ("--features", f"{__name__}:corner", "--device", "cpu")


def folder(path, n, seed, size=6):
    """Write n random images into `path`; returns the colours of their first pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        file = path / ("deep" if i % 2 else ".") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return pixels[:, 0, 0]


def test_distance_of_two_folders_is_the_closed_form(call, tmp_path, capsys):
    """More images than a batch of the network; then against the stored statistics of one folder."""
    ours, real = folder(tmp_path / "ours", 90, 0), folder(tmp_path / "real", 70, 1)
    truth = frechet(*moments(ours), *moments(real))
    assert call("score", tmp_path / "real", "--save", tmp_path / "real.npz", *FEATURES) == 0
    for reference in ("real", "real.npz"):
        out = tmp_path / "scores" / f"{reference}.json"
        assert call("score", tmp_path / "ours", "--reference", tmp_path / reference, "--json", out, *FEATURES) == 0
        assert f"{truth:.4f}" in capsys.readouterr().out
        fid = json.loads(out.read_text())["fid"]
        assert fid == {"value": pytest.approx(truth, rel=1e-9), "samples": 90, "reference": 70}


def test_captions_of_any_images_and_of_our_own_samples(call, clip_model, tmp_path):
    """A folder of `anystate sample` contains its captions."""
    folder(tmp_path / "samples" / "image", 5, 2)
    lines = "".join(f"a {i}\n" for i in range(5))
    (tmp_path / "samples" / "text.txt").write_text(lines)
    (tmp_path / "lines.txt").write_text(lines)
    more = ("--clip", clip_model, "--device", "cpu", "--json")
    captions = ("--captions", tmp_path / "lines.txt")
    assert call("score", tmp_path / "samples" / "image", *captions, *more, tmp_path / "a.json") == 0
    (tmp_path / "samples" / "manifest.json").write_text("{}")
    assert call("score", tmp_path / "samples", *more, tmp_path / "b.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["clip"]["samples"] == 5
    assert json.loads((tmp_path / "b.json").read_text()) == found


def test_folders_of_samples_of_other_mixes(call, refused, tmp_path):
    """Classes beside the images are no captions; of several images one has to be named."""
    folder(tmp_path / "samples" / "image", 5, 2)
    (tmp_path / "samples" / "label.txt").write_text("a\n" * 5)
    (tmp_path / "samples" / "manifest.json").write_text(json.dumps({"pictures": ["image"], "captions": []}))
    assert "nothing to measure" in refused("score", tmp_path / "samples", *FEATURES)
    out = tmp_path / "a.json"
    assert call("score", tmp_path / "samples", "--reference", tmp_path / "samples", "--json", out, *FEATURES) == 0
    assert set(json.loads(out.read_text())) == {"fid"}
    folder(tmp_path / "samples" / "depth", 5, 2)
    error = refused("score", tmp_path / "samples", "--save", tmp_path / "x.npz", *FEATURES)
    assert "name one of its folders depth, image" in error


def test_images_of_several_sizes(call, refused, tmp_path):
    folder(tmp_path / "mixed", 4, 3)
    Image.new("L", (9, 7), 128).save(tmp_path / "mixed" / "wide.png")
    assert "wide.png is 9×7, others are 6×6" in refused(
        "score", tmp_path / "mixed", "--save", tmp_path / "x.npz", *FEATURES
    )
    assert call("score", tmp_path / "mixed", "--save", tmp_path / "x.npz", "--size", 6, *FEATURES) == 0
    assert ImageFolder(tmp_path / "mixed", (5, 4, 1))[1:4].shape == (3, 5, 4, 1)


def test_refused_input(refused, tmp_path):
    folder(tmp_path / "ours", 3, 4)
    args = ("score", tmp_path / "ours", *FEATURES)
    assert "nothing to measure" in refused(*args)
    assert "not found" in refused("score", tmp_path / "gone", "--save", tmp_path / "x.npz", *FEATURES)
    assert ".npz" in refused(*args, "--save", tmp_path / "x.json")
    assert "--size" in refused(*args, "--save", tmp_path / "x.npz", "--size", 0)
    assert "not found" in refused(*args, "--reference", tmp_path / "gone.npz")
    (tmp_path / "two.txt").write_text("a\nb\n")
    assert "2 lines for 3 images" in refused(*args, "--captions", tmp_path / "two.txt")
    assert "not found" in refused(*args, "--captions", tmp_path / "none.txt")
    (tmp_path / "ours" / "torn.png").write_bytes(b"\x89PNG")
    assert "torn.png is not a readable image" in refused(*args, "--save", tmp_path / "x.npz")
