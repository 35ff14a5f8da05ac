"""Packed data sets named by a config: matching ones are loaded, others raise errors; and `data check`."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
import yaml

from anystate.model.build import build_codecs
from anystate.train.data import load
from anystate.train.data.packed.manifest import Manifest
from anystate.train.data.packing.check import check
from anystate.train.data.packing.open import open_source
from anystate.train.data.packing.pack import Settings, pack
from anystate.train.trainer import Trainer


def load_data(config):
    """The training and the held-out part."""
    return load.load_data(config, build_codecs(config))


@pytest.fixture
def config(tiny, packed):
    """config("data.loader=dali") → Config of a digits-like model on the packed things."""
    text = Manifest.load(packed).modalities["text"].settings
    fits = [
        f"data.source={packed}",
        "data.loader=webdataset",
        "modalities.image.channels=3",
        "modalities.image.size=4",
        "modalities.image.pixel_max=255",
        f"modalities.text.alphabet={json.dumps(text['alphabet'])}",
        f"modalities.text.length={text['length']}",
    ]
    return lambda *overrides: tiny(*fits, *overrides)


def test_matching_config_loads_both_parts(config):
    codecs = build_codecs(config())
    train, test = load.load_data(config(), codecs)
    assert (len(train), len(test)) == (60, 10)
    batch = train.batch(0, 0, range(6), 6)
    assert codecs["text"].decode(batch["text"])[0].split()[1] == "thing"
    assert test.raw.values["text"][0] == codecs["text"].decode(test.first(slice(0, 1))["text"])
    train.close()


def test_training_resumes_bit_for_bit(config, tmp_path):
    whole = Trainer(config("data.flip=true"), tmp_path / "a", "cpu", quiet=True)
    whole.run()
    Trainer(config("data.flip=true"), tmp_path / "b", "cpu", quiet=True).run(stop=3)
    resumed = Trainer(
        config("data.flip=true", "train.gradient_accumulation_steps=1"), tmp_path / "b", "cpu", quiet=True
    )
    assert resumed.state.step == 3
    resumed.run()
    for a, b in zip(whole.state.net.parameters(), resumed.state.net.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modalities.image.channels=1", "packed with channels = 3, the config has 1 for 'image'"),
        ("modalities.image.size=8", "packed with size = 4"),
        ("modalities.image.pixel_max=16", "packed with pixel_max = 255.0"),
        ("modalities.image.latents={vae: x}", "packed with kind = 'pixels', the config has 'latents'"),
        ("modalities.text.length=9", "packed with length"),
        ("modalities.text.alphabet=abc", "packed with states"),
        ("data.source=nowhere", "data.source 'nowhere' not found"),
    ],
)
def test_mismatched_configs(config, override, message):
    with pytest.raises(ValueError, match=message):
        load_data(config(override))


def test_missing_held_out_part(config, source, tmp_path, packed):
    copy = shutil.copytree(packed, tmp_path / "copy")
    raw = yaml.safe_load((copy / "dataset.yaml").read_text())
    del raw["splits"]["test"]
    (copy / "dataset.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=r"no split 'test'.*--test-share"):
        load_data(config(f"data.source={copy}"))


def test_different_tokenizer_is_refused(tiny, source, tmp_path):
    out = tmp_path / "set"
    text = pack(open_source(str(source)), out, Settings(text="bpe", states=300)).modalities["text"].settings
    tokens = dict(text["tokenizer"], path=str(out / "text.tokenizer.json"))
    image = ["modalities.image.channels=3", "modalities.image.size=4", "modalities.image.pixel_max=255"]
    data = [f"data.source={out}", "modalities.text.alphabet=null", *image]
    overrides = [*data, f"modalities.text.tokenizer={json.dumps(tokens)}", f"modalities.text.length={text['length']}"]
    load_data(tiny(*overrides))
    other = json.loads((out / "text.tokenizer.json").read_text())
    first, second = other["model"]["merges"][:2]
    other["model"]["merges"][:2] = [second, first]
    (tmp_path / "other.json").write_text(json.dumps(other))
    tokens["path"] = str(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json of 'text' is not the one that .* was packed with"):
        load_data(tiny(*overrides, f"modalities.text.tokenizer={json.dumps(tokens)}"))


# data check


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def test_valid_data_set_passes(call, packed, capsys):
    assert call("data", "check", packed) == 0
    assert "60 train, 10 test" in capsys.readouterr().out


def flip_a_bit(folder):
    data = bytearray((folder / "train/00001.tar").read_bytes())
    data[700] ^= 1
    (folder / "train/00001.tar").write_bytes(data)


def shift_an_offset(folder):
    """An index with a wrong offset, and the matching checksum in the manifest."""
    index = folder / "train/00001.idx"
    index.write_text(index.read_text().replace("image.npy 512 ", "image.npy 1024 ", 1))
    raw = yaml.safe_load((folder / "dataset.yaml").read_text())
    raw["splits"]["train"]["shards"][1]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (folder / "dataset.yaml").write_text(yaml.safe_dump(raw))


def shrink_the_vocabulary(folder):
    raw = yaml.safe_load((folder / "dataset.yaml").read_text())
    raw["modalities"]["text"]["parts"]["text"]["states"] = 5
    (folder / "dataset.yaml").write_text(yaml.safe_dump(raw))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "train/00001.tar was changed"),
        (shift_an_offset, "train/00001.idx does not match its shard 00001.tar"),
        (shrink_the_vocabulary, r"00000.tar: \d+: token \d+ is beyond the vocabulary of 5"),
        (lambda folder: (folder / "test/00000.idx").unlink(), "test/00000.idx is missing"),
    ],
)
def test_check_reports_faults(copy, damage, message, capsys):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        check(copy, quiet())


def quiet():
    from rich.console import Console

    return Console(quiet=True)
