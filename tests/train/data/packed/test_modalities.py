"""Packed data of any modalities: images, labels that some examples lack, series and tables; and sets of version 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from anystate.configs.load import parse_config
from anystate.model.build import build_codecs
from anystate.tests.train.data.packed.test_packed import LOADERS
from anystate.train.data.dataset import InMemory
from anystate.train.data.examples import encode, fit_codecs
from anystate.train.data.load import load_data
from anystate.train.data.packed import readers
from anystate.train.data.packed.manifest import Manifest
from anystate.train.data.packed.packed import Packed, load_packed
from anystate.train.data.packed.shards import ShardWriter
from anystate.train.data.packing.image_text import Settings
from anystate.train.data.packing.pack import pack
from anystate.train.data.packing.sources import DatasetSource
from anystate.train.trainer import Trainer

N = 50
STREAM = {"width": 16}
SECTIONS = {
    "image": {"kind": "image", "channels": 1, "size": 4, "pixel_max": 16, "stream": STREAM},
    "label": {"kind": "label", "stream": STREAM},
    "Series": {"kind": "series", "channels": 2, "length": 8, "stream": STREAM},
}
MODULE = """
import numpy as np
from anystate.tests.train.data.packed.test_modalities import things

def load(n=50):
    return things(n)
"""


def config_of(sections=SECTIONS, source="nowhere", **others):
    raw = {
        "name": "things",
        "data": {"source": str(source), "loader": "webdataset"},
        "modalities": sections,
        "network": {"depth": 1, "heads": 2, "head_dim": 8},
        "train": {"steps": 4, "batch": 8, "save_every": 2, "log_every": 1},
    }
    return parse_config({**raw, **others}, "test")


def things(n=N):
    """Image i is i mod 17 everywhere; every third label and series 5 are missing; series have one or two versions."""
    rng = np.random.default_rng(0)
    images = np.broadcast_to((np.arange(n) % 17)[:, None, None], (n, 4, 4)).astype(np.float64)
    labels = [None if i % 3 == 0 else ("odd" if i % 2 else "even") for i in range(n)]
    series = [rng.normal(3.0, 2.0, (2, 8)) for _ in range(n)]
    versions = [[x, x + 100.0] if i % 4 == 0 else None if i == 5 else x for i, x in enumerate(series)]
    values = {"image": images, "label": labels, "Series": versions}
    return InMemory(values, {"number": np.arange(n)})


def parts(n=N, held_out=10):
    whole = things(n)
    return whole.subset(np.arange(n - held_out)), whole.subset(np.arange(n - held_out, n))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("things") / "set"
    pack(DatasetSource("things", parts()), out, Settings(shard_size=16), config=config_of())
    return out


@pytest.fixture
def close():
    opened = []
    yield lambda packed: opened.append(packed) or packed
    for one in opened:
        one.close()


def test_what_the_folder_holds(folder, call, capsys):
    files = {path.name for path in folder.iterdir()}
    assert files == {
        ".pack", "dataset.yaml", "skipped.jsonl", "train", "test", "label.classes.json", "Series.statistics.json"
    }  # fmt: skip
    modalities = yaml.safe_load((folder / "dataset.yaml").read_text())["modalities"]
    assert modalities["label"]["absent"] == {"train": 14, "test": 3}
    assert modalities["image"]["parts"] == {"image": {"part": "", "shape": [4, 4, 1], "dtype": "uint8"}}
    assert modalities["label"]["parts"] == {"label": {"part": "", "shape": [1], "dtype": "int32", "states": 2}}
    fitted = build_codecs(config_of(), folder)
    assert fitted["label"].classes == ["even", "odd"]
    train = parts()[0]
    values = np.concatenate(
        [np.stack(v if isinstance(v, list) else [v]) for v in train.values["Series"] if v is not None]
    )
    assert np.allclose(fitted["Series"].mean.ravel(), values.mean((0, 2)))
    assert call("data", "check", folder) == 0
    output = capsys.readouterr().out
    assert "40 train, 10 test; 0 skipped" in output
    assert "label: label int32 (1,); 14 of train lack it; 3 of test lack it" in output


def test_both_readers_give_what_was_packed(folder, close):
    codecs = build_codecs(config_of(), folder)
    train = parts()[0]
    raw, seen = train.values, []
    data = [
        close(Packed(folder, codecs, loader=p.values[0])) for p in LOADERS if readers.installed(PACKAGES[p.values[0]])
    ]
    for step in range(10):  # two epochs of 40
        batches = [one.batch(3, step, range(8), 8) for one in data]
        for batch in batches[1:]:
            assert batch.keys() == batches[0].keys()
            assert all(torch.equal(batch[k], batches[0][k]) for k in batch)
        batch = batches[0]
        assert set(batch) == {"image", "label", "label:present", "Series", "Series:present"}
        numbers = _numbers(batch, codecs, raw)
        seen += numbers
        for k, i in enumerate(numbers):
            assert torch.equal(batch["image"][k], codecs["image"].encode(raw["image"][i : i + 1])[0])
            label, versions = raw["label"][i], raw["Series"][i]
            assert bool(batch["label:present"][k]) == (label is not None)
            if label is not None:
                assert codecs["label"].decode(batch["label"][k : k + 1]) == [label]
            assert bool(batch["Series:present"][k]) == (versions is not None)
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))


PACKAGES = {"dali": "nvidia.dali", "webdataset": "webdataset"}


def _numbers(batch, codecs, raw):
    """The row number of each sample of a batch, by its series; row 5 has none."""
    rows = [(i, v) for i, values in enumerate(raw["Series"]) if values is not None for v in _list(values)]
    known = codecs["Series"].encode([value for _, value in rows])
    numbers = []
    for x, present in zip(batch["Series"], batch["Series:present"].tolist(), strict=True):
        numbers.append(rows[int((known - x).abs().flatten(1).sum(1).argmin())][0] if present else 5)
    return numbers


def _list(values):
    return values if isinstance(values, list) else [values]


@pytest.mark.parametrize("loader", LOADERS)
def test_versions_are_chosen_evenly(folder, close, loader):
    data = close(Packed(folder, build_codecs(config_of(), folder), loader=loader))
    shifted, several = 0, 0
    for step in range(20):
        batch = data.batch(1, step, range(40), 40)
        numbers = _numbers(batch, data.codecs, parts()[0].values)
        raw = data.codecs["Series"].decode(batch["Series"]).mean((1, 2)) > 50.0
        several += sum(i % 4 == 0 for i in numbers)
        shifted += int(raw.sum())
    assert several == 200
    assert abs(shifted - 100) < 4 * 50**0.5  # four standard deviations


def test_held_out_examples_are_those_of_the_data_set(folder):
    codecs, (train, test) = build_codecs(config_of()), parts()
    fit_codecs(train, codecs, 0, "things")
    expected = encode(test, config_of(), codecs, "things")
    examples = Packed(folder, codecs, "test", loader="webdataset").examples()
    order = np.argsort(examples.labels["number"])
    assert examples.labels["number"][order].tolist() == list(range(40, 50))
    assert examples.raw.values["label"] == [test.values["label"][i - 40] for i in examples.labels["number"]]
    for name in ("image", "label", "Series"):
        assert torch.allclose(examples.x[name][order].double(), expected.x[name].double(), atol=1e-6)
    assert torch.equal(examples.present["label"][order], expected.present["label"])
    assert torch.equal(examples.versions["Series"][order], expected.versions["Series"])


def test_codecs_that_are_not_fitted_are_the_data_sets(folder, close):
    config = config_of(source=folder)
    codecs = build_codecs(config)
    train, test = load_packed(config, codecs)
    close(train)
    assert codecs["label"].classes == ["even", "odd"]
    assert train.present_share == {"label": 1 - 14 / 40, "Series": 1 - 1 / 40}
    assert len(test) == 10


def test_a_config_whose_codec_was_fitted_on_other_data_is_refused(folder):
    config = config_of(source=folder)
    codecs = build_codecs(config)
    codecs["label"].fit(["one", "two"])
    with pytest.raises(ValueError, match=r"classes.json of 'label' is not the one that .* was packed with"):
        load_packed(config, codecs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Series": {"length": 4}}, r"packed with shape = \[2, 8\], the config has \[2, 4\] for 'Series'"),
        ({"image": {"pixel_max": 255}}, "packed with pixel_max = 16"),
        ({"label": {"classes": ["even", "odd", "none"]}}, "classes.json of 'label' is not the one"),
        ({"sound": SECTIONS["Series"]}, "has no modality 'sound'; it has image, label, Series"),
    ],
)
def test_configs_that_do_not_fit(folder, change, message):
    sections = {m: {**SECTIONS.get(m, {}), **change.get(m, {})} for m in {**SECTIONS, **change}}
    with pytest.raises(ValueError, match=message):
        load_data(*(lambda config: (config, build_codecs(config)))(config_of(sections, folder)))


def test_some_modalities_under_other_names(folder, close):
    sections = {"picture": SECTIONS["image"]}
    config = config_of(sections, data={"source": str(folder), "fields": {"picture": "image"}, "loader": "webdataset"})
    train, test = load_packed(config, build_codecs(config))
    whole = Packed(folder, build_codecs(config_of(), folder), loader="webdataset")
    close(train), close(whole)
    batch = train.batch(0, 0, range(8), 8)
    assert set(batch) == set(test.x) == {"picture"}
    assert torch.equal(batch["picture"], whole.batch(0, 0, range(8), 8)["image"])


def test_training_resumes_bit_for_bit(folder, tmp_path):
    """Also with labels that examples lack."""
    config = config_of(source=folder)
    whole = Trainer(config, tmp_path / "a", "cpu", quiet=True)
    whole.run()
    Trainer(config, tmp_path / "b", "cpu", quiet=True).run(stop=2)
    resumed = Trainer(config, tmp_path / "b", "cpu", quiet=True)
    resumed.run()
    assert resumed.state.step == 4
    for a, b in zip(whole.state.net.parameters(), resumed.state.net.parameters(), strict=True):
        assert torch.equal(a, b)


# Packing


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user with the data, and a config file, in the working directory."""
    (tmp_path / "mythings.py").write_text(MODULE)
    raw = config_of().model_dump(mode="json")
    (tmp_path / "things.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "anystate"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_command_line_packs_what_a_config_says(call, module, capsys):
    args = ("data", "pack", "mythings:load", "--config", module / "things.yaml", "--shard-size", 16)
    assert call(*args, "--out", module / "one", "--test-share", 0.3) == 0
    assert "35 train, 15 test; 0 skipped" in capsys.readouterr().out
    torchrun(*args, "--out", module / "two", "--test-share", 0.3)
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if ".pack" not in p.parts and p.is_file()}
                for f in (module / "one", module / "two"))  # fmt: skip
    assert one == two
    before = {path: path.stat().st_mtime_ns for path in (module / "one/train").iterdir()}
    (module / "one/train/00001.tar").unlink()
    assert call(*args, "--out", module / "one", "--test-share", 0.3) == 0
    changed = [p.name for p in (module / "one/train").iterdir() if p.stat().st_mtime_ns != before[p]]
    assert sorted(changed) == ["00001.idx", "00001.tar"]
    assert (module / "one/train/00001.tar").read_bytes() == two[
        (module / "two/train/00001.tar").relative_to(module / "two")
    ]


