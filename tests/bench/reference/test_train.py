"""Training and its reference give the same losses and weights."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from anystate.bench.reference import train as reference
from anystate.configs.load import load_config, parse_config
from anystate.train.data.dataset import InMemory
from anystate.train.trainer import Trainer

STEPS = 3


def trained(trainer: Trainer) -> list[dict[str, float]]:
    losses = []
    for _ in range(STEPS):
        losses.append({m: float(value) for m, value in trainer.update().items()})
        trainer.state.step += 1
    return losses


def trained_by_reference(trainer: Trainer) -> list[dict[str, float]]:
    state, losses = trainer.state, []
    optimizer = reference.adamw(state.net, state.weighting, state.settings)
    for step in range(STEPS):
        x0 = state.data.batch(state.seed, step, state.rows, state.settings.batch)
        weighting = {m: state.weighting[m] for m in state.module.names}
        args = (state.net, state.ema, weighting, optimizer, state.space, state.times, x0, state.settings, state.seed)
        share = state.data.present_share
        losses.append(reference.training_step(*args, step, state.module.observed, present_share=share))
    return losses


def assert_same(ours: Trainer, plain: Trainer) -> None:
    for a, b in zip(trained(ours), trained_by_reference(plain), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for a, b in zip(ours.state.ema.parameters(), plain.state.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_image_text_training(tiny, tmp_path, parts):
    config = tiny(f"train.gradient_accumulation_steps={parts}")
    assert_same(*(Trainer(config, tmp_path / name, "cpu", quiet=True) for name in ("ours", "plain")))


@pytest.mark.parametrize("overrides", [[], ["categorical.loss.weighting=balanced", "train.lr_schedule=linear"]])
def test_table_training(tmp_path, overrides):
    """Conditions over random columns included."""
    r = np.random.default_rng(0)
    table = pd.DataFrame({"a": r.choice(["x", "y", "z"], 300), "b": r.normal(size=300), "c": r.integers(0, 9, 300)})
    tiny = ["network.width=16", "network.depth=2", "network.heads=2", "train.batch=64", "train.steps=8"]
    config = load_config("table/default", [*tiny, "train.warmup_steps=2", *overrides])
    rows = InMemory({"row": table})
    assert_same(*(Trainer(config, tmp_path / name, "cpu", (rows, rows), quiet=True) for name in ("a", "b")))


@pytest.mark.parametrize("subset_prob", [0.0, 0.4])
def test_training_of_modalities_that_some_examples_lack(tmp_path, subset_prob):
    """Rows of a table, vectors and labels in one network; random subsets are conditions."""
    r = np.random.default_rng(1)
    lengths = r.normal(size=60)
    rows = [{"a": str(r.choice(["x", "y"])), "b": float(x)} if i % 3 else None for i, x in enumerate(lengths)]
    vectors = [np.array([x, -x, 0.5]) if i % 4 else None for i, x in enumerate(lengths)]
    data = InMemory({"row": rows, "point": vectors, "sign": [str(x > 0) for x in lengths]})
    stream = {"width": 16}
    raw = {
        "name": "mix",
        "modalities": {
            "row": {"kind": "columns", "conditioning_prob": 0.5, "stream": stream},
            "point": {"kind": "vector", "size": 3, "stream": stream},
            "sign": {"kind": "label", "stream": stream},
        },
        "network": {"depth": 1, "heads": 2, "head_dim": 8},
        "times": {"subset_prob": subset_prob, "condition_prob": {"sign": 0.2}},
        "train": {"steps": 8, "batch": 24, "gradient_accumulation_steps": 2},
    }
    config = parse_config(raw, "the test")
    made = [Trainer(config, tmp_path / name, "cpu", (data, data), quiet=True) for name in ("a", "b")]
    share = {"row_num": 2 / 3, "row_cat": 2 / 3, "point": 0.75}
    assert made[0].train_data.present_share == pytest.approx(share)
    assert_same(*made)
