"""Training: resuming, kills, gradient accumulation, EMA, divergence, schedules of checkpoints and evaluations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from anystate.bench.quality.hooks import evaluate, save_galleries
from anystate.configs.runs import CheckpointError, checkpoints, latest
from anystate.model.storage import read_tensors
from anystate.sample import cuda_graphs as graphs
from anystate.sample.pipeline import build_pipeline
from anystate.train import trainer as loop
from anystate.train.step import backward, learning_rate
from anystate.train.trainer import NonFiniteLoss, Trainer


def losses(run) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss/image"], row["loss/text"], row["lr"]) for row in rows]


def test_resumed_run_has_the_losses_of_an_uninterrupted_one(tiny, tmp_path):
    Trainer(tiny(), tmp_path / "whole", quiet=True).run()
    Trainer(tiny(), tmp_path / "parts", quiet=True).run(stop=3)
    resumed = Trainer(tiny(), tmp_path / "parts", quiet=True)
    assert resumed.state.step == 3
    resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (read_tensors(tmp_path / run / "step_00000006/ema.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_output_to_a_file_shows_progress_line_by_line(tiny, tmp_path, capsys):
    Trainer(tiny(), tmp_path).run(stop=2)
    Trainer(tiny(), tmp_path).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == [f"step {step}/{2 if step <= 2 else 6}" for step in range(1, 7)]
    assert lines[-1].split(", ")[1].startswith("0:00:00 left: image ")


def test_resuming_keeps_learned_weightings(tiny, tmp_path):
    config = tiny("modalities.image.loss.weighting=learned", "modalities.text.loss.weighting=learned")
    Trainer(config, tmp_path / "whole", quiet=True).run()
    Trainer(config, tmp_path / "parts", quiet=True).run(stop=3)
    Trainer(config, tmp_path / "parts", quiet=True).run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_resuming_after_a_kill(tiny_overrides, tmp_path, call):
    """A run that is killed and resumed by the same command has the losses of an uninterrupted one."""
    overrides = [*tiny_overrides, "train.steps=60", "train.save_every=5"]
    command = ["train", "digits", *overrides, "--device", "cpu", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "anystate", *command, str(tmp_path / "killed")]
    killed = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (latest(tmp_path / "killed")) and time.time() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    step = int(latest(tmp_path / "killed").name.removeprefix("step_"))
    assert 0 < step < 60, "the run was killed too late to test anything"
    for run in ("killed", "whole"):
        assert call(*command, tmp_path / run) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".step_*"))


def test_gradient_accumulation_gives_the_same_step(tiny, tmp_path):
    whole = Trainer(tiny(), tmp_path / "a", quiet=True)
    parts = Trainer(tiny("train.gradient_accumulation_steps=4"), tmp_path / "b", quiet=True)
    first, second = whole.update(), parts.update()
    for m, value in first.items():
        torch.testing.assert_close(value, second[m], rtol=1e-5, atol=1e-6)
    for a, b in zip(whole.state.net.parameters(), parts.state.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_ema_update(tiny, tmp_path):
    trainer = Trainer(tiny("train.ema=0.5"), tmp_path, quiet=True)
    before = [p.clone() for p in trainer.state.ema.parameters()]
    trainer.state.step = 100  # the decay is smaller in the first steps
    trainer.update()
    for old, ema, new in zip(before, trainer.state.ema.parameters(), trainer.state.net.parameters(), strict=True):
        torch.testing.assert_close(ema, 0.5 * old + 0.5 * new)


def test_the_network_is_initialized_once(tiny, tmp_path, monkeypatch):
    """The EMA starts as a copy: at official size, each initialization takes 13 seconds on a CPU."""
    made = []
    monkeypatch.setattr(loop, "build_pipeline", lambda *args: made.append(build_pipeline(*args)) or made[-1])
    trainer = Trainer(tiny(), tmp_path, quiet=True)
    assert len(made) == 1
    ema, net = trainer.state.ema.state_dict(), trainer.state.net.state_dict()
    for (name, a), (_, b) in zip(ema.items(), net.items(), strict=True):
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr(), name
    assert not any(p.requires_grad for p in trainer.state.ema.parameters())
    assert all(p.requires_grad for p in trainer.state.net.parameters())


def test_cuda_graphs_of_hooks_are_freed(tiny, tmp_path):
    """CUDA graphs of the EMA network, from galleries and evaluations on a GPU, are freed before training continues."""
    trainer = Trainer(tiny("train.sample_every=1"), tmp_path, quiet=True, on_sample=lambda t: seen.append(graph(t)))
    seen = []

    def graph(trainer):
        pipeline = trainer.ema_pipeline()
        return graphs.graphs_of(pipeline.net, pipeline.space, torch.device("cuda"))

    assert not trainer.ema_pipeline().net.training
    trainer.run(stop=2)
    assert len(seen) == 2
    assert trainer.state.ema not in graphs._GRAPHS
    assert seen[0] is not seen[1]


def test_learning_rate_schedule(tiny):
    settings = tiny("train.lr=1.0", "train.warmup_steps=4", "train.steps=8", "train.lr_schedule=cosine").train
    assert [learning_rate(settings, i) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(settings, 6) == pytest.approx(0.5)
    assert learning_rate(settings, 8) == pytest.approx(0.0)


def test_a_nonfinite_loss_stops_and_keeps_the_last_checkpoint(tiny, tmp_path):
    trainer = Trainer(tiny("train.save_every=2"), tmp_path, quiet=True)
    trainer.run(stop=4)
    good = (tmp_path / "step_00000004/model.safetensors").read_bytes()
    with torch.no_grad():
        next(trainer.state.net.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"last good checkpoint is .*step_00000004"):
        trainer.run()
    assert latest(tmp_path).name == "step_00000004"
    assert (tmp_path / "step_00000004/model.safetensors").read_bytes() == good


def test_another_run_in_the_folder_is_refused(tiny, tmp_path):
    Trainer(tiny(), tmp_path, quiet=True).run(stop=3)
    with pytest.raises(CheckpointError, match="another 'seed'"):
        Trainer(tiny("seed=5"), tmp_path, quiet=True)


def test_only_the_newest_checkpoints_are_kept(tiny, tmp_path):
    Trainer(tiny("train.save_every=1", "train.keep_last=2"), tmp_path, quiet=True).run()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000005", "step_00000006"]


def test_clean_conditions_have_no_loss(tiny, tmp_path):
    """If text is always a clean condition, its head gets no gradient, but that of images does."""
    trainer = Trainer(tiny("times.condition_prob={text: 1.0}"), tmp_path, quiet=True)
    backward(trainer.state, trainer.train_data.batch(0, 0, range(16), 16), range(16))
    assert all(p.grad is None or not p.grad.any() for p in trainer.state.net.head["text"].parameters())
    assert any(p.grad.any() for p in trainer.state.net.head["image"].parameters())


def test_training_lowers_the_losses(tiny, tmp_path):
    trainer = Trainer(tiny("train.steps=80", "train.lr=5e-3", "train.batch=32"), tmp_path, quiet=True)
    trainer.run()
    rows = losses(tmp_path)
    start, end = rows[0], [sum(r[i] for r in rows[-10:]) / 10 for i in range(3)]
    assert end[1] < 0.8 * start[1]
    assert end[2] < 0.8 * start[2]


def test_galleries_evaluations_and_tensorboard_on_schedule(tiny, tmp_path):
    config = tiny("train.sample_every=3", "train.eval_every=3", "train.tensorboard=true")
    Trainer(config, tmp_path, on_sample=save_galleries, on_evaluate=evaluate, quiet=True).run()
    names = {f"{step:08d}_{case}.png" for step in (3, 6) for case in ("joint", "given_image", "given_text")}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == names
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "held_out/image" in row]
    assert [row["step"] for row in evaluated] == [3, 6]
    assert all(0.0 <= row["quality/text_to_image"] <= 1.0 for row in evaluated)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_missing_logging_package_names_the_extra(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install anystate\[log\]"):
        Trainer(tiny("train.wandb=project"), tmp_path, quiet=True).run()
