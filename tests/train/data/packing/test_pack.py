"""Packing: all sources, skipped samples, resuming, and compatibility of the shards with other tools."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from anystate.model.codecs.subwords import TokenizerCodec, train_bpe
from anystate.model.codecs.vae import LatentCodec, center_crop
from anystate.tests.train.data.conftest import arrays, codecs_of
from anystate.train.data.packed.manifest import Manifest
from anystate.train.data.packed.packed import Packed
from anystate.train.data.packed.shards import read_npy
from anystate.train.data.packing import packer
from anystate.train.data.packing.image_text import Settings
from anystate.train.data.packing.open import open_source
from anystate.train.data.packing.pack import pack


def packed_of(source, out, settings=None, **options):
    return pack(open_source(str(source)), out, settings or Settings(), **options)


def examples_of(folder, split="train"):
    return Packed(folder, codecs_of(folder), split, loader="webdataset").examples()


def texts_of(examples):
    return examples.raw.values["text"]


def test_an_npz_through_the_command_line(call, source, tmp_path, capsys):
    assert call("data", "pack", source, "--out", tmp_path / "set", "--shard-size", 16) == 0
    assert "60 train, 10 test; 0 skipped" in capsys.readouterr().out
    about = yaml.safe_load((tmp_path / "set/dataset.yaml").read_text())
    assert {s: p["samples"] for s, p in about["splits"].items()} == {"train": 60, "test": 10}
    assert [s["samples"] for s in about["splits"]["train"]["shards"]] == [15] * 4
    letters = sorted(set("".join(arrays()["captions"])))
    image, text = about["modalities"]["image"], about["modalities"]["text"]
    assert text["codec"]["alphabet"] == "".join(letters)
    assert text["codec"]["length"] == max(len(c) for c in arrays()["captions"])
    x = arrays()["images"] / 127.5 - 1.0
    statistics = image["about"]["statistics"]["image"]
    assert statistics["mean"] == pytest.approx(x.mean((0, 1, 2)), abs=1e-6)
    assert statistics["std"] == pytest.approx(x.std((0, 1, 2)), abs=1e-6)
    assert call("data", "check", tmp_path / "set") == 0


def test_indices_are_those_of_nvidias_tool(packed, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI is not installed")
    for name in ("train/00001", "test/00000"):
        with wds2idx.IndexCreator(str(packed / f"{name}.tar"), str(tmp_path / "x.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "x.idx").read_text() == (packed / f"{name}.idx").read_text()


def test_shards_are_what_webdataset_reads(packed):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(packed / "train/00000.tar"), shardshuffle=False))
    assert len(samples) == 15
    for sample in samples:
        labels = json.loads(sample["json"])
        row = labels["number"]
        assert sample["__key__"] == f"{row:09d}"
        assert labels["captions"] == [arrays()["captions"][row]]
        assert labels["word"] == labels["captions"][0].split()[0]
        assert np.array_equal(read_npy(sample["image.npy"]), arrays()["images"][row])
        assert read_npy(sample["text.npy"]).dtype == np.int32


def test_samples_are_shuffled_over_the_shards(packed):
    numbers = examples_of(packed).labels["number"]
    assert sorted(numbers) == list(range(60))
    assert abs(np.corrcoef(numbers, np.arange(60))[0, 1]) < 0.5  # four standard deviations


def test_packing_again_does_only_what_is_missing(source, tmp_path, monkeypatch):
    out, settings = tmp_path / "set", Settings(shard_size=16)
    packed_of(source, out, settings)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    times = {p: p.stat().st_mtime_ns for p in (out / "train").iterdir()}
    (out / "train/00002.tar").unlink()
    work = []
    real = packer.Packer._pack_job

    def record(self, job, *args):
        work.append(job.name)
        return real(self, job, *args)

    monkeypatch.setattr(packer.Packer, "_pack_job", record)
    packed_of(source, out, settings)
    assert work == ["train/00002"]
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert all(p.stat().st_mtime_ns == times[p] for p in (out / "train").iterdir() if "00002" not in p.name)


def test_a_killed_run_resumes_without_incomplete_shards(source, tmp_path, monkeypatch):
    out, settings = tmp_path / "set", Settings(shard_size=16)
    real, calls = packer.Store.add_moments, []

    def dies(self, *args):
        calls.append(self.about.codec["kind"])
        if calls.count("pixels") == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(packer.Store, "add_moments", dies)
    with pytest.raises(KeyboardInterrupt):
        packed_of(source, out, settings)
    assert sorted(p.name for p in (out / "train").iterdir()) == ["00000.idx", "00000.tar", "00001.idx", "00001.tar"]
    assert not (out / "dataset.yaml").exists()
    monkeypatch.undo()
    assert packed_of(source, out, settings).samples("train") == 60


def test_other_settings_are_refused(source, packed, tmp_path):
    out = shutil.copytree(packed, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"begun with seed = 0, not 1; choose another --out"):
        packed_of(source, out, Settings(shard_size=16, seed=1))


def test_a_folder_with_something_else_is_refused(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        packed_of(source, tmp_path)


def test_held_out_share(tmp_path):
    np.savez(tmp_path / "x.npz", **{k: v for k, v in arrays().items() if k != "split"})
    packed_of(tmp_path / "x.npz", tmp_path / "set", Settings(test_share=0.2))
    train, test = (examples_of(tmp_path / "set", s).labels["number"].tolist() for s in ("train", "test"))
    assert (len(train), len(test)) == (56, 14)
    assert sorted(train + test) == list(range(70))


def torchrun(*args, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "anystate", *map(str, args)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_ranks_write_the_same_shards_as_one(source, packed, tmp_path):
    torchrun("data", "pack", source, "--out", tmp_path / "set", "--shard-size", 16)
    one, two = ({p.name: p.read_bytes() for p in sorted((f / "train").iterdir())} for f in (packed, tmp_path / "set"))
    assert one == two
    assert (tmp_path / "set/dataset.yaml").read_text() == (packed / "dataset.yaml").read_text()


# Latents and tokens


def test_latents_and_clip_tokens_through_the_command_line(call, source, vae, clip_tokenizer, tmp_path):
    out = tmp_path / "set"
    kinds = ["--latents", "--vae", vae, "--scale", 0.5, "--size", 8, "--text", "clip", "--tokenizer", clip_tokenizer]
    assert call("data", "pack", source, "--out", out, *kinds, "--device", "cpu") == 0
    about = Manifest.load(out).modalities
    assert about["image"].settings == {
        "kind": "image", "channels": 4, "size": 4, "latents": {"vae": str(vae), "scale": 0.5}
    }  # fmt: skip
    data = Packed(out, codecs_of(out), loader="webdataset")
    examples = data.examples()
    number = int(examples.labels["number"][0])
    codec = LatentCodec(str(vae), 0.5, 4, 4, "cpu")
    image = center_crop(arrays()["images"][number], 8)[None]
    mean, std = codec.moments(image)
    assert np.allclose(examples.x["image"][0], mean[0] * 0.5, atol=1e-3)  # stored in half precision
    stored = data.shards.read(0, 0)["image"]
    assert stored.dtype == np.float16
    assert np.allclose(stored, np.concatenate([mean[0], std[0]]), atol=1e-3)
    tokens = TokenizerCodec(out / "text.tokenizer.json", about["text"].codec["length"], 76, 75, 74, 75)
    shown = [c.replace(" ", "") for c in tokens.decode(examples.first(slice(None))["text"])]  # CLIP separates digits
    assert shown == [t[0].replace(" ", "") for t in texts_of(examples)]
    both = torch.cat([examples.x["image"], examples_of(out, "test").x["image"]])
    assert about["image"].about["statistics"]["image"]["mean"] == pytest.approx(both.mean((0, 2, 3)).tolist(), abs=1e-3)


def test_size_must_suit_the_autoencoder(source, vae, tmp_path):
    with pytest.raises(ValueError, match=r"--size 7: the autoencoder .* needs a multiple of 2"):
        packed_of(source, tmp_path / "set", Settings(vae=str(vae), size=7), device="cpu")


def test_bpe_tokens(source, tmp_path):
    about = packed_of(source, tmp_path / "set", Settings(text="bpe", states=300)).modalities["text"].codec
    examples = examples_of(tmp_path / "set")
    codec = TokenizerCodec(tmp_path / "set/text.tokenizer.json", about["length"], about["states"])
    assert about["states"] <= 300
    assert codec.decode(examples.x["text"]) == [t[0] for t in texts_of(examples)]
    assert (examples.x["text"] != 0).sum(-1).max() == about["length"]


def test_a_file_that_is_not_a_clip_tokenizer(source, tmp_path):
    train_bpe(["a b"], 260).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not a CLIP tokenizer"):
        packed_of(source, tmp_path / "set", Settings(text="clip", tokenizer=str(tmp_path / "tokenizer.json")))


# Folders of images


@pytest.fixture
def image_folder(tmp_path):
    """Eight images of 6×4 pixels: a bright square of 4×4 between a black column on each side."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    pixels = np.zeros((4, 6, 3), np.uint8)
    for k in range(8):
        pixels[:, 1:5] = 255 - k
        Image.fromarray(pixels).save(folder / (f"sub/p{k}.png" if k % 2 else f"p{k}.png"))
    return folder


