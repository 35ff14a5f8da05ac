"""Text and images from raw pairs to samples, all through the command line: pack, three stages on two ranks, sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EMOJI = Path(os.environ.get("ANYSTATE_DATA", Path(__file__).parents[2] / "shared/data")) / "emoji/emoji.npz"
pytestmark = [
    pytest.mark.skipif(not EMOJI.is_file(), reason=f"needs the emoji data set ({EMOJI})"),
    pytest.mark.long,
    pytest.mark.xdist_group("text_image"),
]

TINY = [
    "modalities.image.stream={width: 16, patch: 8, single_stream_depth: 0}",
    "modalities.text.stream.width=16",
    "network={depth: 2, heads: 2, head_dim: 8}",
    "train.batch=16",
    "train.log_every=1",
    "train.steps=4",
    "train.save_every=2",
    "train.parallel=fsdp",
    "sample.steps=3",
]


def anystate(folder: Path, *arguments, ranks: int = 1) -> str:
    """Run a command; returns its output, and fails the test if the command fails."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "anystate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode == 0, errors or result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A folder with data/emoji packed from a slice of emoji."""
    folder = tmp_path_factory.mktemp("emoji")
    with np.load(EMOJI) as arrays:
        train, test = (np.flatnonzero(arrays["split"] == split) for split in ("train", "test"))
        kept = np.r_[train[::30], test[::15]]
        np.savez(folder / "slice.npz", **{name: arrays[name][kept] for name in arrays.files})
    anystate(
        folder, "data", "pack", "slice.npz", "--out", "data/emoji", "--text", "bpe", "--states", 512, "--length", 20
    )
    return folder


@pytest.fixture(scope="module")
def trained(packed) -> Path:
    """Three stages of a few steps; the last one is interrupted after two steps on two ranks and resumed on one."""
    for stage in (1, 2):
        output = anystate(packed, "train", f"emoji/stage{stage}", *TINY, "--device", "cpu", ranks=2)
    assert "new: head.text, tower.text, tower_norm.text" in output
    anystate(packed, "train", "emoji/stage3", *TINY, "train.steps=2", "--device", "cpu", ranks=2)
    assert "at step 2" in anystate(packed, "train", "emoji/stage3", *TINY, "--device", "cpu")
    return packed


def test_every_stage_logged_finite_losses(trained):
    for stage, learned in ((1, {"loss/image"}), (2, {"loss/image", "loss/text"}), (3, {"loss/image", "loss/text"})):
        rows = [
            json.loads(line) for line in (trained / f"runs/emoji_stage{stage}/metrics.jsonl").read_text().splitlines()
        ]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        for row in rows:
            assert {name for name in row if name.startswith("loss/")} == learned
            assert all(np.isfinite(row[name]) for name in learned)


WAYS = {
    "joint": ["-n", 6],
    "text_to_image": ["--condition", "text=grinning face", "--condition", "text=red heart", "-n", 3],
    "data_image_to_text": ["--data", "data/emoji", "--condition", "image", "--limit", 6],
    "half_noised_image": ["--data", "data/emoji", "--condition", "image", "--limit", 6, "--noise-level", "image=0.5"],
}


@pytest.mark.parametrize("way", WAYS)
def test_samples_do_not_depend_on_the_number_of_ranks(trained, way):
    """Sampling in every direction writes images, captions, sheet and manifest, the same for any number of ranks."""
    settings = ["--batch-size", 2, "--seed", 3, "--device", "cpu"]
    anystate(trained, "sample", "runs/emoji_stage3", *WAYS[way], "--out", f"two/{way}", *settings, ranks=2)
    two = trained / "two" / way
    manifest = json.loads((two / "manifest.json").read_text())
    assert manifest["samples"] == 6
    assert manifest["complete"]
    images = sorted((two / "image").glob("*.png"))
    assert len(images) == 6
    assert (two / "sheet.png").is_file()
    assert len((two / "text.txt").read_text().splitlines()) == 6
    if way == "joint":
        anystate(trained, "sample", "runs/emoji_stage3", *WAYS[way], "--out", f"one/{way}", *settings)
        one = trained / "one" / way
        assert (one / "text.txt").read_text() == (two / "text.txt").read_text()
        for path in images:
            assert path.read_bytes() == (one / "image" / path.name).read_bytes()
        output = anystate(trained, "sample", "runs/emoji_stage3", *WAYS[way], "--out", f"two/{way}", *settings)
        assert "sheet.png" in output  # nothing left to do, nothing overwritten


class Colours(torch.nn.Module):
    """FID's network here: mean colours of 64 patches of uint8 images."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x.float() / 255.0, 16).flatten(1)


def test_all_families_of_metrics(trained):
    """Bounds, labels and FID (with a network of our own in place of Inception), as one JSON file."""
    torch.jit.script(Colours()).save(trained / "features.pt")
    metrics = ["--metrics", "elbo,labels,fid", "--features", "features.pt", "--repeats", 2, "--steps", 2, "-n", 24]
    anystate(trained, "eval", "runs/emoji_stage3", *metrics, "--json", "eval.json", "--device", "cpu")
    results = json.loads((trained / "eval.json").read_text())
    found = results["results"]
    bits = found["elbo"]["text_alone"]
    assert abs(bits["value"] - np.log2(512)) < 5 * bits["error"] + 0.2  # hardly trained: about uniform
    assert found["fid"]["real held-out pictures"]["value"] < found["fid"]["joint"]["value"]
    assert 0.0 < found["labels"]["judge on real pictures attributes"]["value"] <= 1.0