def test_options_that_a_config_replaces_are_refused(refused, module):
    args = ("data", "pack", "mythings:load", "--config", module / "things.yaml", "--out", module / "set")
    assert "leave out the options for images and captions" in refused(*args, "--size", 4)
    raw = yaml.safe_load((module / "things.yaml").read_text())
    raw["modalities"]["Series"]["length"] = 4
    (module / "other.yaml").write_text(yaml.safe_dump(raw))
    assert "Series" in refused("data", "pack", "mythings:load", "--config", "other.yaml", "--out", module / "set")


class Broken:
    """Some examples cannot be read, others have a value that cannot be stored."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i == 3:
            raise ValueError("its file is damaged")
        series = np.full((2, 8), np.nan) if i == 7 else np.full((2, 8), i / 10)
        return {"image": np.full((4, 4), 20.0 if i == 9 else 2.0), "label": str(i % 2), "Series": series}


def test_examples_that_cannot_be_used_are_skipped_and_named(tmp_path):
    sections = {**SECTIONS, "Series": {**SECTIONS["Series"], "standardize": False}}
    source = DatasetSource("broken", (Broken(), parts()[1]))
    fixed = {**sections, "label": {**sections["label"], "classes": ["0", "1", "even", "odd"]}}
    manifest = pack(source, tmp_path / "set", Settings(), 0.2, config=config_of(fixed))
    assert (manifest.samples("train"), manifest.samples("test")) == (17, 10)
    skipped = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
    assert {entry["sample"]: entry["reason"] for entry in skipped} == {
        "broken:3": "its file is damaged",
        "broken:7": "Series: value 0 holds numbers that are not finite",
        "broken:9": "image: pixel values must lie in [0, 16]",
    }
    with pytest.raises(ValueError, match=r"of 30 samples cannot be used, more than --bad-share 0.05 allows"):
        pack(source, tmp_path / "other", Settings(), 0.05, config=config_of(fixed))


def test_names_that_webdataset_cannot_tell_apart(tmp_path):
    sections = {"image": SECTIONS["image"], "Image": SECTIONS["image"]}
    data = InMemory({m: np.zeros((4, 4, 4)) for m in sections})
    with pytest.raises(ValueError, match="two modalities are named image, but for capital letters"):
        pack(DatasetSource("x", (data, data)), tmp_path / "set", Settings(), config=config_of(sections))


def test_a_modality_that_no_training_example_has(tmp_path):
    sections = {**SECTIONS, "label": {**SECTIONS["label"], "classes": ["a"]}}
    data = InMemory({"image": np.zeros((4, 4, 4)), "label": [None] * 4, "Series": np.zeros((4, 2, 8))})
    with pytest.raises(ValueError, match="no usable training sample has the modality label"):
        pack(DatasetSource("x", (data, data)), tmp_path / "set", Settings(), config=config_of(sections))


def test_tables_are_packed_with_all_their_parts(tmp_path, close):
    """Numbers with missing cells, whose noise is new in every batch, and categories."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({
        "income": np.where(rng.random(300) < 0.2, np.nan, rng.normal(50, 10, 300)),
        "age": rng.normal(40, 9, 300).round(2),
        "job": rng.choice(["baker", "smith", "clerk"], 300),
    })  # fmt: skip
    sections = {"row": {"kind": "columns", "stream": STREAM}, "image": SECTIONS["image"]}
    images = np.zeros((300, 4, 4))
    train, test = (InMemory({"row": table.iloc[rows].reset_index(drop=True), "image": images[rows]}, {"number": rows})
                   for rows in (np.arange(200), np.arange(200, 300)))  # fmt: skip
    config = config_of(sections, tmp_path / "set")
    manifest = pack(DatasetSource("people", (train, test)), tmp_path / "set", Settings(shard_size=64), config=config)
    assert manifest.names == ["row_num", "row_cat", "image"]
    codecs = build_codecs(config)
    data, held_out = load_packed(config, codecs)
    close(data)
    first, again = (data.batch(0, step, range(200), 200) for step in (0, 1))
    assert first["row_num"].isfinite().all()
    assert abs(float(first["row_num"].mean())) < 0.2
    assert not set(first["row_num"].flatten().tolist()) >= set(again["row_num"].flatten().tolist())
    decoded = codecs["row"].decode({"num": held_out.x["row_num"], "cat": held_out.x["row_cat"].long()})
    expected = test.values["row"].iloc[held_out.labels["number"] - 200].reset_index(drop=True)
    assert np.allclose(decoded["age"], expected["age"], atol=0.05)
    assert decoded["job"].tolist() == expected["job"].tolist()
    assert decoded["income"].isna().tolist() == expected["income"].isna().tolist()