def name(k):
    return f"sub/p{k}.png" if k % 2 else f"p{k}.png"


def outside(folder):
    return folder.parent / "outside.png"


def sidecars(folder):
    for k in range(8):
        (folder / name(k)).with_suffix(".txt").write_text(f"image {k}\n\nnumber {k}\n")


def captions_json(folder):
    (folder / "captions.json").write_text(json.dumps({name(k): [f"image {k}", f"number {k}"] for k in range(8)}))


def captions_list(folder):
    entries = [{"file": name(k), "captions": [f"image {k}", f"number {k}"]} for k in range(8)]
    (folder / "captions.json").write_text(json.dumps(entries))


def captions_csv(folder):
    with open(folder / "all.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "caption"])
        for k in range(8):
            table.writerows([[name(k), f"image {k}"], [name(k), f"number {k}"]])


@pytest.mark.parametrize("write", [sidecars, captions_json, captions_list, captions_csv])
def test_a_folder_of_images(image_folder, tmp_path, write):
    write(image_folder)
    packed_of(image_folder, tmp_path / "set")
    examples = examples_of(tmp_path / "set")
    assert examples.x["image"].shape == (8, 3, 4, 4)
    for k, texts, x in zip(examples.labels["source"], texts_of(examples), examples.x["image"], strict=True):
        number = int(k[-5])
        assert texts == [f"image {number}", f"number {number}"]
        assert np.allclose(x, (255 - number) / 127.5 - 1.0)  # the middle, without the black columns
    assert examples.x["text"].shape[1] == 2


def test_folders_named_train_and_test_are_the_split(image_folder, tmp_path):
    sidecars(image_folder)
    for split, keep in (("train", range(6)), ("test", range(6, 8))):
        (image_folder / split).mkdir()
        for k in keep:
            for suffix in (".png", ".txt"):
                file = (image_folder / name(k)).with_suffix(suffix)
                file.rename(image_folder / split / file.name)
    manifest = packed_of(image_folder, tmp_path / "set")
    assert {s: manifest.samples(s) for s in manifest.splits} == {"train": 6, "test": 2}


def test_faults_of_a_folder_are_skipped_counted_and_named(call, refused, image_folder, tmp_path, capsys):
    sidecars(image_folder)
    (image_folder / "p0.png").write_bytes(b"not an image")
    data = (image_folder / "p2.png").read_bytes()
    (image_folder / "p2.png").write_bytes(data[: len(data) // 2])
    (image_folder / "sub/p1.txt").unlink()
    (image_folder / "sub/p3.txt").write_text(" \n")
    args = ("data", "pack", image_folder, "--out", tmp_path / "set", "--size", 4)
    error = refused(*args)
    assert "2 of 8 samples cannot be used, more than --bad-share 0.01 allows" in error
    assert "skipped.jsonl" in error
    assert call(*args, "--bad-share", 0.5) == 0
    assert "4 train; 4 skipped" in capsys.readouterr().out
    skipped = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
    assert {e["sample"]: e["reason"] for e in skipped} == {
        "p0.png": "image: not a readable image",
        "p2.png": "image: not a readable image",
        "sub/p1.png": "text: missing",
        "sub/p3.png": "text: missing",
    }
    assert Manifest.load(tmp_path / "set").skipped == {
        "total": 4, "image: not a readable image": 2, "text: missing": 2
    }  # fmt: skip


def test_one_broken_image_is_always_allowed(image_folder, tmp_path):
    captions_json(image_folder)
    (image_folder / "p4.png").unlink()
    assert packed_of(image_folder, tmp_path / "set").skipped == {"total": 1, "image: not a readable image": 1}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "no array, column or file 'text'"),
        (lambda folder: (folder / "captions.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "captions.json").write_text('["p0.png"]'), "expected an object"),
        (lambda folder: (folder / "captions.json").write_text('{"../outside.png": "a"}'), "leads out"),
        (lambda folder: (folder / "captions.json").write_text(json.dumps({str(outside(folder)): "a"})), "leads out"),
        (lambda folder: (folder / "a.csv").write_text("name,title\n1,2\n"), "no array, column or file 'image'"),
        (lambda folder: [(folder / n).write_text("file,caption\n") for n in ("a.csv", "b.csv")], "several tables"),
    ],
)
def test_folders_that_cannot_be_packed(image_folder, tmp_path, write, message):
    shutil.copy(image_folder / "p0.png", outside(image_folder))
    write(image_folder)
    with pytest.raises(ValueError, match=message):
        packed_of(image_folder, tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("captions"), "no array, column or file 'text'"),
        (lambda a: a.update(captions=a["captions"][:5]), "70 of image, 5 of text"),
        (lambda a: a.update(images=a["images"] * 1.5), "whole numbers from 0 to 255"),
        (lambda a: a.update(split=np.full(70, "dev")), "split 'dev'"),
    ],
)
def test_npz_files_that_cannot_be_packed(tmp_path, change, message):
    content = arrays()
    change(content)
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(ValueError, match=message):
        packed_of(tmp_path / "x.npz", tmp_path / "set")


