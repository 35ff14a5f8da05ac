"""Sampling into folders: batch by batch, resumed, shared by ranks, with conditions from files, data and masks."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from anystate.configs.load import load_config
from anystate.sample import background, sample
from anystate.sample import generate as module
from anystate.sample.conditions import ConditionSource, read_conditions
from anystate.sample.folder import SampleFolder
from anystate.sample.generate import SampleRequest, generate
from anystate.sample.pipeline import Pipeline, build_pipeline
from anystate.train.data.load import load_data, read_rows
from anystate.train.trainer import Trainer


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A tiny digits run, with batches of 8 samples and 3 steps."""
    out = tmp_path_factory.mktemp("run")
    Trainer(tiny(), out, "cpu", quiet=True).run()
    return out


@pytest.fixture(scope="module")
def pipeline(run):
    return Pipeline.from_pretrained(run)


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def batches(monkeypatch):
    """The (start_index, n) of every call of `sample`."""
    seen = []

    def counting(*args, **kwargs):
        seen.append((kwargs["start_index"], kwargs["n"]))
        return sample(*args, **kwargs)

    monkeypatch.setattr(module, "sample", counting)
    return seen


def test_batches_together_are_the_samples_of_one_call(run, pipeline, tmp_path, batches):
    """20 samples in batches of 8: the files are those of a single call."""
    sheet = generate(run, SampleRequest(n=20, seed=5), tmp_path)
    assert batches == [(0, 8), (8, 8), (16, 4)]
    drawn = sample(
        pipeline.net,
        pipeline.space,
        n=20,
        steps=3,
        guidance=pipeline.guidance(False),
        seed=5,
        samplers=pipeline.samplers,
        batch_size=8,
    )
    images = pipeline.codecs["image"].decode(drawn["image"])
    for i, expected in enumerate(images):
        found = np.asarray(Image.open(tmp_path / f"image/{i:06d}.png").convert("L"))
        assert np.array_equal(found, expected[..., 0]), i
    assert (tmp_path / "text.txt").read_text() == "".join(
        c + "\n" for c in pipeline.codecs["text"].decode(drawn["text"])
    )
    assert sheet == tmp_path / "sheet.png"
    assert {p.name for p in tmp_path.iterdir()} == {"image", "text.txt", "sheet.png", "manifest.json"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["samples"], manifest["complete"], manifest["weights"]) == (20, True, "ema")
    assert manifest["request"]["seed"] == 5


def test_an_interrupted_request_is_resumed(run, tmp_path, monkeypatch, batches):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    generate(run, SampleRequest(n=20, trajectory=True), whole)
    write = SampleFolder.write

    def failing(self, samples, values):
        if samples.start == 8:
            (self.out / "image").mkdir(exist_ok=True)
            (self.out / "image/000008.png").write_bytes(b"half a pict")
            raise KeyboardInterrupt
        write(self, samples, values)

    batches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            generate(run, SampleRequest(n=20, trajectory=True), parts)
    assert not json.loads((parts / "manifest.json").read_text())["complete"]
    assert batches == [(0, 8), (8, 8)]
    batches.clear()
    generate(run, SampleRequest(n=20, trajectory=True), parts)
    assert batches == [(8, 8), (16, 4)]
    assert files(parts) == files(whole)
    batches.clear()
    generate(run, SampleRequest(n=20, trajectory=True), parts)  # complete: nothing to do
    assert batches == []
    assert files(parts) == files(whole)


@pytest.fixture
def overlapped(monkeypatch):
    """Decoding in a thread on the CPU too; the names of the threads in which batches were written."""
    monkeypatch.setattr(background, "DEVICES", ("cpu", "cuda"))
    seen, write = [], SampleFolder.write

    def noting(self, samples, values):
        seen.append(threading.current_thread().name)
        write(self, samples, values)

    monkeypatch.setattr(SampleFolder, "write", noting)
    return seen


def test_overlapped_decoding_writes_the_same_files(run, tmp_path, monkeypatch, overlapped, batches):
    """Byte for byte the same as without a thread."""
    generate(run, SampleRequest(n=20, trajectory=True), tmp_path / "thread")
    assert overlapped == ["decoding_0"] * 3
    monkeypatch.setattr(background, "DEVICES", ())
    generate(run, SampleRequest(n=20, trajectory=True), tmp_path / "no_thread")
    assert overlapped[3:] == ["MainThread"] * 3
    assert files(tmp_path / "thread") == files(tmp_path / "no_thread")


