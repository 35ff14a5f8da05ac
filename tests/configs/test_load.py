"""Configs: what is wrong is one line that names the key; modalities are read last, by their kinds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import anystate
from anystate.configs.load import ConfigError, dump_config, load_config, parse_config

ROOT = Path(anystate.__file__).parent
SHIPPED = sorted(str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.yaml"))
RUNS = [name for name in SHIPPED if "train" in (yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) or {})]
VECTOR = {"kind": "vector", "size": 4, "stream": {"width": 16}}
MIX = {
    "name": "mix",
    "data": {"source": "digits"},
    "modalities": {"numbers": VECTOR, "label": {"kind": "label", "stream": {"width": 16}}},
    "network": {"depth": 1, "heads": 2, "head_dim": 8},
    "train": {"steps": 3, "batch": 4},
}


def mix(**sections) -> dict:
    return {**MIX, **sections}


def refusal(raw: dict) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(raw, "mix.yaml")
    line = str(error.value)
    assert line.startswith("mix.yaml: ")
    assert "\n" not in line
    return line.removeprefix("mix.yaml: ")


@pytest.mark.parametrize("name", RUNS)
def test_shipped_configs_come_back_as_written(name):
    config = load_config(name)
    assert parse_config(yaml.safe_load(dump_config(config)), "again") == config


def test_a_mix_comes_back_as_written(tmp_path):
    config = parse_config(mix(), "mix.yaml")
    (tmp_path / "mix.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "mix.yaml")
    assert again == config
    assert again.modalities["numbers"].size == 4
    assert type(again.modalities["label"]) is type(config.modalities["label"])
    changed = load_config(tmp_path / "mix.yaml", ["modalities.numbers.size=6", "modalities.label.classes=[a, b]"])
    assert (changed.modalities["numbers"].size, changed.modalities["label"].classes) == (6, ["a", "b"])


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (mix(modalities={}), "modalities = {}: dictionary should have at least 1 item"),
        (mix(modalities=None), "modalities = None: input should be a valid dictionary"),
        (mix(modalities=["image"]), "modalities = ['image']: input should be a valid dictionary"),
        ({k: v for k, v in MIX.items() if k != "modalities"}, "missing key 'modalities'"),
        (mix(modalities={"a-b": VECTOR}), "modality 'a-b': a name has letters, digits and _, and is not joint"),
        (mix(modalities={"joint": VECTOR}), "modality 'joint': a name has letters, digits and _, and is not joint"),
        (mix(modalities={"a": {**VECTOR, "siez": 3}}), "unknown key 'modalities.a.siez'; allowed here: kind, stream"),
        (mix(modalities={"a": {**VECTOR, "size": 0}}), "modalities.a.size = 0: input should be greater than 0"),
        (mix(modalities={"a": {**VECTOR, "names": ["x"]}}), "modalities.a: names has 1 entries for the 4 numbers"),
        (mix(modalities={"a": {**VECTOR, "stream": {}}}), "modalities.a.stream: a stream has a width of its own, or"),
        (
            mix(modalities={"a": {**VECTOR, "stream": {"width": 8, "share": "b"}}}),
            "modalities.a.stream: a stream has a width of its own, or",
        ),
        (
            mix(modalities={"a": {**VECTOR, "schedule": {"nam": "cosine"}}}),
            "unknown key 'modalities.a.schedule.nam'; allowed here: name, options",
        ),
        (
            mix(train={"steps": 3, "batch": 4, "freeze": ["image"]}),
            "train.freeze names 'image'; allowed: joint, num",
        ),
        (
            mix(times={"condition_prob": {"label+text": 0.5}}),
            "times.condition_prob names unknown modality 'text'; there are numbers, label",
        ),
        (mix(times={"time_skew": {"text": 2}}), "times.time_skew names unknown modality 'text'"),
        (mix(times={"subset_prob": 2}), "times.subset_prob = 2: input should be less than or equal to 1"),
        (mix(data={"source": "x", "fields": {"text": "y"}}), "data.fields names unknown modality 'text'"),
        (
            mix(network={"kind": "table_dit", "width": 8, "depth": 1, "heads": 2}),
            "network.kind: table_dit takes one modality of table columns; mmdit takes any mix",
        ),
        (mix(network={"kind": "table_dit", "depth": 1, "heads": 2}), "missing key 'network.width'"),
        (mix(network={"depth": 1, "heads": 2, "width": 3, "head_dim": 8}), "unknown key 'network.width'; allowed here"),
    ],
)
def test_what_is_wrong_is_one_line(raw, line):
    assert refusal(raw).startswith(line)


def test_bad_configs_end_the_command(tmp_path, refused):
    """Exit code 2 and one line, through the command line."""
    for modality, line in (
        ({"kind": "sond"}, "bad.yaml: modalities.a: unknown kind 'sond'; there are"),
        ({"kind": "nowhere.at_all:Kind"}, "modalities.a: kind 'nowhere.at_all:Kind' cannot be imported"),
        ({**VECTOR, "siez": 3}, "unknown key 'modalities.a.siez'"),
        ({**VECTOR, "kind": "anystate.model.modalities.base:GaussianModality"}, "lacks the method build_codec"),
        ({**VECTOR, "kind": "math:pi"}, "modalities.a: kind 'math:pi' is not a class derived from anystate.Modality"),
    ):
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(mix(modalities={"a": modality})))
        assert line in refused("train", tmp_path / "bad.yaml", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


WITHOUT_TORCH = """
import json, sys
from anystate.cli import main
for args in json.load(sys.stdin):
    try:
        main(args)
    except SystemExit as stop:
        assert stop.code == 2, args
    assert "torch" not in sys.modules, args
"""


def test_errors_outside_modalities_need_no_torch(tmp_path):
    """Modalities come last, so that other errors appear at once; an unknown kind needs none of its modules either."""
    cases = {
        "train": mix(train={"steps": 0, "batch": 4}),
        "key": mix(trian={}),
        "name": mix(modalities={"a-b": VECTOR}),
        "network": mix(network={"depth": 0, "heads": 2, "head_dim": 8}),
        "times": mix(times={"condition_prob": {"text": 0.5}}),
        "kind": mix(modalities={"a": {"kind": "sond"}}),
        "section": mix(modalities={"a": "image"}),
    }
    for name, raw in cases.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    commands = [["train", f"{name}.yaml"] for name in cases] + [["train", "train.yaml", "modalities.numbers.size=3"]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps(commands), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands), done.stderr
    assert all(line.startswith("error: ") for line in lines)