def test_a_sample_with_a_character_outside_the_alphabet_is_skipped(tmp_path):
    content = arrays()
    content["captions"][3] = "ünknown"
    np.savez(tmp_path / "x.npz", **content)
    alphabet = "".join(sorted(set("".join(arrays()["captions"]))))
    manifest = packed_of(tmp_path / "x.npz", tmp_path / "set", Settings(alphabet=alphabet))
    assert manifest.skipped["total"] == 1
    assert "outside the vocabulary" in json.loads((tmp_path / "set/skipped.jsonl").read_text())["reason"]


def test_long_captions_are_truncated_and_counted(source, tmp_path):
    manifest = packed_of(source, tmp_path / "set", Settings(length=11))
    long = sum(len(c) > 11 for c in arrays()["captions"])
    assert 0 < long < 70
    assert manifest.modalities["text"].about == {"values": 70, "truncated": long}


@pytest.mark.parametrize("size", [4, 3])
def test_requested_size(source, tmp_path, size):
    packed_of(source, tmp_path / "set", Settings(size=size))
    assert examples_of(tmp_path / "set").x["image"].shape == (60, 3, size, size)


def test_no_such_source():
    with pytest.raises(ValueError, match=r"source 'nowhere.npz' not found"):
        open_source("nowhere.npz")


