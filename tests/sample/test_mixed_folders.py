"""`anystate sample` on a model of an image, a label, a series and columns: conditions, files, contact sheets."""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from anystate.model.build import build_codecs
from anystate.sample.conditions import ConditionSource, read_conditions
from anystate.sample.contact_sheet import GAP, contact_sheet, sheet_of
from anystate.sample.folder import SHEET_SAMPLES, SampleFolder
from anystate.sample.generate import SampleRequest, generate
from anystate.sample.pipeline import Pipeline
from anystate.train.data.dataset import InMemory
from anystate.train.data.examples import encode


@pytest.fixture(scope="module")
def pipe(mixed):
    return Pipeline.from_pretrained(mixed)


@pytest.fixture
def files(tmp_path):
    """x.png and x.npy, values of the image and the series; half.png and half.npy, masks; wrong.npy of another shape."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "x.png")
    Image.fromarray(np.repeat([[255], [0]], 4, 0).repeat(8, 1).astype(np.uint8)).save(tmp_path / "half.png")
    np.save(tmp_path / "x.npy", rng.normal(size=(2, 16)))
    np.save(tmp_path / "half.npy", np.arange(16) < 8)
    np.save(tmp_path / "wrong.npy", np.zeros((3, 5)))
    return tmp_path


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_files_are_those_of_the_pipeline(pipe, mixed, tmp_path):
    """Eleven samples in two batches: one file a sample, or a line of one file."""
    out = tmp_path / "out"
    assert generate(mixed, SampleRequest(n=11, seed=3), out) == out / "sheet.png"
    names = {"image", "label.txt", "sound", "row.csv", "sheet.png", "manifest.json"}
    assert {path.name for path in out.iterdir()} == names
    expected = pipe(n=11, seed=3)
    assert (out / "label.txt").read_text().splitlines() == expected["label"]
    pd.testing.assert_frame_equal(pd.read_csv(out / "row.csv"), expected["row"], check_exact=False, atol=0.02)
    assert (out / "row.csv").read_text().startswith("age,sex,income\n")
    for i in range(11):
        pixels = np.asarray(Image.open(out / f"image/{i:06d}.png")).astype(int)
        assert np.abs(pixels - np.asarray(expected["image"][i])).max() <= 1
        np.testing.assert_allclose(np.load(out / f"sound/{i:06d}.npy"), expected["sound"][i], rtol=1e-3, atol=1e-3)
    assert len(list((out / "image").iterdir())) == len(list((out / "sound").iterdir())) == 11
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["pictures"], manifest["captions"]) == (["image"], [])
    assert manifest["modalities"]["sound"] == "sound/*.npy"
    assert set(manifest["request"]["samplers"]) == {"image", "label", "sound", "row_num", "row_cat"}


def test_an_interrupted_request_is_resumed(mixed, tmp_path, monkeypatch):
    whole, parts, write = tmp_path / "whole", tmp_path / "parts", SampleFolder.write
    generate(mixed, SampleRequest(n=20, trajectory=True), whole)

    def failing(self, samples, values):
        if samples.start == 8:
            raise KeyboardInterrupt
        write(self, samples, values)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            generate(mixed, SampleRequest(n=20, trajectory=True), parts)
    assert not (parts / "row.csv").exists()
    generate(mixed, SampleRequest(n=20, trajectory=True), parts)
    assert content(parts) == content(whole)
    assert len(list((parts / "trajectory").iterdir())) == 4
    generate(mixed, SampleRequest(n=2, seed=1), parts, force=True)
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()} - {"trajectory"}
    assert len(list((parts / "sound").iterdir())) == 2


def test_a_run_folder_and_what_was_saved_of_it_give_the_same_samples(pipe, mixed, call, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    for name, source in (("one", mixed), ("two", tmp_path / "saved")):
        assert call("sample", source, "-n", 2, "--device", "cpu", "--out", tmp_path / name) == 0
    one, two = (content(tmp_path / name) for name in ("one", "two"))
    assert {k: v for k, v in one.items() if k != "manifest.json"} == {
        k: v for k, v in two.items() if k != "manifest.json"
    }
    assert (
        json.loads(one["manifest.json"])["request"]["weights"] == json.loads(two["manifest.json"])["request"]["weights"]
    )


def test_conditions_of_all_kinds(mixed, files, call):
    """A class, cells of a row, half of an image and half of a series, at once."""
    options = ["--condition", "label=class 2", "--condition", "row=age=30, sex=Male"]
    options += ["--condition", f"image={files / 'x.png'}", "--mask", f"image={files / 'half.png'}"]
    options += ["--condition", f"sound={files / 'x.npy'}", "--mask", f"sound={files / 'half.npy'}"]
    assert call("sample", mixed, "-n", 5, "--device", "cpu", "--out", files / "out", *options) == 0
    assert (files / "out/label.txt").read_text() == "class 2\n" * 5
    rows = list(csv.DictReader((files / "out/row.csv").open()))
    assert [(row["age"], row["sex"]) for row in rows] == [("30", "Male")] * 5
    drawn = set()
    image, sound = np.asarray(Image.open(files / "x.png")), np.load(files / "x.npy")
    for i in range(5):
        pixels = np.asarray(Image.open(files / f"out/image/{i:06d}.png"))
        assert (pixels[:4] == image[:4]).all()
        assert (pixels[4:] != image[4:]).any()
        drawn.add(pixels[4:].tobytes())
        values = np.load(files / f"out/sound/{i:06d}.npy")
        np.testing.assert_allclose(values[:, :8], sound[:, :8], atol=1e-4)
        assert (np.abs(values - sound)[:, 8:] > 1e-3).all()
    assert len(drawn) > 1  # samples differ in what is not known


def test_several_conditions_and_json(mixed, call, tmp_path):
    options = ["--condition", 'row={"sex": "Male", "income": 1234.56}', "--condition", "row=age=50", "-n", 3]
    assert call("sample", mixed, "--device", "cpu", "--out", tmp_path, *options) == 0
    rows = pd.read_csv(tmp_path / "row.csv")
    assert (rows["sex"][:3] == "Male").all()
    assert (rows["income"][:3] == 1234.56).all()
    assert (rows["age"][3:] == 50).all()
    assert len(rows) == 6


def test_names_of_modalities_and_of_processes(mixed, pipe, tmp_path):
    """row: all of its processes that have such a sampler; row_num: that one."""
    source = ConditionSource([("row", "age=30, sex=Male, income=30")], noise_level={"row": "0.25", "row_num": "0.5"})
    generate(mixed, SampleRequest(source, n=1, sampler={"sound": "euler", "image": "dpmpp_2m"}), tmp_path / "a")
    request = json.loads((tmp_path / "a/manifest.json").read_text())["request"]
    assert request["noise_level"] == {"row_num": 0.5, "row_cat": 0.25}
    generate(mixed, SampleRequest(n=1, sampler={"row": "euler", "row_num": "heun"}), tmp_path / "b")
    samplers = json.loads((tmp_path / "b/manifest.json").read_text())["request"]["samplers"]
    assert [samplers[k]["method"] for k in ("row_num", "row_cat", "label")] == ["heun", "euler", None]
    generate(mixed, SampleRequest(n=1, sampler={"row": "tau_leap"}), tmp_path / "c")
    samplers = json.loads((tmp_path / "c/manifest.json").read_text())["request"]["samplers"]
    assert [samplers[k]["method"] for k in ("row_num", "row_cat")] == [None, "tau_leap"]


# Rows of a data set


@pytest.fixture
def read_rows(pipe):
    """Six examples, of which two have no label; all have the other modalities."""
    rng = np.random.default_rng(5)
    values = {
        "image": rng.integers(0, 256, (6, 8, 8)).astype(np.uint8),
        "label": ["class 0", None, "class 1", "class 2", None, "class 1"],
        "sound": rng.normal(size=(6, 2, 16)),
        "row": pd.DataFrame({"age": [20, 30, 40, 50, 60, 70], "sex": ["Male", "Female"] * 3, "income": [30.0] * 6}),
    }
    return lambda *_: encode(InMemory(values), pipe.config, pipe.codecs, "six examples")


def test_rows_of_a_data_set(mixed, read_rows, tmp_path):
    """Those without a label are left out where the label is a condition."""
    source = ConditionSource([("label", None), ("row", None)], data="six")
    generate(mixed, SampleRequest(source, n=2), tmp_path / "out", read_rows=read_rows)
    labels = (tmp_path / "out/label.txt").read_text().split("\n")[:-1]
    assert labels == [name for name in ("class 0", "class 1", "class 2", "class 1") for _ in range(2)]
    assert pd.read_csv(tmp_path / "out/row.csv")["age"].tolist() == [20, 20, 40, 40, 50, 50, 70, 70]
    source = ConditionSource([("row", None)], data="six", limit=3)
    generate(mixed, SampleRequest(source), tmp_path / "all", read_rows=read_rows)
    assert pd.read_csv(tmp_path / "all/row.csv")["age"].tolist() == [20, 30, 40]


def test_no_row_has_the_modality(mixed, pipe, read_rows, tmp_path):
    def without(*arguments):
        rows = read_rows(*arguments)
        rows.present["label"] = torch.zeros(6, dtype=torch.bool)
        return rows

    with pytest.raises(ValueError, match="--data six: no row of its test part has label"):
        read_conditions(pipe, ConditionSource([("label", None)], data="six"), None, without)


def test_elements_without_a_value_are_noise(pipe, read_rows):
    """As in training, in which a cell that is not regular has a token, and noise for its number."""

    def gaps(*arguments):
        rows = read_rows(*arguments)
        rows.x["row_num"][0] = float("nan")
        return rows

    full, cut = (
        read_conditions(pipe, ConditionSource([("row", None)], data="six"), None, read).conditions["row_num"].x
        for read in (read_rows, gaps)
    )
    assert bool(cut.isfinite().all())
    assert not torch.equal(cut[0], full[0])
    assert torch.equal(cut[1:], full[1:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--condition", "text=zero"],
            "--condition: this model has no modality 'text'; it has image, label, sound, row",
        ),
        (["--condition", "label=class 9"], "--condition label: 'class 9' is not a class"),
        (["--condition", "row=age"], "--condition row: 'age' is not of the form column=value"),
        (["--condition", "row=agee=3"], "--condition row: unknown column 'agee'"),
        (["--condition", "row=age=old"], "--condition row: column 'age': 'old' is not a number"),
        (["--condition", "sound=gone.npy"], "--condition sound: 'gone.npy' is not a readable .npy file"),
        (["--condition", "sound=wrong.npy"], "--condition sound: value 0 has shape (3, 5), the model takes (2, 16)"),
        (["--condition", "sound=x.npy", "--mask", "sound=wrong.npy"], "--mask sound: wrong.npy says that nothing"),
        (["--condition", "sound=x.npy", "--mask", "sound=x.npy"], "--mask sound: x.npy says that all is known"),
        (["--condition", "image=x.png", "--mask", "image=half.npy"], "--mask image: half.npy: not a readable image"),
        (["--condition", "label=class 1", "--mask", "label=half.npy"], "--mask label: a class is known or sampled as"),
        (["--condition", "row=age=30", "--mask", "row=half.npy"], "--mask row: cells that are left out or empty"),
        (["--condition", "label=class 1", "--noise-level", "row=0.5"], "--noise-level row: there is no condition of"),
        (["--condition", "label=class 1", "--noise-level", "rows=0.5"], "--noise-level: this model has no modality"),
        (["--sampler", "row=first"], "--sampler row: must be one of heun, euler"),
        (["--sampler", "row_num=tau_leap"], "--sampler row_num: must be one of heun, euler"),
        (["--prompts", "prompts.json"], "--prompts: this model has no captions"),
        (["--condition", "label=class 1", "--context-limit", "3"], "need a caption as a condition"),
    ],
)
def test_errors(refused, mixed, files, monkeypatch, options, words):
    monkeypatch.chdir(files)
    (files / "prompts.json").write_text('{"text": ["zero"]}')
    assert words in refused("sample", mixed, "--device", "cpu", *options, "--out", "out")
    assert not (files / "out").exists()


def test_a_mask_of_another_shape(refused, mixed, files):
    np.save(files / "bad.npy", np.arange(15).reshape(3, 5) > 7)
    options = ["--condition", f"sound={files / 'x.npy'}", "--mask", f"sound={files / 'bad.npy'}"]
    error = refused("sample", mixed, "--device", "cpu", *options, "--out", files / "out")
    assert "--mask sound: the mask has shape (3, 5), the model takes (2, 16)" in error


def test_batches_of_rows_differ(make_mixed):
    """Identifiers are numbered through, and the categories that share a rare state are drawn afresh in every batch."""
    codec = build_codecs(Pipeline.from_pretrained(make_mixed(row={"encoding": {"max_categories": 2}})).config)["row"]
    town = np.repeat(["A", *(f"town {i}" for i in range(12))], 5)
    codec.fit(pd.DataFrame({"id": np.arange(65), "town": town, "age": np.arange(65) % 31}), 0)
    x = {"num": torch.zeros(8, 1), "cat": torch.ones(8, 1, dtype=torch.int64)}
    first, second = codec.decode_samples(x, 3, 0), codec.decode_samples(x, 3, 8)
    pd.testing.assert_frame_equal(first, codec.decode(x, 3))
    assert [*first["id"], *second["id"]] == list(range(65, 81))
    assert "A" not in set(first["town"]) | set(second["town"])
    assert first["town"].tolist() != second["town"].tolist()


# Contact sheets


def test_a_sheet_of_an_image_and_a_caption_is_as_before():
    images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
    sheet = contact_sheet(images, ["a", "b", "c"])
    parts = [(Image.fromarray(pixels[..., 0]), text) for pixels, text in zip(images, "abc", strict=True)]
    assert sheet.tobytes() == sheet_of(parts).tobytes()
    assert sheet.size == (3 * (80 + GAP) + GAP, 80 + 6 + 12 + 2 * GAP)


def test_images_stand_side_by_side_above_the_texts():
    red, blue = (Image.new("RGB", size, colour) for size, colour in (((8, 8), (255, 0, 0)), ((16, 8), (0, 0, 255))))
    sheet = np.asarray(sheet_of([[red, "one", blue, "two"]] * 5, columns=8))
    assert (sheet[GAP + 40, GAP + 40] == (255, 0, 0)).all()
    assert (sheet[GAP + 40, GAP + 80 + GAP + 150] == (0, 0, 255)).all()  # twice as wide as high, as it was
    assert sheet.shape[1] == 4 * (80 + GAP + 160 + GAP) + GAP  # four columns of two images
    assert (sheet[GAP + 80 + 3 : GAP + 80 + 27] < 100).any()


def test_texts_alone_have_no_room_for_images():
    sheet = sheet_of([["a word"], ["two words"]])
    assert sheet.height == 6 + 12 + 2 * GAP
    assert np.asarray(sheet).min() < 100


def test_the_sheet_shows_the_first_samples(mixed, pipe, tmp_path):
    """Every modality of each; several texts say what they are."""
    sheet = generate(mixed, SampleRequest(n=SHEET_SAMPLES + 3), tmp_path)
    shown = Image.open(sheet)
    expected = []
    for i in range(SHEET_SAMPLES):
        image, sound = Image.open(tmp_path / f"image/{i:06d}.png"), np.load(tmp_path / f"sound/{i:06d}.npy")
        label = (tmp_path / "label.txt").read_text().splitlines()[i]
        row = list(csv.DictReader((tmp_path / "row.csv").open()))[i]
        modalities = pipe.modalities
        texts = [f"label: {label}", f"row: {', '.join(f'{name} {value}' for name, value in row.items())}"]
        expected.append([image, texts[0], modalities["sound"].render(sound), texts[1]])
    assert shown.size == sheet_of(expected).size
    assert np.mean(np.asarray(shown) != np.asarray(sheet_of(expected))) < 1e-3  # 30.0 or 30, and lines of float32
