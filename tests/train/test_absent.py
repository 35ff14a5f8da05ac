"""Three modalities, one of them absent in part of the data: exact resume, ranks, and losses of what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from anystate import InMemory, Pipeline, Trainer, parse_config
from anystate.configs.runs import CheckpointError
from anystate.model.storage import read_tensors
from anystate.train.step import backward, expected_share

DATA = """
import numpy as np

from anystate import InMemory


def examples(absent="numbers", share=0.4, n=80):
    rng = np.random.default_rng(3)
    kinds = rng.integers(0, 3, n)
    values = {
        "wave": [np.sin(np.arange(8) * (k + 1)) + 0.1 * rng.normal(size=8) for k in kinds],
        "numbers": [rng.normal(size=3) + k for k in kinds],
        "label": [("low", "middle", "high")[k] for k in kinds],
    }
    if absent:
        values[absent] = [None if rng.random() < share else value for value in values[absent]]
    return InMemory(values)
"""
CONFIG = {
    "name": "three",
    "data": {"source": "three_data:examples"},
    "modalities": {
        "wave": {"kind": "series", "length": 8, "stream": {"width": 16, "patch": 4}, "loss": {"weighting": "learned"}},
        "numbers": {"kind": "vector", "size": 3, "stream": {"width": 16}},
        "label": {"kind": "label", "stream": {"width": 16}, "loss_on": "masked", "loss": {"weighting": "elbo"}},
    },
    "network": {"depth": 1, "heads": 2, "head_dim": 8},
    "times": {"condition_prob": {"wave+label": 0.2}, "subset_prob": 0.4},
    "train": {
        "steps": 6,
        "batch": 16,
        "gradient_accumulation_steps": 2,
        "lr": 1e-2,
        "save_every": 3,
        "log_every": 1,
        "precision": "fp32",
    },
    "sample": {"steps": 3},
}
NAMES = ("wave", "numbers", "label")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with the data and the config of three modalities."""
    (tmp_path / "three_data.py").write_text(DATA)
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("three_data", None)


def config_of(*overrides: tuple[str, object]):
    """The config with other values of some settings, {path: value}."""
    raw = json.loads(json.dumps(CONFIG))
    for path, value in overrides:
        *sections, last = path.split(".")
        inner = raw
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return parse_config(raw, "three")


def train(config, out: str, stop: int | None = None) -> Trainer:
    trainer = Trainer(config, Path(out), "cpu", quiet=True)
    trainer.run(stop)
    return trainer