# Version 1, which had the sections image and text and nothing else


def write_version1(folder, text, files=()):
    """Twelve images of one grey each with one to three captions in the old layout; every third is held out."""
    shards = {}
    for split, numbers in (("train", [k for k in range(12) if k % 3]), ("test", range(0, 12, 3))):
        writer = ShardWriter(folder, f"{split}/00000.tar")
        for k in numbers:
            tokens = np.array([[1 + k % 2, 1 + v] for v in range(1 + k % 3)], np.int32)
            arrays = {"image": np.full((4, 4, 1), 20 * k, np.uint8), "text": tokens}
            writer.add(f"{k:09d}", arrays, {"captions": ["a"] * len(tokens), "source": f"x:{k}", "number": k})
        shards[split] = writer.close()
    raw = {
        "version": 1,
        "source": {"name": "x", "seed": 0, "test_share": 0.0},
        "image": {"kind": "pixels", "channels": 1, "size": 4, "pixel_max": 255.0, "mean": [0.1], "std": [0.5]},
        "text": text,
        "skipped": {"total": 0},
        "splits": {name: {"samples": shard.samples, "shards": [vars(shard)]} for name, shard in shards.items()},
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


CHARACTERS = {"kind": "characters", "length": 2, "states": 5, "pad": 0, "alphabet": "abcd", "captions": 23, "cut": 0}


@pytest.fixture
def version1(tmp_path):
    write_version1(tmp_path, CHARACTERS)
    sections = {
        "image": {"kind": "image", "channels": 1, "size": 4, "stream": STREAM},
        "text": {"kind": "text", "alphabet": "abcd", "length": 2, "stream": STREAM},
    }
    return tmp_path, config_of(sections, tmp_path)


def test_sets_of_version_1_are_read(version1, close, call, capsys):
    folder, config = version1
    train, test = load_packed(config, build_codecs(config))
    close(train)
    for step in range(6):
        batch = train.batch(7, step, range(8), 8)
        assert set(batch) == {"image", "text"}
        number = ((batch["image"][:, 0, 0, 0] + 1) * 127.5 / 20).round().long()
        assert sorted(number.tolist()) == [k for k in range(12) if k % 3]
        assert torch.equal(batch["text"][:, 0], 1 + number % 2)
        assert (batch["text"][:, 1] <= 1 + number % 3).all()
    assert test.labels["number"].tolist() == [0, 3, 6, 9]
    assert test.raw.values["text"] == [["a"]] * 4
    assert call("data", "check", folder) == 0
    output = capsys.readouterr().out
    assert "8 train, 4 test; 0 skipped" in output
    assert "alphabet: abcd" in output


def test_batches_of_version_1_never_change(version1, close):
    """Samples and captions of seed 7 and step 2, as computed by the program that wrote version 1."""
    _, config = version1
    train, _ = load_packed(config, build_codecs(config))
    close(train)
    batch = train.batch(7, 2, range(8), 8)
    assert ((batch["image"][:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist() == EXPECTED_NUMBERS
    assert batch["text"].tolist() == EXPECTED_TEXT


EXPECTED_NUMBERS = [4, 7, 2, 8, 10, 5, 1, 11]
EXPECTED_TEXT = [[1, 1], [2, 2], [1, 3], [1, 2], [1, 1], [2, 1], [2, 2], [2, 2]]


def test_version_1_with_a_tokenizer(tmp_path):
    from anystate.model.codecs.subwords import train_bpe

    tokenizer = train_bpe(["some words", "more words"], 270)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    special = {"pad": 0, "start": None, "end": None}
    states = tokenizer.get_vocab_size()
    write_version1(tmp_path, {"kind": "bpe", "length": 2, "states": states, **special, "file": "tokenizer.json"})
    path = str(tmp_path / "tokenizer.json")
    sections = {
        "image": {"kind": "image", "channels": 1, "size": 4, "stream": STREAM},
        "text": {"kind": "text", "length": 2, "stream": STREAM,
                 "tokenizer": {"kind": "bpe", "path": path, "states": states, "pad": 0}},
    }  # fmt: skip
    config = config_of(sections, tmp_path)
    codecs = build_codecs(config)
    _, test = load_packed(config, codecs)
    assert len(test) == 4
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    other["model"]["merges"][:2] = reversed(other["model"]["merges"][:2])
    (tmp_path / "other.json").write_text(json.dumps(other))
    sections["text"]["tokenizer"]["path"] = str(tmp_path / "other.json")
    config = config_of(sections, tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json of 'text' is not the one"):
        load_packed(config, build_codecs(config))
    assert Manifest.load(tmp_path).modalities["text"].settings["tokenizer"]["kind"] == "bpe"
