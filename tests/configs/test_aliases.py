"""Configs of earlier versions are read as those of today."""

from __future__ import annotations

import json

import pytest
import yaml
from pydantic import BaseModel

from anystate import load_config
from anystate.configs.aliases import RENAMED, TABLE
from anystate.configs.kinds import find_kind
from anystate.configs.load import ConfigError, dump_config, parse_config

# every setting of a table that was once at the top of a file: another value than the default
SETTINGS = {
    "encoding.max_discrete_values": 7,
    "encoding.spike_share": 0.2,
    "encoding.max_categories": 9,
    "encoding.n_quantiles": 11,
    "encoding.tail_rows": 5.0,
    "numerical.schedule.name": "linear",
    "numerical.schedule.options": {"beta_max": 10.0},
    "numerical.t_min": 0.01,
    "numerical.time_conditioning": "sigma",
    "numerical.prediction_type": "v_prediction",
    "numerical.loss.scale": 2.0,
    "numerical.loss.weighting": "learned",
    "numerical.loss.gamma": 3.0,
    "numerical.sampler.method": "euler",
    "numerical.sampler.time_grid": "rho",
    "categorical.delta": 0.01,
    "categorical.t_min": 0.02,
    "categorical.loss_on": "masked",
    "categorical.mask_logit": "kept",
    "categorical.loss.scale": 0.5,
    "categorical.loss.weighting": "elbo",
    "categorical.loss.gamma": 4.0,
    "categorical.sampler.method": "ancestral",
    "categorical.sampler.time_grid": "linear",
    "conditioning_prob": 0.5,
    "noise": "sobol",
    "missing": ["", "?"],
}
NETWORK = {"width": 8, "depth": 1, "heads": 2}
PLAIN = {"name": "old", "network": NETWORK, "train": {"steps": 3, "batch": 4}}
EARLIER = {  # {today's path: the earlier one, the earlier value}
    "encoding.max_discrete_values": ("encoding.discrete", 7),
    "encoding.spike_share": ("encoding.spike", 0.2),
    "encoding.max_categories": ("encoding.most", 9),
    "encoding.n_quantiles": ("encoding.knots", 11),
    "encoding.tail_rows": ("encoding.ends", 5.0),
    "numerical.time_conditioning": ("numbers.time_input", "sigma"),
    "numerical.prediction_type": ("numbers.predicts", "v"),
    "numerical.sampler.method": ("numbers.sampler.kind", "euler"),
    "numerical.sampler.time_grid": ("numbers.sampler.grid", "rho"),
    "numerical.loss.scale": ("numbers.loss.scale", 2.0),
    "categorical.loss_on": ("tokens.counted", "masked"),
    "categorical.mask_logit": ("tokens.mask_column", "leak"),
    "categorical.sampler.method": ("tokens.sampler.kind", "ancestral"),
    "categorical.delta": ("tokens.delta", 0.01),
    "conditioning_prob": ("known", 0.5),
    "noise": ("draws", "sobol"),
}


def leaves(section: type[BaseModel], place: str = "") -> set[str]:
    """The paths of all settings of a section that are no sections."""
    found = set()
    for name, field in section.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        found |= leaves(inner, f"{place}{name}.") if is_section else {f"{place}{name}"}
    return found


def nested(path: str, value) -> dict:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def at(config, path: str):
    """The value at a path, which is plain data or a section."""
    for part in path.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def needed(path: str) -> dict:
    """What `path` cannot be set without."""
    if path == "noise":
        return {"categorical": {"sampler": {"method": "first_hitting"}}}
    return {"noise": "iid"} if path == "categorical.sampler.method" else {}


def as_overrides(raw: dict, place: str = "") -> list[str]:
    """Plain data as key=value overrides."""
    out = []
    for key, value in raw.items():
        if isinstance(value, dict) and key != "options":
            out += as_overrides(value, f"{place}{key}.")
        else:
            out.append(f"{place}{key}={json.dumps(value)}")  # also YAML
    return out


def test_the_list_has_every_setting_of_a_table():
    own = {path for path in leaves(find_kind("columns")) if path.split(".")[0] in TABLE}
    assert own == set(SETTINGS)
    assert set(EARLIER) <= own


@pytest.mark.parametrize("path", SETTINGS)
def test_a_setting_of_a_table_at_the_top_of_a_file(tmp_path, path):
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({**PLAIN, **needed(path), **nested(path, SETTINGS[path])}))
    config = load_config(file)
    assert at(config.modalities["row"], path) == SETTINGS[path]
    assert config.modalities["row"].kind == "columns"
    assert config.network.kind == "table_dit"
    assert config.sample.batch_size is None
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize("path", SETTINGS)
def test_a_setting_of_a_table_as_an_override(path):
    both = {**needed(path), **nested(path, SETTINGS[path])}
    config = load_config("table/default", as_overrides(both))
    assert at(config.modalities["row"], path) == SETTINGS[path]
    today = load_config("table/default", [f"modalities.row.{line}" for line in as_overrides(both)])
    assert today == config


@pytest.mark.parametrize("path", EARLIER)
def test_a_setting_of_a_table_under_its_earlier_name(path):
    name, value = EARLIER[path]
    config = parse_config({**PLAIN, **needed(path), **nested(name, value)}, "old")
    assert at(config.modalities["row"], path) == SETTINGS[path]
    assert load_config("table/default", as_overrides({**needed(path), **nested(name, value)})) == load_config(
        "table/default", as_overrides({**needed(path), **nested(path, SETTINGS[path])})
    )