def test_a_name_of_the_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_source("someone/something")


# Tables


def table():
    pyarrow = pytest.importorskip("pyarrow")
    images, captions = arrays()["images"], arrays()["captions"]
    rows = []
    for k in range(70):
        buffer = io.BytesIO()
        Image.fromarray(images[k]).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption": [captions[k], "x"], "number": k})
    return pyarrow.Table.from_pylist(rows)


def write_arrow(folder):
    import pyarrow

    for name, part in (("data-train-0.arrow", table()[:60]), ("test/data-0.arrow", table()[60:])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part)


def write_parquet(folder):
    from pyarrow import parquet

    folder.mkdir()
    for name, part in (("train-0", table()[:33]), ("train-1", table()[33:60]), ("validation-0", table()[60:])):
        parquet.write_table(part, folder / f"{name}-of-2.parquet", row_group_size=10)


def check_packed_table(source, out):
    packed_of(source, out, Settings(shard_size=25))
    for split, rows in (("train", range(60)), ("test", range(60, 70))):
        examples = examples_of(out, split)
        numbers = examples.labels["number"].tolist()
        assert sorted(numbers) == list(rows)
        assert texts_of(examples) == [[arrays()["captions"][k], "x"] for k in numbers]
        assert np.array_equal(((examples.x["image"][:, 0, 0, 0] + 1) * 127.5).round(), numbers)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
@pytest.mark.parametrize("write", [write_arrow, write_parquet])
def test_packing_tables(tmp_path, write):
    write(tmp_path / "tables")
    check_packed_table(tmp_path / "tables", tmp_path / "set")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_tables_that_cannot_be_packed(tmp_path):
    write_parquet(tmp_path / "tables")
    with pytest.raises(ValueError, match="no column title; it has image, caption, number; see --caption-column"):
        open_source(str(tmp_path / "tables"), caption_column="title")
    (tmp_path / "bad.parquet").write_text("x")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        open_source(str(tmp_path / "bad.parquet"))
    (tmp_path / "bad.arrow").write_text("x")
    with pytest.raises(ValueError, match="not a readable Arrow file"):
        open_source(str(tmp_path / "bad.arrow"))


def test_a_data_set_of_the_datasets_library(tmp_path, monkeypatch):
    """`load_dataset` is called with a local Parquet file in place of a hub id."""
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    write_parquet(tmp_path / "tables")
    real, files = datasets.load_dataset, {s: str(tmp_path / f"tables/{s}-*.parquet") for s in ("train", "validation")}

    def load(name):
        assert name == "someone/things"
        loaded = real("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
        return loaded.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    check_packed_table("someone/things", tmp_path / "set")
