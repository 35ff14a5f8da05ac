"""Checkpoints that are damaged, foreign or do not fit on the disk."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from anystate.configs.runs import WEIGHTS, CheckpointError, latest
from anystate.model.storage import read_tensors
from anystate.sample.pipeline import Pipeline
from anystate.train import checkpoint
from anystate.train.trainer import Trainer


@pytest.fixture
def run(tiny, tmp_path):
    Trainer(tiny(), tmp_path / "run", quiet=True).run(stop=3)
    return tmp_path / "run"


def test_loads_ema_weights_by_default_and_raw_on_request(run):
    for weights, file in WEIGHTS.items():
        net = Pipeline.from_pretrained(run, weights).net
        saved = read_tensors(run / "step_00000003" / file)
        assert all(torch.equal(value, saved[key]) for key, value in net.state_dict().items())
    assert not torch.equal(
        Pipeline.from_pretrained(run).net.head["text"].linear.bias,
        Pipeline.from_pretrained(run, "raw").net.head["text"].linear.bias,
    )


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Pipeline.from_pretrained(tmp_path / "nothing")


def test_truncated(run):
    file = run / "step_00000003/ema.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is truncated or damaged"):
        Pipeline.from_pretrained(run)


def test_another_architecture(run):
    config = run / "step_00000003/config.yaml"
    config.write_text(config.read_text().replace("depth: 1", "depth: 2"))
    with pytest.raises(CheckpointError, match=r"another architecture: trunk\.1"):
        Pipeline.from_pretrained(run)


def test_disk_full_leaves_the_last_good_checkpoint(tiny, run, monkeypatch):
    trainer = Trainer(tiny(), run, quiet=True)
    before = {path: path.read_bytes() for path in run.rglob("step_*/**/*") if path.is_file()}
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:  # the second file no longer fits
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; the last good one is step_00000003"):
        trainer.run()
    assert {path: path.read_bytes() for path in run.rglob("step_*/**/*") if path.is_file()} == before
    assert not list(run.glob(".step_*"))


def test_an_unfinished_folder_is_not_a_checkpoint(run):
    (run / ".step_00000009.1.tmp").mkdir()
    assert latest(run).name == "step_00000003"


def test_optimizer_state_is_restored(tiny, run):
    again = Trainer(tiny(), run, quiet=True)
    saved = read_tensors(run / "step_00000003/train_state/optimizer.safetensors")
    restored = checkpoint.optimizer_tensors(again.state.optimizer)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[key], restored[key]) for key in saved)
