"""Several ranks: the same losses as one, sharded checkpoints read by any number of them. Ranks are gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from anystate.model import distributed, float8
from anystate.model.storage import read_tensors
from anystate.train.trainer import Trainer

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EXTRA = ["network.depth=2", "train.gradient_accumulation_steps=2", "modalities.text.loss.weighting=learned"]


def train(overrides, out, ranks: int = 1, program=("-m", "anystate")) -> subprocess.CompletedProcess:
    """`anystate train digits` on so many ranks."""
    launch = LAUNCH if ranks == 2 else [sys.executable]
    command = [*launch, *program, "train", "digits", *overrides, "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def rows(run) -> torch.Tensor:
    """(steps, 4): step, the losses and the gradient's norm."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[r["step"], r["loss/image"], r["loss/text"], r["grad_norm"]] for r in lines])


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """A run on a single rank."""
    out = tmp_path_factory.mktemp("one")
    Trainer(tiny(*EXTRA), out, "cpu", quiet=True).run()
    return out


def same_losses(run, other):
    torch.testing.assert_close(rows(run), rows(other), rtol=1e-4, atol=1e-6)


def test_two_ranks_have_the_losses_of_one(one, tiny_overrides, tmp_path):
    result = train([*tiny_overrides, *EXTRA], tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    same_losses(tmp_path, one)
    assert result.stdout.count("fresh weights") == 1  # only the main rank prints


SIGNAL_ON_RANK_1 = """
import os, signal
from anystate import cli
from anystate.train import step

calls, update = [], step.update_ema

def update_ema(state):
    calls.append(0)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    update(state)

step.update_ema = update_ema
cli.main()
"""


def test_interrupted_sharded_run_with_activation_checkpointing_resumes_on_one_rank(one, tiny_overrides, tmp_path):
    """FSDP2 with activation checkpointing for half of the run, the other half on a single rank.

    Only one rank gets the signal, in step 2; both learn of it in step 3 and save that.
    """
    settings = [*tiny_overrides, *EXTRA, "train.parallel=fsdp", "train.activation_checkpointing=true"]
    script = tmp_path / "interrupted.py"
    script.write_text(SIGNAL_ON_RANK_1)
    result = train([*settings, "train.save_every=6"], tmp_path, ranks=2, program=[str(script)])
    assert result.returncode != 0
    assert "exitcode  : 143" in result.stderr  # torchrun ends the slower rank itself while it exits
    assert "\ninterrupted at step 3; run the same command again to resume\n" in "\n" + result.stderr
    assert result.stderr.count("interrupted at step") == 1
    shards = tmp_path / "step_00000003/train_state/sharded"
    assert len(list(shards.glob("*.safetensors"))) == 2
    assert not list((tmp_path / "step_00000003/train_state").glob("optimizer*"))
    result = train(settings, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "at step 3" in result.stdout
    same_losses(tmp_path, one)


def test_a_run_of_one_rank_resumes_on_two(one, tiny, tiny_overrides, tmp_path):
    Trainer(tiny(*EXTRA), tmp_path, "cpu", quiet=True).run(stop=3)
    assert train([*tiny_overrides, *EXTRA], tmp_path, ranks=2).returncode == 0
    same_losses(tmp_path, one)


def test_errors_of_impossible_settings(tiny, tiny_overrides, tmp_path):
    result = train([*tiny_overrides, "train.batch=15"], tmp_path / "odd", ranks=2)
    assert result.returncode != 0
    error = "error: train.gradient_accumulation_steps = 1 times 2 ranks does not divide train.batch = 15"
    assert error in result.stderr
    Trainer(tiny(), tmp_path / "plain", "cpu", quiet=True).run(stop=3)
    result = train([*tiny_overrides, "train.parallel=fsdp"], tmp_path / "plain", ranks=2)
    assert result.returncode != 0
    assert "was not saved with train.parallel=fsdp" in result.stderr


def test_rows_are_divided_over_ranks_in_order(monkeypatch):
    for n in (1, 7, 64):
        for world in (1, 2, 3, 8):
            monkeypatch.setattr(distributed, "world", lambda world=world: world)
            covered = []
            for rank in range(world):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                covered += distributed.share(n)
            assert covered == list(range(n))


def test_activation_checkpointing_gives_the_same_weights(tiny, tmp_path):
    runs = []
    for setting in ("true", "false"):
        config = tiny(f"train.activation_checkpointing={setting}")
        runs.append(Trainer(config, tmp_path / setting, "cpu", quiet=True))
        runs[-1].run(stop=2)
    first, second = (read_tensors(t.save() / "model.safetensors") for t in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.long
def test_fp8_on_two_ranks_with_sharded_weights(tiny_overrides, tmp_path, monkeypatch):
    """Emulated. Scales are those of a rank's rows, and weights are gathered in bf16, so losses agree within 1%."""
    monkeypatch.setenv(float8.EMULATE, "1")
    settings = [*tiny_overrides, *(f"modalities.{m}.stream.width=640" for m in ("image", "text"))]
    settings += ["modalities.text.stream.single_stream_depth=0", "train.batch=32", "train.steps=2"]
    settings += ["train.precision=fp8"]
    for out, ranks, parallel in (("one", 1, "ddp"), ("two", 2, "fsdp")):
        result = train([*settings, f"train.parallel={parallel}"], tmp_path / out, ranks)
        assert result.returncode == 0, result.stderr
    torch.testing.assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=0.01, atol=0)