def rows(run) -> list[list[float]]:
    """(steps, …): step, the losses and the gradient's norm."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [[r["step"], *(r[f"loss/{m}"] for m in NAMES), r["grad_norm"]] for r in lines]


def same_weights(a, b, last: str = "step_00000006") -> None:
    for file in ("model", "ema", "train_state/weighting", "train_state/optimizer"):
        first, second = (read_tensors(Path(run) / last / f"{file}.safetensors") for run in (a, b))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), file


# Resume and ranks


@pytest.mark.parametrize("absent", ["numbers", "label"])
def test_resuming_is_exact(folder, absent):
    """Losses, weights and optimizer are those of an uninterrupted run, bit for bit."""
    config = config_of(("data.options", {"absent": absent}))
    whole = train(config, "whole")
    assert 0 < whole.train_data.present_share[absent] < 1
    assert set(whole.train_data.present) == {absent}
    train(config, "parts", stop=3)
    resumed = Trainer(config, Path("parts"), "cpu", quiet=True)
    assert resumed.state.step == 3
    resumed.run()
    assert rows("parts") == rows("whole")
    same_weights("whole", "parts")


def anystate(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks == 2 else []
    command = [sys.executable, *launch, "-m", "anystate", "train", "three.yaml", *arguments, "--device", "cpu"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_two_ranks_have_the_losses_of_one(folder):
    train(config_of(), "one")
    anystate("--out", "two", ranks=2)
    torch.testing.assert_close(torch.tensor(rows("two")), torch.tensor(rows("one")), rtol=1e-4, atol=1e-6)


def test_two_sharded_ranks_have_the_losses_of_one_and_resume_on_one(folder):
    train(config_of(), "one")
    anystate("train.parallel=fsdp", "train.steps=3", "--out", "two", ranks=2)
    assert len(list(Path("two/step_00000003/train_state/sharded").glob("*.safetensors"))) == 2
    assert "at step 3" in anystate("train.parallel=fsdp", "--out", "two").stdout
    torch.testing.assert_close(torch.tensor(rows("two")), torch.tensor(rows("one")), rtol=1e-4, atol=1e-6)


def test_a_run_on_other_data_is_refused(folder):
    train(config_of(), "run", stop=3)
    module = folder / "three_data.py"
    module.write_text(DATA.replace("size=3) + k", "size=3) + 2 * k"))
    sys.modules.pop("three_data")
    with pytest.raises(CheckpointError, match=r"run holds a run on other data \(its numbers differs\)"):
        Trainer(config_of(), Path("run"), "cpu", quiet=True)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("numbers.statistics.json", None, "lacks a file of a codec: numbers: its codec is not fitted"),
        ("label.classes.json", None, "lacks a file of a codec: label: its codec is not fitted"),
        ("label.classes.json", '["hi', "label: classes.json is truncated or damaged"),
        ("label.classes.json", "{}", "label: classes.json is truncated or damaged"),
        ("wave.statistics.json", "", "wave: statistics.json is truncated or damaged"),
        ("numbers.statistics.json", '{"mean": [0, 1], "std": [1, 1]}', r"numbers: statistics.json does not fit values"),
    ],
)
def test_files_of_codecs_that_are_missing_or_damaged(folder, file, content, message):
    train(config_of(), "run", stop=1).save()
    path = Path("run/step_00000001") / file
    assert path.is_file()
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Pipeline.from_pretrained("run")
    assert "\n" not in str(error.value)


# What is absent


def gradients(trainer: Trainer, x0: dict, n: int) -> tuple[dict, list[torch.Tensor]]:
    """Losses and gradients of a batch."""
    trainer.state.optimizer.zero_grad()
    losses = backward(trainer.state, dict(x0), range(n))
    return losses, [p.grad.clone() for p in trainer.state.parameters if p.grad is not None]


@pytest.mark.parametrize("value", [5.0, float("nan")])
@pytest.mark.parametrize("absent", NAMES)
def test_values_of_what_is_absent_change_nothing(folder, absent, value):
    """Whatever stands in place of an absent value, losses and gradients are the same, bit for bit."""
    trainer = train(config_of(("data.options", {"absent": absent})), "run", stop=3)
    x0 = trainer.train_data.batch(0, 0, range(16), 16)
    has = x0[f"{absent}:present"]
    assert 0 < has.sum() < 16
    losses, grads = gradients(trainer, x0, 16)
    other = x0[absent].clone()
    other[~has] = value if other.is_floating_point() else 2
    again, same = gradients(trainer, {**x0, absent: other}, 16)
    assert again.keys() == losses.keys() == set(NAMES)
    assert all(torch.equal(again[m], losses[m]) for m in losses)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    other[has] += 1 if not other.is_floating_point() and int(other[has].max()) < 2 else -other[has]
    changed, _ = gradients(trainer, {**x0, absent: other}, 16)
    assert not torch.equal(changed[absent], losses[absent])


def test_what_is_absent_is_pure_noise_without_a_loss(folder):
    """The network sees time 1 and noise there; it is never a condition, and adds nothing to the loss."""
    trainer = Trainer(config_of(("times", {"condition_prob": {"numbers": 0.5}})), Path("run"), "cpu", quiet=True)
    state, seen = trainer.state, []
    state.module.register_forward_pre_hook(lambda module, args: seen.append(args))
    x0 = trainer.train_data.batch(0, 0, range(16), 16)
    has = x0["numbers:present"]
    backward(state, dict(x0), range(16))
    _, t, loss_mask, *_ = seen[0]
    assert bool((t["numbers"][~has] == 1.0).all())
    assert bool((loss_mask["numbers"][~has] == 0).all())
    assert bool((t["numbers"][has] < 1.0).all())
    conditions = has & (loss_mask["numbers"] == 0)
    assert bool((t["numbers"][conditions] == trainer.pipeline.space["numbers"].t_min).all())
    assert 0 < conditions.sum() < has.sum()


def test_logged_losses_are_means_over_what_is_there(folder):
    """A batch of the whole data: the mean loss of a modality over the examples that have it, exactly."""
    n = 64
    config = config_of(("times", {}), ("train.batch", n), ("train.gradient_accumulation_steps", 1))
    trainer = Trainer(config, Path("run"), "cpu", quiet=True)
    assert len(trainer.train_data) == n
    state, seen = trainer.state, []
    state.module.register_forward_hook(lambda module, args, out: seen.append((args[2], out[1])))
    x0 = trainer.train_data.batch(0, 0, range(n), n)
    losses = backward(state, dict(x0), range(n))
    loss_mask, single = seen[0]
    assert int(loss_mask["numbers"].sum()) == int(trainer.train_data.present["numbers"].sum()) < n
    for m in NAMES:
        has = x0.get(f"{m}:present", torch.ones(n, dtype=torch.bool))
        torch.testing.assert_close(losses[m], single[m][has].mean(), rtol=1e-5, atol=1e-7)


def test_the_expected_share_of_examples_with_a_loss(folder):
    """Absent examples, conditions of several and random ones, counted over many steps: 4σ."""
    trainer = Trainer(config_of(), Path("run"), "cpu", quiet=True)
    state, learned = trainer.state, dict.fromkeys(NAMES, 0.0)
    steps, batch = 400, 16
    state.module.register_forward_pre_hook(
        lambda module, args: learned.update({m: learned[m] + float(args[2][m].sum()) for m in NAMES})
    )
    state.module.forward = lambda *args: (torch.zeros((), requires_grad=True), {})
    for step in range(steps):
        state.step = step
        backward(state, state.data.batch(0, step, range(batch), batch), range(batch))
    for m in NAMES:
        share = expected_share(state, m)
        assert abs(learned[m] / (steps * batch) - share) < 4 * (share * (1 - share) / (steps * batch)) ** 0.5


def test_known_cells_of_absent_rows_are_no_conditions(tmp_path):
    """Random cells of rows are conditions of training: not of rows that are absent."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"height": rng.normal(size=60), "group": rng.choice(["a", "b"], 60)}).to_dict("records")
    table = [None if rng.random() < 0.5 else row for row in table]
    data = InMemory({"row": table, "numbers": list(rng.normal(size=(60, 3)))})
    row = {"kind": "columns", "conditioning_prob": 1.0, "stream": {"width": 16}}
    config = config_of(("modalities", {"row": row, "numbers": CONFIG["modalities"]["numbers"]}), ("times", {}))
    trainer = Trainer(config, tmp_path, "cpu", data=(data, data), quiet=True)
    seen = []
    trainer.state.net.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["observed"]["row_num"]), with_kwargs=True
    )
    x0 = trainer.train_data.batch(0, 0, range(16), 16)
    has = x0["row_num:present"]
    backward(trainer.state, dict(x0), range(16))
    assert seen[0][has].any()
    assert not seen[0][~has].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": [None] * 20}, "the data: no example has the modality label"),
        ({"numbers": [None] * 20}, "the data: no example has the modality numbers"),
        ({"numbers": [np.zeros(3)] * 19 + [np.zeros(2)]}, r"the data, numbers: value 19 has shape \(2,\), the model"),
        ({"wave": [np.zeros(8)] * 19 + [np.zeros((8, 8))]}, r"the data, wave: value 19 has shape \(8, 8\), the model"),
    ],
)
def test_data_that_does_not_fit(tmp_path, values, message):
    """One line that names the modality."""
    whole = {"wave": [np.sin(np.arange(8.0) + i) for i in range(20)], "label": list("abab" * 5)}
    whole["numbers"] = [np.array([i, i * i, 1.0]) for i in range(20)]
    good, bad = InMemory(whole), InMemory({**whole, **values})
    with pytest.raises(ValueError, match=message) as error:
        Trainer(config_of(), tmp_path, "cpu", data=(bad, good), quiet=True)
    assert "\n" not in str(error.value)