def test_at_most_one_batch_is_pending(run, tmp_path, monkeypatch, overlapped):
    """The third is not sampled before the first is written, so that memory does not grow."""
    events, write, draw = [], SampleFolder.write, sample

    def slow(self, samples, values):
        time.sleep(0.3)
        write(self, samples, values)
        events.append(("written", samples.start))

    def drawing(*args, **kwargs):
        events.append(("samples", kwargs["start_index"]))
        return draw(*args, **kwargs)

    monkeypatch.setattr(SampleFolder, "write", slow)
    monkeypatch.setattr(module, "sample", drawing)
    generate(run, SampleRequest(n=32), tmp_path)
    assert events.index(("samples", 8)) < events.index(("written", 0)) < events.index(("samples", 16))
    assert [start for what, start in events if what == "written"] == [0, 8, 16, 24]


@pytest.mark.parametrize("last", [False, True])
def test_errors_of_overlapped_decoding_surface(run, tmp_path, monkeypatch, overlapped, call, refused, last):
    """A full disk in the second or the last batch: one line, exit code 2, and the same command resumes."""
    write = SampleFolder.write

    def full(self, samples, values):
        if samples.start == (16 if last else 8):
            raise OSError(28, "No space left on device")
        write(self, samples, values)

    command = ["sample", run, "--n", 24, "--device", "cpu", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", full)
        assert "No space left on device" in refused(*command)
    assert not call(*command)
    generate(run, SampleRequest(n=24), tmp_path / "whole")
    assert files(tmp_path / "out") == {**files(tmp_path / "whole"), **manifest_of(tmp_path / "out")}


def manifest_of(folder) -> dict[str, bytes]:
    return {"manifest.json": (folder / "manifest.json").read_bytes()}


def test_interrupted_while_a_batch_is_written(run, tmp_path, monkeypatch, overlapped):
    """Ctrl-C while the second batch is sampled: the first one is finished and is not sampled again."""
    draw = sample

    def interrupted(*args, **kwargs):
        if kwargs["start_index"] == 8:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(run, SampleRequest(n=20), tmp_path / "parts")
    assert [p.name for p in (tmp_path / "parts/.chunks").iterdir()] == ["00000000.json"]
    generate(run, SampleRequest(n=20), tmp_path / "parts")
    generate(run, SampleRequest(n=20), tmp_path / "whole")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_folder_takes_one_request(run, tmp_path, batches):
    generate(run, SampleRequest(n=9), tmp_path)
    before = files(tmp_path)
    other = {
        "samples": SampleRequest(n=10),
        "seed": SampleRequest(n=9, seed=1),
        "steps": SampleRequest(n=9, steps=2),
        "guidance": SampleRequest(n=9, guidance=2.0),
        "batch_size": SampleRequest(n=9, batch_size=4),
        "conditions": SampleRequest(ConditionSource([("text", "zero")]), n=9),
        "samplers": SampleRequest(n=9, sampler={"image": "heun"}),
    }
    for what, request in other.items():
        with pytest.raises(ValueError, match=f"another request .{what} differs.*--force"):
            generate(run, request, tmp_path)
    with pytest.raises(ValueError, match="weights differs"):
        generate(run, SampleRequest(n=9), tmp_path, weights="raw")
    assert files(tmp_path) == before
    (tmp_path / "notes.md").write_text("mine")
    generate(run, SampleRequest(n=3, seed=1), tmp_path, force=True)
    assert len(list((tmp_path / "image").iterdir())) == 3
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_request_that_failed_before_its_first_samples_does_not_block_the_folder(run, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise ValueError("no head")

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample", failing)
        with pytest.raises(ValueError, match="no head"):
            generate(run, SampleRequest(n=2), tmp_path)
    generate(run, SampleRequest(n=3), tmp_path)
    assert len(list((tmp_path / "image").iterdir())) == 3


def test_a_modality_without_a_head_must_be_a_condition(tiny, tmp_path):
    """The model of the first training stage has no head for captions."""
    run, out = tmp_path / "run", tmp_path / "out"
    Trainer(tiny("modalities.text.stream={width: 16, output: false}", "train.steps=1"), run, "cpu", quiet=True).run()
    with pytest.raises(ValueError, match="does not generate 'text': make it a condition, --condition text="):
        generate(run, SampleRequest(n=1), out)
    assert not out.exists()
    generate(run, SampleRequest(ConditionSource([("text", "zero")]), n=1), out)


def test_foreign_folders_and_files_are_left_alone(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        generate(run, SampleRequest(n=2), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        generate(run, SampleRequest(n=2), tmp_path / "thesis.tex")
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_two_ranks_write_what_one_does(run, tmp_path):
    """20 samples in three batches: rank 0 makes two, rank 1 one. torchrun reads --n as an option of its own, -n not."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["-n", "20", "--device", "cpu", "--condition", "text=a seven", "--trajectory"]
    result = subprocess.run(
        [*launch, "-m", "anystate", "sample", str(run), *options, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1
    generate(run, SampleRequest(ConditionSource([("text", "a seven")]), n=20, trajectory=True), tmp_path / "one")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert list(one) == list(two)
    for name, content in one.items():
        assert two[name] == content, name


def test_four_ranks_share_the_missing_batches(run, tmp_path, monkeypatch, batches):
    """The ranks run one after the other here; each sees the same missing batches."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "missing", lambda self: [range(k, k + 8) for k in (0, 8, 16, 24, 32)])
        patch.setattr(SampleFolder, "finish", lambda self: None)
        patch.setattr(module.distributed, "world", lambda: 4)
        for rank in range(4):
            patch.setattr(module.distributed, "rank", lambda rank=rank: rank)
            patch.setattr(module.distributed, "is_main", lambda rank=rank: rank == 0)
            generate(run, SampleRequest(n=40), parts)
    assert batches == [(0, 8), (32, 8), (8, 8), (16, 8), (24, 8)]
    generate(run, SampleRequest(n=40), parts)
    assert len(batches) == 5
    generate(run, SampleRequest(n=40), whole)
    assert files(parts) == files(whole)


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts as the official code reads it."""

    def write(content):
        (tmp_path / "prompts.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path / "prompts.json"

    return write


def test_prompts_from_a_file(run, pipeline, prompts, tmp_path):
    path = prompts({"text": ["a seven", "zero", "the digit 1"], "ids": [4, 5, 6]})
    out = tmp_path / "out"
    generate(run, SampleRequest(ConditionSource(prompts=path)), out)
    assert (out / "text.txt").read_text() == "a seven\nzero\nthe digit 1\n"
    assert len(list((out / "image").iterdir())) == 3
    twice = read_conditions(pipeline, ConditionSource(prompts=path, limit=2), n=2)
    assert twice.total == 4
    assert pipeline.codecs["text"].decode(twice.of_samples(range(1, 4))["text"].x) == ["a seven", "zero", "zero"]


def test_context_limit_and_repeated_text(pipeline, prompts):
    path = prompts({"text": ["two", "number seven"]})

    def decoded(**options):
        x = read_conditions(pipeline, ConditionSource(prompts=path, **options), None).conditions["text"].x
        assert x.shape == (2, 12)
        return pipeline.codecs["text"].decode(x)

    assert decoded() == ["two", "number seven"]
    assert decoded(context_limit=5) == ["two", "numbe"]
    assert decoded(repeat_text=2) == ["two two", "number seven"]
    assert decoded(repeat_text=10, context_limit=6) == ["two tw", "number"]


def test_a_context_limit_equals_a_shorter_context_where_pads_are_not_attended(golden):
    """The official code passes fewer tokens to the network: the predictions of the images are the same."""
    from anystate.model.official.text_image import load_official

    net, pad, limit = load_official(golden.below("weights/"))[0], 30, 5
    space = golden.official_space(pad_id=pad, attend_pads=False)
    tokens = golden["precond/tokens"].clamp(max=29)
    x, t = golden["precond/x"], torch.full((len(tokens),), 0.4, dtype=torch.float64)
    padded = tokens.clone()
    padded[:, limit:] = pad
    times = {"text": torch.zeros_like(t), "image": t}
    with torch.no_grad():
        ours = space.evaluate(net, {"text": padded, "image": x}, times, ["image"])["image"]
        short = space.evaluate(net, {"text": tokens[:, :limit], "image": x}, times, ["image"])["image"]
        full = space.evaluate(net, {"text": tokens, "image": x}, times, ["image"])["image"]
    torch.testing.assert_close(ours, short, rtol=0, atol=1e-5)
    assert (full - short).abs().max() > 1e-2


@pytest.mark.parametrize("condition", ["image", "text"])
def test_rows_of_a_data_set(run, pipeline, tmp_path, condition):
    """The condition is written unchanged, the other modality is sampled."""
    test = load_data(pipeline.config, pipeline.codecs)[1].first(slice(11))
    generate(
        run, SampleRequest(ConditionSource([(condition, None)], data="digits", limit=11)), tmp_path, read_rows=read_rows
    )
    found = np.stack([np.asarray(Image.open(tmp_path / f"image/{i:06d}.png").convert("L")) for i in range(11)])
    same = np.array_equal(found, pipeline.codecs["image"].decode(test["image"])[..., 0])
    lines = (tmp_path / "text.txt").read_text().splitlines()
    assert same == (condition == "image")
    assert (lines == pipeline.codecs["text"].decode(test["text"])) == (condition == "text")
    assert len(lines) == 11


def test_rows_of_the_training_part_and_their_context(pipeline):
    rows = read_conditions(
        pipeline,
        ConditionSource([("text", None)], data="digits", split="train", limit=3, context_limit=4),
        2,
        read_rows,
    )
    assert rows.total == 6
    assert rows.of_samples(range(5, 6))["text"].x.shape == (1, 12)
    assert (rows.conditions["text"].x[:, 4:] == 0).all()


@pytest.fixture(scope="module")
def packed(call, tmp_path_factory):
    """Twelve images of one grey each, with captions, packed; every third is held out."""
    folder = tmp_path_factory.mktemp("packed")
    images = np.arange(12, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2) * 20
    captions = [f"number {c}" for c in "zothfsnegaux"]
    split = np.where(np.arange(12) % 3 == 0, "test", "train")
    np.savez(folder / "pairs.npz", images=images, captions=np.array(captions), split=split)
    command = ["data", "pack", folder / "pairs.npz", "--out", folder / "set", "--channels", 1, "--length", 12]
    alphabet = load_config("digits").modalities["text"].alphabet
    assert call(*command, "--text", "characters", "--alphabet", alphabet) == 0
    return folder / "set"


@pytest.mark.parametrize("condition", ["image", "text"])
def test_rows_of_a_packed_data_set(tiny, packed, condition):
    """The held-out images or captions, in the order of the shards; `limit` takes the first ones."""
    pipeline = build_pipeline(tiny("modalities.image.pixel_max=255"))
    rows = read_conditions(pipeline, ConditionSource([(condition, None)], data=str(packed)), None, read_rows)
    rows = rows.conditions[condition].x
    if condition == "image":
        greys = pipeline.codecs["image"].decode(rows)[:, 3, 4, 0]
        assert sorted(greys.tolist()) == [0, 60, 120, 180]
    else:
        assert sorted(pipeline.codecs["text"].decode(rows)) == sorted(f"number {c}" for c in "zhna")
    first = read_conditions(pipeline, ConditionSource([(condition, None)], data=str(packed), limit=3), 2, read_rows)
    assert torch.equal(first.conditions[condition].x, rows[:3])
    assert first.total == 6
    train = read_conditions(
        pipeline, ConditionSource([(condition, None)], data=str(packed), split="train"), None, read_rows
    )
    assert train.total == 8


def test_a_packed_data_set_that_does_not_fit_is_refused(pipeline, packed):
    with pytest.raises(ValueError, match="pixel_max"):
        read_conditions(pipeline, ConditionSource([("text", None)], data=str(packed)), None, read_rows)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ConditionSource([("text", None)]), "NAME=VALUE"),
        (ConditionSource([("text", "zero")], data="digits"), "give the name alone"),
        (ConditionSource(data="digits"), "--data needs --condition NAME"),
        (ConditionSource([("text", None)], data="gone"), "'gone' not found"),
        (ConditionSource([("text", None)], data="digits", split="valid"), "train or test, got 'valid'"),
        (ConditionSource([("text", None)], data="digits", repeat_text=3), "--repeat-text works on captions"),
        (ConditionSource([("text", None)], data="digits", limit=0), "--limit"),
        (ConditionSource([("image", None), ("text", None)], data="digits"), "nothing to generate"),
        (ConditionSource(limit=3), "--limit"),
        (ConditionSource(context_limit=3), "need a caption"),
        (ConditionSource([("image", None)], data="digits", context_limit=3), "need a caption"),
        (ConditionSource([("text", "zero")], context_limit=13), "must lie in 1 … 12, got 13"),
        (ConditionSource([("text", "zero")], repeat_text=0), "at least 1, got 0"),
        (ConditionSource([("text", "zero"), ("text", "one"), ("image", "x.png")]), "equally many"),
        (
            ConditionSource([("text", "zero")], noise_level={"image": "0.5"}),
            "no condition of that modality, add --cond",
        ),
    ],
)
def test_bad_conditions(pipeline, source, words):
    with pytest.raises(ValueError, match=words.replace("…", ".")):
        read_conditions(pipeline, source, None, read_rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "should look like"),
        ({"captions": ["zero"]}, "should look like"),
        ({"text": []}, "one caption at least"),
        ({"text": ["zero", 7]}, "one caption at least"),
        ({"text": ["zero!"]}, "outside the vocabulary"),
        ({"text": ["a zero and a one"]}, "characters, the model takes 12"),
    ],
)
def test_bad_prompts(pipeline, prompts, content, words):
    with pytest.raises(ValueError, match=words):
        read_conditions(pipeline, ConditionSource(prompts=prompts(content)), None)


def test_prompt_files_that_cannot_be_read(pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"'.*gone.json' not found"):
        read_conditions(pipeline, ConditionSource(prompts=tmp_path / "gone.json"), None)
    (tmp_path / "cut.json").write_text('{"text": ["a"')
    with pytest.raises(ValueError, match="not readable JSON"):
        read_conditions(pipeline, ConditionSource(prompts=tmp_path / "cut.json"), None)
    with pytest.raises(ValueError, match="one source of conditions at a time"):
        read_conditions(pipeline, ConditionSource([("text", "zero")], prompts=tmp_path / "cut.json"), None)


def test_the_command_line(call, run, prompts, tmp_path, capsys):
    call = functools.partial(call, "sample", run, "--device", "cpu")
    path = prompts({"text": ["two", "a seven"]})
    out = ["--out", tmp_path / "out", "--prompts", path, "--repeat-text", 3, "--context-limit", 9, "--batch-size", 2]
    assert call(*out, "--n", 3) == 0
    assert (tmp_path / "out/text.txt").read_text().splitlines() == ["two two t"] * 3 + ["a seven a"] * 3
    assert call(*out, "--n", 3) == 0
    capsys.readouterr()
    assert call(*out, "--n", 2) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert call(*out, "--n", 2, "--force") == 0
    rows = ["--data", "digits", "--split", "test", "--condition", "image", "--limit", 2]
    assert call(*rows, "--out", tmp_path / "rows") == 0
    assert len((tmp_path / "rows/text.txt").read_text().splitlines()) == 2
    assert call("--batch-size", 0, "--out", tmp_path / "no") == 2


# Masks on the command line


@pytest.fixture
def image_files(tmp_path):
    """x.png, a random image; half.png, a mask whose left half is white; black.png, white.png and large.png."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    half = np.zeros((8, 8), np.uint8)
    half[:, :4] = 255
    files = {
        "x": pixels,
        "half": half,
        "black": 0 * half,
        "white": 0 * half + 255,
        "large": half.repeat(2, 0).repeat(2, 1),
    }
    for name, values in files.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    return tmp_path


def read_images(folder, n: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"image/{i:06d}.png").convert("L")) for i in range(n)])


def test_inpainting(call, refused, run, image_files):
    """Pixels inside the white part are unchanged, the others are sampled; another mask is another request."""
    command = ["sample", run, "--device", "cpu", "-n", 4, "--out", image_files / "out"]
    masked = [f"--condition=image={image_files / 'x.png'}", f"--mask=image={image_files / 'half.png'}"]
    assert call(*command, *masked) == 0
    images, x = read_images(image_files / "out", 4), np.asarray(Image.open(image_files / "x.png"))
    assert (images[:, :, :4] == x[:, :4]).all()
    assert (images[:, :, 4:] != x[:, 4:]).mean() > 0.5
    assert len(np.unique(images, axis=0)) == 4
    assert len((image_files / "out/text.txt").read_text().splitlines()) == 4
    Image.fromarray(np.asarray(Image.open(image_files / "half.png")).T.copy()).save(image_files / "half.png")
    assert "conditions differs" in refused(*command, *masked)


def test_inpainting_with_a_caption_and_a_noise_level(call, run, image_files):
    """White pixels are a condition at the noise time; the caption is unchanged."""
    command = ["sample", run, "--device", "cpu", "-n", 2, "--condition", "text=a seven", "--out", image_files / "out"]
    masked = [f"--condition=image={image_files / 'x.png'}", f"--mask=image={image_files / 'half.png'}"]
    assert call(*command, *masked, "--noise-level", "image=0.5") == 0
    images, x = read_images(image_files / "out", 2), np.asarray(Image.open(image_files / "x.png"))
    assert (images[:, :, :4] != x[:, :4]).mean() > 0.5
    assert (image_files / "out/text.txt").read_text() == "a seven\n" * 2


def test_infilling(call, run, pipeline, tmp_path):
    """Other characters and the pads behind the caption are unchanged; every ▯ is sampled."""
    command = ["sample", run, "--device", "cpu", "-n", 16, "--condition", "text=a ▯▯▯▯▯", "--out", tmp_path / "out"]
    assert call(*command) == 0
    captions = (tmp_path / "out/text.txt").read_text().splitlines()
    assert len(captions) == 16
    assert all(caption.startswith("a ") and len(caption) <= 7 and "▯" not in caption for caption in captions)
    assert len(set(captions)) > 8
    conditions = read_conditions(pipeline, ConditionSource([("text", "a ▯▯▯▯▯")]), None).conditions
    assert conditions["text"].mask.tolist() == [[True] * 2 + [False] * 5 + [True] * 5]


def test_infilling_and_inpainting_at_once(call, run, image_files):
    options = ["--device", "cpu", "-n", 2, "--condition", "text=▯ seven", "--out", image_files / "out"]
    masked = [f"--condition=image={image_files / 'x.png'}", f"--mask=image={image_files / 'half.png'}"]
    assert call("sample", run, *options, *masked) == 0
    captions = (image_files / "out/text.txt").read_text().splitlines()
    assert all(caption[1:] == " seven" for caption in captions)
    x = np.asarray(Image.open(image_files / "x.png"))
    assert (read_images(image_files / "out", 2)[:, :, :4] == x[:, :4]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--condition", "image=x.png", "--mask", "image=large.png"], "large.png"),
        (["--mask", "image=half.png"], "--mask image: there is no condition of that modality, add --condition image="),
        (["--condition", "image=x.png", "--mask", "image=black.png"], "black.png says that nothing is known"),
        (["--condition", "image=x.png", "--mask", "image=white.png"], "white.png says that all is known"),
        (["--condition", "image=x.png", "--mask", "image=gone.png"], "gone.png"),
        (["--condition", "image=x.png", "--mask", "half.png"], "--mask 'half.png' is not of the form NAME=VALUE"),
        (["--condition", "image=x.png", "--mask", "sound=half.png"], "--mask: this model has no modality 'sound'"),
        (
            ["--condition", "text=zero", "--mask", "text=half.png"],
            "--mask text: in a caption, write ▯ for every masked token",
        ),
        (["--condition", "text=▯▯▯▯▯▯▯▯▯▯▯▯▯"], "13 characters, the model takes 12"),
    ],
)
def test_bad_masks(refused, run, image_files, monkeypatch, options, words):
    """One line and exit code 2, and no folder."""
    monkeypatch.chdir(image_files)
    assert words in refused("sample", run, "--device", "cpu", *options, "--out", "out")
    assert not (image_files / "out").exists()


def test_infilling_needs_a_masked_process(refused, tiny, tmp_path):
    settings = tiny("modalities.text.process=uniform", "modalities.text.loss.weighting=none", "train.steps=1")
    Trainer(settings, tmp_path / "run", "cpu", quiet=True).run()
    error = refused(
        "sample", tmp_path / "run", "--device", "cpu", "--condition", "text=▯ seven", "--out", tmp_path / "out"
    )
    assert "--condition text: ▯ needs a modality under masked diffusion" in error
