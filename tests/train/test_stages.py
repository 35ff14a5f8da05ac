"""Training in stages: initial weights from another run, frozen parts, official configurations."""

from __future__ import annotations

import pytest
import torch

from anystate.configs.load import ConfigError, load_config
from anystate.configs.runs import CheckpointError, latest
from anystate.model.storage import read_tensors
from anystate.sample.pipeline import build_pipeline
from anystate.train.trainer import Trainer

FIRST = ["modalities.text.stream={width: 16, single_stream_depth: 0, output: false}"]


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """A run without single-stream blocks and head for text."""
    out = tmp_path_factory.mktemp("first")
    Trainer(tiny(*FIRST), out, "cpu", quiet=True).run()
    return out


def state(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.net.state_dict().items()}


def test_a_stage_starts_from_ema_weights_and_initializes_new_ones(tiny, first, tmp_path):
    config = tiny(f"init.checkpoint={first}")
    trainer = Trainer(config, tmp_path, "cpu", quiet=True)
    before, fresh = state(trainer), build_pipeline(config).net.state_dict()
    ema = read_tensors(latest(first) / "ema.safetensors")
    assert set(ema) < set(before)
    for name, value in before.items():
        assert torch.equal(value, ema.get(name, fresh[name])), name
    assert {name.split(".")[0] for name in set(before) - set(ema)} == {"head", "tower", "tower_norm"}
    assert "new: head.text, tower.text, tower_norm.text" in trainer.started_from
    assert trainer.state.step == 0
    assert not trainer.state.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(trainer.state.ema.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize(
    ("freeze", "frozen_parts"),
    [
        ("[joint]", {"embed", "time", "trunk", "trunk_norm"}),
        ("[joint, image]", {"embed", "time", "trunk", "trunk_norm", "head.image"}),
        ("[text]", {"embed.text", "time.text", "tower.text", "tower_norm.text", "head.text"}),
    ],
)
def test_only_parts_that_are_not_frozen_are_trained(tiny, tmp_path, freeze, frozen_parts):
    trainer = Trainer(tiny(f"train.freeze={freeze}", "train.weight_decay=0.1"), tmp_path, "cpu", quiet=True)
    before = state(trainer)
    trainer.run(stop=3)
    moved = {name for name, value in state(trainer).items() if not torch.equal(value, before[name])}
    frozen = {name for name in before if any(name.startswith(part + ".") for part in frozen_parts)}
    assert frozen
    assert not moved & frozen
    assert {name for name in before if name.startswith("head.")} - frozen <= moved


def test_an_interrupted_stage_resumes_its_own_weights(tiny, first, tmp_path):
    config = tiny(f"init.checkpoint={first}", "train.freeze=[joint]")
    whole = Trainer(config, tmp_path / "whole", "cpu", quiet=True)
    whole.run()
    Trainer(config, tmp_path / "parts", "cpu", quiet=True).run(stop=3)
    parts = Trainer(config, tmp_path / "parts", "cpu", quiet=True)
    parts.run()
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(parts).values(), strict=True))


def test_a_modality_with_loss_scale_0_is_not_computed(tiny, tmp_path):
    trainer = Trainer(tiny("modalities.text.loss.scale=0"), tmp_path, "cpu", quiet=True)
    assert list(trainer.update()) == ["image"]
    assert trainer.state.net.head["image"].linear.weight.abs().sum() > 0
    assert trainer.state.net.head["text"].linear.weight.abs().sum() == 0  # as initialised


def test_nonfinite_gradients_set_to_zero(tiny, tmp_path):
    trainer = Trainer(tiny("train.on_nonfinite_grad=zero"), tmp_path, "cpu", quiet=True)
    with torch.no_grad():
        trainer.train_data.x["image"][:64] = float("nan")
    trainer.run()
    assert all(p.isfinite().all() for p in trainer.state.net.parameters())


def test_wrong_initial_weights_and_freezes_are_named(tiny, first, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Trainer(tiny("init.checkpoint=nowhere"), tmp_path, "cpu", quiet=True)
    wide = tiny("modalities.image.stream.width=32", f"init.checkpoint={first}")
    with pytest.raises(CheckpointError, match=r"another architecture: embed.*has shape"):
        Trainer(wide, tmp_path, "cpu", quiet=True)
    with pytest.raises(ConfigError, match=r"train.freeze names 'trunk'; allowed: joint, image, text"):
        tiny("train.freeze=[trunk]")


def test_the_three_official_stages():
    """Sizes and optimizer of the paper; stages differ in the text's own blocks, frozen parts and initial weights."""
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


def test_base_configs(tmp_path):
    (tmp_path / "a.yaml").write_text("base: digits\nname: a\ntrain: {lr: 0.5}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b\n")
    config, shipped = load_config(tmp_path / "b.yaml", ["seed=3"]), load_config("digits")
    assert (config.name, config.seed, config.train.lr) == ("b", 3, 0.5)
    assert config.train.steps == shipped.train.steps
    assert config.modalities == shipped.modalities
    (tmp_path / "c.yaml").write_text("base: c.yaml\nname: c\n")
    with pytest.raises(ConfigError, match="base leads back"):
        load_config(tmp_path / "c.yaml")
