"""Training in stages: starting from another run's weights, parts that stand still, official configurations."""

from __future__ import annotations

import pytest
import torch

from anystate.configs.load import ConfigError, load_config
from anystate.configs.runs import CheckpointError, latest
from anystate.model.storage import read_tensors
from anystate.sample.pipeline import build_pipeline
from anystate.train.trainer import Trainer

FIRST = ["modalities.text.stream={width: 16, tower: 0, head: false}"]


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """A stage without a text tower."""
    out = tmp_path_factory.mktemp("first")
    Trainer(tiny(*FIRST), out, "cpu", quiet=True).run()
    return out


def state(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.net.state_dict().items()}


def test_the_next_stage_starts_from_the_average_and_keeps_new_weights_as_drawn(tiny, first, tmp_path):
    config = tiny(f"init.checkpoint={first}")
    trainer = Trainer(config, tmp_path, "cpu", quiet=True)
    before, fresh = state(trainer), build_pipeline(config).net.state_dict()
    average = read_tensors(latest(first) / "ema.safetensors")
    assert set(average) < set(before)
    for name, value in before.items():
        assert torch.equal(value, average.get(name, fresh[name])), name
    assert {name.split(".")[0] for name in set(before) - set(average)} == {"head", "tower", "tower_norm"}
    assert "new: head.text, tower.text, tower_norm.text" in trainer.started_from
    assert trainer.state.step == 0
    assert not trainer.state.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(trainer.state.ema.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        ("[joint]", {"embed", "time", "trunk", "trunk_norm"}),
        ("[joint, image]", {"embed", "time", "trunk", "trunk_norm", "head.image"}),
        ("[text]", {"embed.text", "time.text", "tower.text", "tower_norm.text", "head.text"}),
    ],
)
def test_frozen_parts_stand_still_and_the_rest_learns(tiny, tmp_path, freeze, still):
    trainer = Trainer(tiny(f"train.freeze={freeze}", "train.weight_decay=0.1"), tmp_path, "cpu", quiet=True)
    before = state(trainer)
    trainer.run(stop=3)
    moved = {name for name, value in state(trainer).items() if not torch.equal(value, before[name])}
    frozen = {name for name in before if any(name.startswith(part + ".") for part in still)}
    assert frozen
    assert not moved & frozen
    assert {name for name in before if name.startswith("head.")} - frozen <= moved


def test_a_stage_resumes_as_itself(tiny, first, tmp_path):
    config = tiny(f"init.checkpoint={first}", "train.freeze=[joint]")
    whole = Trainer(config, tmp_path / "whole", "cpu", quiet=True)
    whole.run()
    Trainer(config, tmp_path / "parts", "cpu", quiet=True).run(stop=3)
    parts = Trainer(config, tmp_path / "parts", "cpu", quiet=True)
    parts.run()
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(parts).values(), strict=True))


def test_a_modality_without_weight_is_not_computed(tiny, tmp_path):
    trainer = Trainer(tiny("modalities.text.loss.scale=0"), tmp_path, "cpu", quiet=True)
    assert list(trainer.update()) == ["image"]
    assert trainer.state.net.head["image"].linear.weight.abs().sum() > 0
    assert trainer.state.net.head["text"].linear.weight.abs().sum() == 0  # as initialised


def test_gradients_that_are_not_finite_can_be_dropped(tiny, tmp_path):
    trainer = Trainer(tiny("train.on_nonfinite_grad=zero"), tmp_path, "cpu", quiet=True)
    with torch.no_grad():
        trainer.train_data.images[:64] = float("nan")
    trainer.run()
    assert all(p.isfinite().all() for p in trainer.state.net.parameters())


def test_wrong_starts_are_named(tiny, first, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Trainer(tiny("init.checkpoint=nowhere"), tmp_path, "cpu", quiet=True)
    wide = tiny("modalities.image.stream.width=32", f"init.checkpoint={first}")
    with pytest.raises(CheckpointError, match=r"another architecture: embed.*has shape"):
        Trainer(wide, tmp_path, "cpu", quiet=True)
    with pytest.raises(ConfigError, match=r"train.freeze names 'trunk'; allowed: joint, image, text"):
        tiny("train.freeze=[trunk]")


def test_the_three_official_stages():
    """Sizes and optimizer of the paper; what changes between stages is the text tower, the frozen part, the start."""
    one, two, three = (load_config(f"text_image/stage{i}") for i in (1, 2, 3))
    assert (one.network.depth, one.network.heads * one.network.head_dim) == (8, 512)
    assert not one.modalities["text"].stream.output
    assert one.init is None
    assert not one.train.freeze
    assert two.modalities["text"].stream.single_stream_depth == 6
    assert two.train.freeze == ["joint"]
    assert two.init.checkpoint == f"runs/{one.name}"
    assert three.init.checkpoint == f"runs/{two.name}"
    assert three.train.freeze == []
    assert three.modalities == two.modalities
    assert two.modalities["image"] == one.modalities["image"]
    assert two.network == one.network
    for config in (one, two, three):
        assert (config.train.lr, config.train.batch, config.train.ema) == (2e-4, 256, 0.9999)


def test_bases(tmp_path):
    (tmp_path / "a.yaml").write_text("base: digits\nname: a\ntrain: {lr: 0.5}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b\n")
    config, shipped = load_config(tmp_path / "b.yaml", ["seed=3"]), load_config("digits")
    assert (config.name, config.seed, config.train.lr) == ("b", 3, 0.5)
    assert config.train.steps == shipped.train.steps
    assert config.modalities == shipped.modalities
    (tmp_path / "c.yaml").write_text("base: c.yaml\nname: c\n")
    with pytest.raises(ConfigError, match="base leads back"):
        load_config(tmp_path / "c.yaml")