def test_a_table_of_defaults_only():
    config = parse_config(PLAIN, "old")
    assert list(config.modalities) == ["row"]
    assert config == parse_config({**PLAIN, "missing": [""]}, "old")


def test_a_file_laid_over_a_shipped_table(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: table/default\nname: mine\nnumbers: {predicts: eps}\nknown: 0.1\n")
    row = load_config(tmp_path / "mine.yaml").modalities["row"]
    assert (row.numerical.prediction_type, row.conditioning_prob) == ("epsilon", 0.1)
    assert row.numerical.sampler.method == "dpmpp_2m"  # of the base


def test_the_earlier_balanced_loss():
    row = parse_config({**PLAIN, "tokens": {"counted": "balanced"}}, "old").modalities["row"]
    assert (row.categorical.loss_on, row.categorical.loss.weighting) == ("masked", "balanced")
    with pytest.raises(ConfigError, match=r"old: categorical.loss_on: balanced weighs by itself"):
        parse_config({**PLAIN, "tokens": {"counted": "balanced", "loss": {"weighting": "elbo"}}}, "old")


def test_table_settings_beside_several_modalities_are_unknown():
    raw = load_config("digits").model_dump(mode="json")
    with pytest.raises(ConfigError, match="unknown key 'numerical'"):
        parse_config({**raw, "numerical": {"t_min": 0.1}}, "mix")


@pytest.mark.parametrize(
    ("section", "kind", "process"),
    [
        ({"process": "gaussian", "channels": 1, "size": 8}, "image", None),
        ({"process": "masked", "alphabet": "abc", "length": 4}, "text", "masked"),
        ({"process": "uniform", "alphabet": "abc", "length": 4}, "text", "uniform"),
        ({"kind": "label", "process": "uniform"}, "label", "uniform"),
    ],
)
def test_modalities_that_say_their_process_only(section, kind, process):
    raw = {**PLAIN, "network": {"depth": 1, "heads": 2, "head_dim": 4}}
    modality = parse_config({**raw, "modalities": {"a": {**section, "stream": {"width": 8}}}}, "old").modalities["a"]
    assert type(modality) is find_kind(kind)
    assert modality.kind == kind
    assert getattr(modality, "process", None) == process


def test_earlier_names_of_a_modality_and_of_training():
    """Every renamed setting that is not of a table, in one file."""
    old = {
        **PLAIN,
        "engine": "fast",
        "modalities": {
            "image": {
                "process": "gaussian",
                "channels": 1,
                "size": 8,
                "time_input": "time",
                "predicts": "v",
                "sampler": {"kind": "euler", "grid": "rho"},
                "stream": {"width": 8, "tower": 2, "head": False},
            },
            "text": {
                "process": "masked",
                "alphabet": "ab",
                "length": 4,
                "mask_column": "extra",
                "counted": "masked",
                "stream": {"width": 8},
            },
        },
        "network": {"depth": 1, "heads": 2, "head_dim": 4},
        "times": {"skew": {"text": 2}, "hold": {"image": 0.5}},
        "train": {
            "steps": 3,
            "batch": 4,
            "accumulate": 2,
            "warmup": 5,
            "decay": "linear",
            "clip": 2.0,
            "recompute": True,
            "nonfinite": "zero",
            "keep": 7,
        },
        "sample": {"chunk": 9},
    }
    config = parse_config(old, "old")
    image, text, train = config.modalities["image"], config.modalities["text"], config.train
    assert (image.time_conditioning, image.prediction_type) == ("time", "v_prediction")
    assert (image.sampler.method, image.sampler.time_grid) == ("euler", "rho")
    assert (image.stream.single_stream_depth, image.stream.output) == (2, False)
    assert (text.mask_logit, text.loss_on) == ("ignored", "masked")
    assert (config.times.time_skew, config.times.condition_prob) == ({"text": 2}, {"image": 0.5})
    assert (train.gradient_accumulation_steps, train.warmup_steps, train.lr_schedule) == (2, 5, "linear")
    assert (train.max_grad_norm, train.activation_checkpointing, train.on_nonfinite_grad) == (2.0, True, "zero")
    assert (train.keep_last, config.sample.batch_size) == (7, 9)
    tops = {path.split(".")[0] for path in RENAMED}
    assert tops <= {"modalities", "times", "train", "sample", "network", "known", "draws", "numbers", "tokens", *TABLE}


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ({"name": "digits"}, "digits"),
        ({"name": "digits", "path": None}, "digits"),
        ({"name": "npz", "path": "pairs.npz"}, "pairs.npz"),
        ({"name": "packed", "path": "data/emoji"}, "data/emoji"),
        ({"source": "digits"}, "digits"),
    ],
)
def test_data_by_name_and_path(data, source):
    raw = load_config("digits").model_dump(mode="json")
    assert parse_config({**raw, "data": {**data, "split_seed": 3}}, "old").data.source == source
    overrides = [f"data.{key}={'null' if value is None else value}" for key, value in data.items()]
    config = load_config("digits", overrides)
    assert (config.data.source, config.data.split_seed) == (source, 0)


def test_a_setting_under_both_of_its_names():
    with pytest.raises(ConfigError, match=r"old: train.clip and train.max_grad_norm are the old and the new name"):
        parse_config({**PLAIN, "train": {"steps": 1, "batch": 1, "max_grad_norm": 1.0, "clip": 2.0}}, "old")