def test_a_modality_that_the_held_out_part_lacks(tmp_path):
    whole = {"wave": [np.sin(np.arange(8.0) + i) for i in range(20)], "label": list("abab" * 5)}
    whole["numbers"] = [np.array([i, i * i, 1.0]) for i in range(20)]
    with pytest.raises(ValueError, match=r"the data \(held out\): no example has the modality label"):
        Trainer(
            config_of(),
            tmp_path,
            "cpu",
            data=(InMemory(whole), InMemory({**whole, "label": [None] * 20})),
            quiet=True,
        )


def test_a_part_without_any_example_of_a_modality_ends_the_command(folder, refused):
    line = refused("train", "three.yaml", "data.options={absent: label, share: 1.1}", "--out", "run")
    assert "no example has the modality label" in line
    assert not Path("run").exists()


# Other mixes


def test_columns_beside_images_train_and_resume(tmp_path):
    rng = np.random.default_rng(0)
    n = 48
    table = pd.DataFrame({"height": rng.normal(size=n), "group": rng.choice(["a", "b", "c"], n)})
    data = InMemory({"image": rng.integers(0, 17, (n, 4, 4)), "row": table})
    sections = {
        "image": {"kind": "image", "channels": 1, "size": 4, "pixel_max": 16, "stream": {"width": 16}},
        "row": {"kind": "columns", "conditioning_prob": 0.3, "stream": {"width": 16, "single_stream_depth": 1}},
    }
    config = config_of(("modalities", sections), ("times", {"condition_prob": {"row": 0.3}}))

    def run(out: str, stop: int | None = None) -> Trainer:
        trainer = Trainer(config, tmp_path / out, "cpu", data=(data, data), quiet=True)
        trainer.run(stop)
        return trainer

    whole = run("whole")
    run("parts", stop=3)
    run("parts")
    same_weights(tmp_path / "whole", tmp_path / "parts")
    assert set(whole.pipeline.space) == {"image", "row_num", "row_cat"}
    assert (tmp_path / "whole/step_00000006/row.codec.json").is_file()
    decoded = whole.ema_pipeline().decode(whole.ema_pipeline().sample(n=4, steps=2))
    assert list(decoded["row"].columns) == ["height", "group"]
    assert decoded["image"].shape == (4, 4, 4, 1)


@pytest.mark.parametrize("aligned", [False, True])
def test_modalities_that_share_a_stream_train(folder, aligned):
    wave = {**CONFIG["modalities"]["wave"], "stream": {"width": 16, "patch": 8}}
    numbers = {**CONFIG["modalities"]["numbers"], "stream": {"share": "wave", "aligned": aligned}}
    modalities = {"wave": wave, "numbers": numbers, "label": CONFIG["modalities"]["label"]}
    whole = train(config_of(("modalities", modalities)), "whole")
    before = read_tensors(Path("whole/step_00000003/model.safetensors"))
    after = whole.state.net.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert not still, "every weight is trained"
    train(config_of(("modalities", modalities)), "parts", stop=3)
    train(config_of(("modalities", modalities)), "parts")
    same_weights("whole", "parts")
