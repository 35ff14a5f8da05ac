"""Packed data: both readers give the same batches, which are functions of (seed, step, rows) alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from anystate.model.codecs.base import ArraySpec
from anystate.model.codecs.pixels import PixelCodec
from anystate.model.codecs.vae import noise
from anystate.tests.train.data.conftest import codecs_of
from anystate.train.data.epochs import shard_rows
from anystate.train.data.packed import packed as module
from anystate.train.data.packed import readers
from anystate.train.data.packed.manifest import Manifest, PackedModality
from anystate.train.data.packed.packed import Packed, noise_seeds
from anystate.train.data.packed.shards import ShardWriter

LOADERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not readers.installed(package), reason=f"{name} is not installed"),
    )
    for name, package in (("dali", "nvidia.dali"), ("webdataset", "webdataset"))
]


def rows_of(batch) -> list[int]:
    """The row numbers of the images of a batch, from their first channel."""
    return ((batch["image"][:, 0, 0, 0] + 1.0) * 127.5).round().long().tolist()


@pytest.fixture
def load(packed):
    opened = []

    def open_it(loader="webdataset", folder=packed, **options):
        opened.append(Packed(folder, codecs_of(folder), loader=loader, **options))
        return opened[-1]

    yield open_it
    for one in opened:
        one.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_every_epoch_holds_every_image_with_its_caption(load, loader, packed):
    data = load(loader)
    codec = codecs_of(packed)["text"]
    epochs = []
    for epoch in range(3):
        seen = []
        for step in range(epoch * 5, epoch * 5 + 5):  # 60 samples in 5 batches of 12
            batch = data.batch(1, step, range(12), 12)
            assert batch["image"].shape == (12, 3, 4, 4)
            assert batch["image"].dtype == torch.float32
            assert batch["text"].dtype == torch.int64
            rows = rows_of(batch)
            assert [int(c.split()[-1]) for c in codec.decode(batch["text"])] == rows
            raw = np.broadcast_to(np.array(rows)[:, None, None, None] ** 2 % 251, (12, 4, 4, 1))
            assert torch.equal(batch["image"][:, 1:2], PixelCodec(1, 4).encode(raw))
            seen += rows
        assert sorted(seen) == list(range(60))
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.skipif(not readers.installed("nvidia.dali"), reason="DALI is not installed")
@pytest.mark.parametrize("flip", [False, True])
def test_both_readers_give_the_same_batches(load, flip):
    """Batches of 16 span epochs, and 30 of them span several plans of the reader."""
    dali, plain = load("dali", flip=flip), load("webdataset", flip=flip)
    for step in range(30):
        a, b = (data.batch(5, step, range(16), 16) for data in (dali, plain))
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["text"], b["text"])


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_do_not_depend_on_the_plan_length(load, loader, monkeypatch):
    whole = [load(loader).batch(2, step, range(8), 8) for step in range(9)]
    monkeypatch.setattr(module, "MAX_PLAN_SAMPLES", 16)
    data = load(loader)
    for step, expected in enumerate(whole):
        assert torch.equal(data.batch(2, step, range(8), 8)["image"], expected["image"])


@pytest.mark.parametrize("loader", LOADERS)
def test_ranks_and_resuming_see_the_same_data(load, loader):
    whole, again = load(loader), load(loader)
    parts = [load(loader) for _ in range(3)]
    expected = [whole.batch(9, step, range(12), 12) for step in range(8)]
    for step in range(8):
        got = [part.batch(9, step, range(4 * r, 4 * r + 4), 12) for r, part in enumerate(parts)]
        for name, value in expected[step].items():
            assert torch.equal(torch.cat([g[name] for g in got]), value)
    for step in (6, 2, 3, 7):  # any order, forwards and back
        assert torch.equal(again.batch(9, step, range(12), 12)["image"], expected[step]["image"])


def test_parts_of_one_batch_have_separate_prefetchers(load):
    """Gradient accumulation reads several parts of each step alternately, without new prefetchers."""
    data = load()
    data.batch(0, 0, range(3), 6), data.batch(0, 0, range(3, 6), 6)
    prefetchers = list(data.prefetchers.values())
    for step in (1, 2, 3):
        data.batch(0, step, range(3), 6), data.batch(0, step, range(3, 6), 6)
    assert list(data.prefetchers.values()) == prefetchers


def test_seeds_differ(load):
    data = load()
    assert rows_of(data.batch(0, 0, range(30), 30)) != rows_of(data.batch(1, 0, range(30), 30))


def test_flip_mirrors_about_half(load, tmp_path):
    writer = ShardWriter(tmp_path, "train/00000.tar")
    image = np.broadcast_to(np.array([0, 0, 255, 255], np.uint8)[None, :, None], (4, 4, 1))
    writer.add("0", {"image": image, "text": np.ones((1, 2), np.int32)}, {"captions": ["x"]})
    one_shard(tmp_path, writer.close(), PIXELS | {"size": 4})
    x = load(folder=tmp_path, flip=True).batch(0, 0, range(400), 400)["image"]
    mirrored = x[:, 0, 0, 0] == 1.0
    assert torch.equal(x[~mirrored][0], -x[mirrored][0])
    assert abs(mirrored.float().mean() - 0.5) < 0.1  # four standard deviations


PIXELS = {"kind": "pixels", "channels": 1, "size": 2, "pixel_max": 255.0}
TEXT = {"kind": "characters", "length": 2, "states": 3, "pad": 0, "alphabet": "ab"}


def one_shard(folder, shard, image):
    c, s = image["channels"], image["size"]
    pixels = image["kind"] == "pixels"
    spec = ArraySpec((s, s, c), "uint8") if pixels else ArraySpec((2 * c, s, s), "float16")
    modalities = {
        "image": PackedModality({"": "image"}, {"": spec}, image, versions=False),
        "text": PackedModality({"": "text"}, {"": ArraySpec((2,), "int32", 3)}, TEXT, raw="captions"),
    }
    Manifest(folder, modalities, {"train": [shard]}).save()


@pytest.fixture
def latents(tmp_path):
    """Two samples of latents, each with three captions: [1, 1], [2, 2], [1, 2]."""
    writer = ShardWriter(tmp_path, "train/00000.tar")
    rng = np.random.default_rng(0)
    stored = [np.concatenate([rng.normal(size=(2, 8, 8)), np.full((2, 8, 8), s)]).astype(np.float16) for s in (0.5, 2)]
    for key, moments in enumerate(stored):
        tokens = np.array([[1, 1], [2, 2], [1, 2]], np.int32)
        writer.add(str(key), {"image": moments, "text": tokens}, {"captions": ["a", "b", "c"]})
    one_shard(tmp_path, writer.close(), {"kind": "latents", "channels": 2, "size": 8, "scale": 0.2, "vae": "x"})
    return tmp_path, stored


@pytest.mark.parametrize("loader", LOADERS)
def test_latents_are_sampled_with_their_mean_and_deviation(load, latents, loader):
    folder, stored = latents
    data = load(loader, folder=folder)
    x = data.batch(3, 0, range(600), 600)["image"]
    assert torch.equal(x, load("webdataset", folder=folder).batch(3, 0, range(600), 600)["image"])
    means = [torch.from_numpy(s[:2]).float() * 0.2 for s in stored]
    first = torch.stack([(x - m).square().mean((1, 2, 3)) for m in means]).argmin(0) == 0
    for mine, mean, std in ((first, means[0], 0.1), (~first, means[1], 0.4)):
        residual = (x[mine] - mean) / std
        assert abs(residual.mean()) < 4 / residual.numel() ** 0.5
        assert abs(residual.std() - 1) < 4 / (2 * residual.numel()) ** 0.5
        assert not torch.equal(x[mine][0], x[mine][1])
    # no two samples share their noise: the largest correlation between neighbours is what chance gives
    flat = residual.flatten(1)
    assert (flat[:-1] * flat[1:]).mean(1).abs().max() < 5 / flat.shape[1] ** 0.5


@pytest.mark.parametrize("loader", LOADERS)
def test_captions_are_chosen_evenly(load, latents, loader):
    text = load(loader, folder=latents[0]).batch(3, 0, range(900), 900)["text"]
    counts = torch.tensor([(text == torch.tensor(c)).all(1).sum() for c in ([1, 1], [2, 2], [1, 2])])
    assert counts.sum() == 900
    assert (counts - 300).abs().max() < 4 * (900 * 2 / 9) ** 0.5


def test_different_numbers_of_captions(load, tmp_path):
    writer = ShardWriter(tmp_path, "train/00000.tar")
    for key, m in enumerate((1, 3, 2)):
        arrays = {"image": np.full((2, 2, 1), key, np.uint8), "text": np.full((m, 2), m - 1, np.int32)}
        writer.add(str(key), arrays, {"captions": ["a"] * m})
    one_shard(tmp_path, writer.close(), PIXELS)
    a, b = (load(loader, folder=tmp_path).batch(0, 0, range(9), 9) for loader in ("auto", "webdataset"))
    assert torch.equal(a["text"], b["text"])
    key = ((a["image"][:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(a["text"][:, 0], torch.tensor([0, 2, 1])[key])


def test_latents_are_not_mirrored(latents):
    with pytest.raises(ValueError, match="flip works on pixels"):
        Packed(latents[0], codecs_of(latents[0]), flip=True)


def test_noise_is_a_function_of_the_seed_of_each_row():
    a, b = noise([7, 8, 9], (4, 8, 8)), noise([9, 7], (4, 8, 8))
    assert torch.equal(a[2], b[0])
    assert torch.equal(a[0], b[1])


def test_noise_seeds_are_all_different():
    seeds = noise_seeds(12, np.arange(1 << 20) + (1 << 33) - 1000)
    assert len(set(seeds)) == 1 << 20
    assert set(noise_seeds(13, np.arange(1000))) != set(seeds[1000:2000])


def test_held_out_examples_in_memory(load):
    examples = load(split="test").examples()
    assert len(examples) == 10
    rows = ((examples.x["image"][:, 0, 0, 0] + 1.0) * 127.5).round().long().tolist()
    assert sorted(rows) == list(range(60, 70))
    texts = examples.raw.values["text"]
    assert [text[0].split()[-1] for text in texts] == [str(r) for r in rows]
    assert examples.labels["number"].tolist() == rows
    assert examples.labels["word"].tolist() == [text[0].split()[0] for text in texts]
    assert len(load(split="test").examples(limit=3)) == 3


def test_held_out_examples_keep_all_captions(load, latents):
    examples = load(folder=latents[0]).examples()
    assert examples.x["text"].tolist() == [[[1, 1], [2, 2], [1, 2]]] * 2
    assert examples.versions["text"].tolist() == [3, 3]
    means = torch.from_numpy(np.stack([s[:2] for s in latents[1]])).float() * 0.2
    assert torch.equal(examples.x["image"], means)


def test_order_of_an_epoch_goes_shard_by_shard():
    shards, samples = shard_rows((3, 5, 2), 4, np.arange(20))
    for epoch in (slice(0, 10), slice(10, 20)):
        assert len(np.flatnonzero(np.diff(shards[epoch]))) == 2
        assert sorted(zip(shards[epoch].tolist(), samples[epoch].tolist(), strict=True)) == [
            (k, i) for k, n in enumerate((3, 5, 2)) for i in range(n)
        ]


# Errors


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def edit(folder, change):
    raw = yaml.safe_load((folder / "dataset.yaml").read_text())
    change(raw)
    (folder / "dataset.yaml").write_text(yaml.safe_dump(raw))


@pytest.mark.parametrize("loader", LOADERS)
def test_truncated_shard(load, copy, loader):
    tar = copy / "train/00002.tar"
    tar.write_bytes(tar.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"train/00002.tar is truncated"):
        [load(loader, folder=copy).batch(0, step, range(20), 20) for step in range(3)]


def test_changed_shard(load, copy):
    tar = copy / "train/00001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"train/00001.tar was changed"):
        [load(folder=copy).batch(0, step, range(20), 20) for step in range(3)]


def test_index_of_another_shard(load, copy):
    shutil.copy(copy / "train/00000.idx", copy / "train/00003.idx")
    with pytest.raises(ValueError, match=r"train/00003.idx does not match its shard 00003.tar"):
        [load(folder=copy).batch(0, step, range(20), 20) for step in range(3)]


def test_missing_shard(load, copy):
    (copy / "train/00000.tar").unlink()
    with pytest.raises(ValueError, match=r"train/00000.tar is missing"):
        [load(folder=copy).batch(0, step, range(20), 20) for step in range(3)]


@pytest.mark.parametrize("name", ["../elsewhere.tar", "/etc/passwd"])
def test_manifest_with_a_path_outside_the_folder(copy, name):
    edit(copy, lambda raw: raw["splits"]["train"]["shards"][0].update(file=name))
    with pytest.raises(ValueError, match="leads out"):
        Packed(copy, {})


def test_manifest_with_a_tokenizer_outside_the_folder(copy):
    edit(copy, lambda raw: raw["modalities"]["text"].update(files={"tokenizer.json": "../tokenizer.json"}))
    with pytest.raises(ValueError, match="leads out"):
        Packed(copy, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(version=7), "version 7"),
        (lambda raw: raw.pop("modalities"), "not a readable description"),
        (lambda raw: raw["modalities"]["image"].pop("parts"), "not a readable description"),
        (lambda raw: raw["splits"].pop("train"), "no split 'train'"),
    ],
)
def test_invalid_manifests(copy, change, message):
    edit(copy, change)
    with pytest.raises(ValueError, match=message):
        Packed(copy, {})


def test_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="not a packed data set"):
        Packed(tmp_path, {})


def test_unknown_loader(packed):
    with pytest.raises(ValueError, match="auto, dali, webdataset"):
        Packed(packed, codecs_of(packed), loader="tar")


GOOD = np.zeros((2, 2, 1), np.uint8), np.ones((1, 2), np.int32)
FAULTS = {
    "token": ((GOOD[0], np.full((1, 2), 3, np.int32)), "token 3 is beyond the vocabulary of 3"),
    "shape": ((np.zeros((3, 2, 1), np.uint8), GOOD[1]), r"shape \(3, 2, 1\)"),
    "length": ((GOOD[0], np.ones((1, 3), np.int32)), r"its text has shape \(1, 3\)"),
    "empty": ((GOOD[0], np.ones((0, 2), np.int32)), "its text is empty"),
    "broken": (None, "image cannot be read"),
}


def with_fault(folder, fault, n=20):
    """n good samples and a bad one after the seventh."""
    writer = ShardWriter(folder, "train/00000.tar")
    for key in range(n):
        arrays = {"image": np.full((2, 2, 1), key, np.uint8), "text": GOOD[1]}
        writer.add(f"{key:03d}", arrays, {"captions": ["a"]})
        if key == 6:
            image, tokens = FAULTS[fault][0] or GOOD
            writer.add("bad", {"image": image, "text": tokens}, {"captions": ["a"]})
    shard = writer.close()
    if FAULTS[fault][0] is None:
        tar = folder / shard.file
        data = tar.read_bytes()
        at = data.index(b"bad.image.npy") + 512
        tar.write_bytes(data[:at] + b"NOT A NUMPY FILE" + data[at + 16 :])
    one_shard(folder, shard, PIXELS)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_sample_is_replaced(load, tmp_path, fault):
    folder, log = with_fault(tmp_path, fault), tmp_path / "log/bad.jsonl"
    both = [load(loader, folder=folder, checksums=False, log=log) for loader in ("auto", "webdataset")]
    seen = []
    for step in range(12):  # four epochs of 21
        a, b = (data.batch(0, step, range(7), 7) for data in both)
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["text"], b["text"])
        seen += ((a["image"][:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
    counts = np.bincount(seen, minlength=20)
    assert counts[7] == 8  # number 7 replaces the bad sample
    assert (np.delete(counts, 7) == 4).all()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 2  # one of each reader
    assert lines[0]["sample"].endswith("00000.tar: bad")
    assert [len(data.bad) for data in both] == [1, 1]
    with pytest.raises(ValueError, match=FAULTS[fault][1]) as error:
        load(folder=folder, checksums=False, bad_share=0.0).batch(0, 0, range(21), 21)
    assert "00000.tar: bad" in str(error.value)


def test_latents_that_are_not_finite(load, tmp_path):
    writer = ShardWriter(tmp_path, "train/00000.tar")
    for key, value in (("a", 0.0), ("b", np.inf), ("c", 1.0)):
        writer.add(key, {"image": np.full((4, 2, 2), value, np.float16), "text": GOOD[1]}, {"captions": ["a"]})
    one_shard(tmp_path, writer.close(), {"kind": "latents", "channels": 2, "size": 2, "scale": 1.0, "vae": "x"})
    data = load(folder=tmp_path)
    assert data.batch(0, 0, range(6), 6)["image"].isfinite().all()
    assert [b["reason"] for b in data.bad] == ["its image is not finite"]


def test_more_bad_samples_than_allowed_stop_the_run(load, tmp_path):
    writer = ShardWriter(tmp_path, "train/00000.tar")
    for key in range(100):
        tokens = np.full((1, 2), 9 if key % 25 == 0 else 1, np.int32)
        writer.add(str(key), {"image": GOOD[0], "text": tokens}, {"captions": ["a"]})
    one_shard(tmp_path, writer.close(), PIXELS)
    with pytest.raises(ValueError, match=r"3 unusable samples, more than data.bad_share = 0.02 allows"):
        load(folder=tmp_path, bad_share=0.02).batch(0, 0, range(100), 100)
    load(folder=tmp_path, bad_share=0.04).batch(0, 0, range(100), 100)
