"""Ctrl-C and SIGTERM: the step is finished and saved, one line is printed, and the run resumes bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch

from anystate import TableSynthesizer
from anystate.configs.interruption import Interrupted
from anystate.configs.runs import checkpoints
from anystate.model.storage import read_tensors
from anystate.train import trainer as loop
from anystate.train.trainer import Trainer

SMALL = ["network.width=16", "network.depth=1", "network.heads=2", "train.batch=32", "compile=never"]


def tensors(folder) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, EMA, weighting, optimizer."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.name} {key}": x for file in files for key, x in read_tensors(file).items()}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The last checkpoint of a run without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    Trainer(tiny(), out, "cpu", quiet=True).run()
    return out / "step_00000006"


def raising(function, number: int, times: int = 1):
    """The function, in whose second call the process gets a signal."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            for _ in range(times):
                signal.raise_signal(number)
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["update_ema", "clip_and_step", "save_checkpoint", "hook"])
def test_the_step_is_finished_and_saved_whenever_the_signal_comes(tiny, tmp_path, whole, monkeypatch, number, moment):
    """In a step before or after the optimizer, while a checkpoint is written, and in an evaluation, which is cut short:
    weights, EMA and the optimizer's state after resuming are those of a run without an interruption."""
    hooks, expected = {}, {"save_checkpoint": 6}.get(moment, 2)
    reached = []

    def evaluate(_trainer):
        signal.raise_signal(number)
        reached.append(True)

    if moment == "hook":
        hooks, config = {"on_evaluate": evaluate}, tiny("train.eval_every=2")
    else:
        config = tiny()
        module = loop if moment == "save_checkpoint" else sys.modules["anystate.train.step"]
        monkeypatch.setattr(module, moment, raising(getattr(module, moment), number))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"^interrupted at step {expected}; run the same command again to resume$"):
        Trainer(config, tmp_path, "cpu", quiet=True, **hooks).run()
    assert signal.getsignal(number) is before
    assert not reached
    assert checkpoints(tmp_path)[-1].name == f"step_{expected:08d}"
    monkeypatch.undo()
    resumed = Trainer(config, tmp_path, "cpu", quiet=True)
    assert resumed.state.step == expected
    resumed.run()
    there, here = tensors(whole), tensors(tmp_path / whole.name)
    assert there.keys() == here.keys()
    assert all(torch.equal(there[key], here[key]) for key in there)


def test_a_second_signal_ends_at_once(tiny, tmp_path, monkeypatch):
    step = sys.modules["anystate.train.step"]
    monkeypatch.setattr(step, "update_ema", raising(step.update_ema, signal.SIGINT, times=2))
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny(), tmp_path, "cpu", quiet=True).run()
    assert not checkpoints(tmp_path)


def test_a_fit_without_a_folder_says_that_nothing_is_kept(monkeypatch):
    step = sys.modules["anystate.train.step"]
    monkeypatch.setattr(step, "update_ema", raising(step.update_ema, signal.SIGINT))
    table = pd.DataFrame({"a": ["x", "y"] * 20, "b": range(40)})
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted at step 2; to be able to resume, give out=FOLDER$"):
        TableSynthesizer(overrides=SMALL, device="cpu").fit(table)


@pytest.fixture
def command(tmp_path):
    """A training of a table that ends by a signal alone."""
    pd.DataFrame({"a": ["x", "y"] * 20, "b": range(40)}).to_csv(tmp_path / "in.csv", index=False)
    settings = [*SMALL, "train.steps=1000000", "train.log_every=1"]
    return ["table", "fit", str(tmp_path / "in.csv"), *settings, "--device", "cpu", "--out", str(tmp_path / "run")]


def test_ctrl_c_of_a_command(command, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "anystate", *command], env=environment, **pipes)
    next(line for line in process.stdout if line.startswith("step 3"))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    (checkpoint,) = checkpoints(tmp_path / "run")
    step = int(checkpoint.name.removeprefix("step_"))
    line = f"interrupted at step {step}; run the same command again to resume\n"
    assert (process.returncode, error) == (130, line)


def test_sigterm_of_a_command(command, call, monkeypatch, capsys):
    step = sys.modules["anystate.train.step"]
    monkeypatch.setattr(step, "update_ema", raising(step.update_ema, signal.SIGTERM))
    assert call(*command) == 143
    assert capsys.readouterr().err == "interrupted at step 2; run the same command again to resume\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sample", "RUN"], "interrupted; run the same command again to resume"),
        (["table", "sample", "RUN"], "interrupted"),
    ],
)
def test_other_commands_say_whether_they_resume(arguments, line, call, monkeypatch, capsys):
    def interrupted(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("anystate.configs.runs.resolve", interrupted)
    assert call(*arguments) == 143
    assert capsys.readouterr().err == line + "\n"
