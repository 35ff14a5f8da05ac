"""The command line: bad input is one line and exit code 2, without importing torch where no model is needed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import typer.main
from PIL import Image

from anystate.cli import app


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_overrides, call):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert call("train", "digits", *tiny_overrides, "--out", out, "--device", "cpu") == 0
    return out


# Bad input that needs no model, and what the line says; RUN is a folder without checkpoints
LIGHT = [
    (["paint"], "No such command 'paint'"),
    (["train", "nowhere.yaml"], "'nowhere.yaml' not found"),
    (["train", "digits", "train.stepz=3"], "unknown key 'train.stepz'"),
    (["train", "digits", "train.lr=fast"], "train.lr = 'fast'"),
    (["train", "digits", "train.steps"], "not of the form key=value"),
    (["demo", "train.stepz=3"], "unknown key 'train.stepz'"),
    (["sample", "gone"], "no checkpoint at 'gone'"),
    (["sample", "RUN"], "no checkpoint at 'RUN'"),
    (["sample", "RUN/gone"], "no checkpoint at 'RUN/gone'"),  # not looked for on the hub, as there is a folder RUN
    (["sample", "RUN", "-n", "0"], "'-n' / '--n'"),
    (["sample", "RUN", "--steps", "-3"], "for '--steps'"),
    (["sample", "RUN", "--batch-size", "0"], "for '--batch-size'"),
    (["sample", "RUN", "--chunk=0"], "for '--batch-size'"),
    (["sample", "RUN", "--weights", "best"], "'best' is not one of 'ema', 'raw'"),
    (["sample", "RUN", "--precision", "fp64"], "'fp64' is not one of 'auto', 'fp32', 'bf16'"),
    (["sample", "RUN", "--prompts", "gone.json"], "'gone.json' not found"),
    (["eval", "gone"], "no checkpoint at 'gone'"),
    (["eval", "RUN", "-n", "1"], "for '-n' / '--n'"),
    (["eval", "RUN", "--metrics", "elbo,beauty"], "'beauty' is not one of elbo, labels, fid, clip"),
    (["score", "gone"], "'gone' not found"),
    (["score", "RUN", "--save", "x.json"], "--save x.json"),
    (["import-official", "gone.pt", "--weights", "ema"], "belong to --table"),
    (["data", "pack", "gone.npz", "-o", "x"], "'gone.npz' not found"),
    (["data", "pack", "RUN", "-o", "x", "--test-share", "2"], "from 0 to 1"),
    (["data", "check", "gone"], "'gone' not found"),
    (["table", "schema", "nothing"], "table 'nothing' not found"),
    (["table", "fit", "nothing"], "table 'nothing' not found"),
    (["table", "fit", "adult", "train.stepz=1"], "unknown key 'train.stepz'"),
    (["table", "fit", "adult", "--schema", "gone.yaml"], "'gone.yaml' not found"),
    (["table", "sample", "gone"], "no checkpoint at 'gone'"),
    (["table", "sample", "RUN", "--where", "age"], "--where 'age' is not of the form COLUMN=VALUE"),
    (["table", "impute", "RUN", "gone.csv"], "'gone.csv' not found"),
    (["table", "report", "gone.csv", "gone.csv"], "'gone.csv' not found"),
    (["table", "fetch", "iris"], "'iris' is not one of 'adult'"),
    (["bench", "train", "--size", "huge"], "'huge' is not one of 'official'"),
    (["bench", "train", "--compile", "maybe"], "'maybe' is not one of 'always', 'never'"),
    (["bench", "sample", "--batch", "a,b"], "--batch-size takes whole numbers"),
    (["bench", "samplers"], "give --digits RUN, --table RUN or both"),
    (["bench", "curves", "--digits", "gone"], "no checkpoint at 'gone'"),
    (["bench", "schedules", "--variants", "all"], "'all' is not one of decoupled"),
    (["bench", "schedules", "--config", "gone"], "config 'gone' not found"),
]

MANY = """
import contextlib, io, json, os, sys

from anystate.cli import main

os.environ["COLUMNS"] = "80"
results = []
for args in json.load(sys.stdin):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(args)
        except SystemExit as stop:
            code = stop.code
    heavy = [name for name in ("torch", "pandas", "matplotlib") if name in sys.modules]
    results.append([code, error.getvalue(), heavy])
print(json.dumps(results))
"""


def commands(command=None, path: tuple[str, ...] = ()) -> list[list[str]]:
    """The arguments of every command and group of commands, hidden ones too."""
    command = command or typer.main.get_command(app)
    found = [list(path)]
    for name, inner in getattr(command, "commands", {}).items():
        found += commands(inner, (*path, name))
    return found


def without_torch(cases: list[list[str]], folder) -> list[tuple[int, str]]:
    """(exit code, standard error) of command lines that run one after the other in a process; none imports torch."""
    done = subprocess.run(
        [sys.executable, "-c", MANY], input=json.dumps(cases), capture_output=True, text=True, check=True, cwd=folder
    )
    results = json.loads(done.stdout)
    for case, (_, _, heavy) in zip(cases, results, strict=True):
        assert not heavy, f"{' '.join(case)} imports {', '.join(heavy)}"
    return [(code, error) for code, error, _ in results]


def test_help_imports_no_torch(tmp_path):
    cases = [[*arguments, "--help"] for arguments in commands()]
    assert len(cases) > 25
    assert without_torch(cases, tmp_path) == [(0, "")] * len(cases)


def test_bad_input_that_needs_no_model_imports_no_torch(tmp_path):
    (tmp_path / "RUN").mkdir()
    for (args, message), (code, error) in zip(LIGHT, without_torch([a for a, _ in LIGHT], tmp_path), strict=True):
        assert code == 2, args
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


@pytest.mark.parametrize("args", [["--help"], ["sample", "--help"], ["train", "digits", "train.stepz=3"]])
def test_cpu_time(args, tmp_path):
    """Below 0.5 s, in one of five runs at least: other processes on the machine make them slower."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "anystate", *args], capture_output=True, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    found = []
    while len(found) < 5 and min(found, default=1.0) >= 0.5:
        found.append(seconds())
    assert min(found) < 0.5


def test_choices_of_the_command_line_are_those_of_the_code():
    """The command line repeats a few lists of names, so as to check them without importing torch."""
    from anystate.bench import commands
    from anystate.bench.quality.metrics import METRICS
    from anystate.bench.speed.systems import SIZES
    from anystate.bench.studies.schedules import VARIANTS
    from anystate.configs import options

    assert get_args(get_args(commands.Size)[0]) == tuple(SIZES)
    assert commands.VARIANTS == VARIANTS
    assert tuple(METRICS) == options.METRICS


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["train", "digits", "train.stepz=3"], ["unknown key 'train.stepz'", "steps"]),
        (["train", "digits", "modalities.image.strem.width=3"], ["unknown key 'modalities.image.strem'", "stream"]),
        (["train", "digits", "train.steps=-3"], ["train.steps = -3", "greater than 0"]),
        (["train", "digits", "sample.guidance.interval=[0.8, 0.2]"], ["sample.guidance", "[0.8, 0.2]"]),
        (["train", "digits", "data.name=npz", "data.path=gone.npz"], ["'gone.npz' not found"]),
        (["train", "digits", "modalities.text.alphabet=ab"], ["outside the vocabulary"]),
        (["train", "digits", "modalities.text.length=4"], ["characters, the model takes 4"]),
        (["train", "digits", "modalities.image.size=12"], ["(12, 12, 1)", "(8, 8, 1)"]),
        (["train", "digits", "modalities.image.stream.patch=3"], ["patch 3 does not divide"]),
        (["train", "digits", "--device", "cuda:9"], ["cuda:9"]),
    ],
)
def test_bad_input(tmp_path, args, parts, refused):
    line = refused(*args, "-o", tmp_path / "out")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--condition", "text=a seven!"], ["outside the vocabulary", "!"]),
        (["--condition", "text=a seven and then another"], ["characters, the model takes"]),
        (["--condition", "image=gone.png"], ["'gone.png' not found"]),
        (["--condition", "sound=x"], ["no modality 'sound'", "image, text"]),
        (["--condition", "text"], ["NAME=VALUE"]),
        (["--condition", "text=zero", "--noise-level", "text=1.5"], ["[0, 1]", "1.5"]),
        (["--condition", "text=zero", "--noise-level", "text=half"], ["'half' is not a number"]),
        (["--noise-level", "text=0.5"], ["no condition of that modality"]),
        (["--guidance", "2", "--interval", "0.8", "0.2"], ["0.8", "0.2"]),
        (["--guidance", "2", "--final-time", "0"], ["final_time"]),
        (["--sampler", "image=tau_leap"], ["heun", "'tau_leap'"]),
        (["--mask", "image=gone.png"], ["--mask image"]),
    ],
)
def test_bad_requests(run, tmp_path, options, parts, refused):
    line = refused("sample", run, "--out", tmp_path / "s", "--device", "cpu", *options)
    for part in parts:
        assert part in line
    assert not (tmp_path / "s").exists()


def test_image_of_the_wrong_size(run, tmp_path, refused):
    Image.new("L", (9, 7)).save(tmp_path / "wide.png")
    line = refused("sample", run, "--out", tmp_path / "s", "--condition", f"image={tmp_path}/wide.png")
    assert "8x8" in line
    assert "9x7" in line


def test_a_file_that_is_not_an_image(run, tmp_path, refused):
    (tmp_path / "text.png").write_text("hello")
    line = refused("sample", run, "--out", tmp_path / "s", "--condition", f"image={tmp_path}/text.png")
    assert "not a readable image" in line


def test_truncated_checkpoint(run, tmp_path, refused):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = max(copy.glob("step_*")) / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    assert "truncated or damaged" in refused("sample", copy, "--out", tmp_path / "s")


@pytest.mark.parametrize("direction", ["joint", "text", "image", "half", "masked"])
def test_sampling_every_direction(run, tmp_path, direction, call):
    """Files are written: images of the right size, a caption a line, manifest, contact sheet."""
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "x.png")
    Image.fromarray(np.repeat([[255], [0]], 4, 0).repeat(8, 1).astype(np.uint8)).save(tmp_path / "mask.png")
    options = {
        "joint": [],
        "text": ["--condition", "text=a seven", "--condition", "text=zero"],
        "image": ["--condition", f"image={tmp_path}/x.png", "--guidance", "2"],
        "half": ["--given", "text=a seven", "--level=text=0.5", "--chunk", "4"],  # earlier names of the options
        "masked": ["--condition", f"image={tmp_path}/x.png", "--mask", f"image={tmp_path}/mask.png"],
    }[direction]
    out = tmp_path / "out"
    assert call("sample", run, "--out", out, "--n", "2", "--device", "cpu", *options, "--trajectory") == 0
    n = 4 if direction == "text" else 2
    images = sorted((out / "image").glob("*.png"))
    assert len(images) == n
    assert all(Image.open(p).size == (8, 8) for p in images)
    captions = (out / "text.txt").read_text().split("\n")
    assert len(captions) == n + 1
    if direction == "text":
        assert captions[:4] == ["a seven", "a seven", "zero", "zero"]
    if direction == "image":
        assert np.array_equal(
            np.asarray(Image.open(images[0]).convert("L")), np.asarray(Image.open(tmp_path / "x.png"))
        )
    if direction != "half":
        assert "▯" not in "".join(captions), "a mask reached the user"
    assert json.loads((out / "manifest.json").read_text())["samples"] == n
    assert len(list((out / "trajectory").glob("*.png"))) == 4
    assert call("sample", run, "--out", out, "--n", "2") == 2, "existing output must not be overwritten silently"


def test_dry_run_prints_the_resolved_config(capsys, call):
    assert call("train", "digits", "train.lr=0.5", "--dry-run") == 0
    assert "lr: 0.5" in capsys.readouterr().out


def test_demo_writes_metrics_and_report(tmp_path, tiny_overrides, call):
    out = tmp_path / "demo"
    assert call("demo", "--out", out, "--device", "cpu", "--seed", "3", *tiny_overrides) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    keys = ["text_to_image", "image_to_text", "joint", "nearest_train_ratio", "seconds", "seed"]
    assert list(metrics) == keys
    assert metrics["seed"] == 3
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "<svg" in page
    for foreign in ("http://", "https://", 'src="/'):
        assert foreign not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
            "http://creativecommons.org", ""
        ).replace("https://matplotlib.org", ""), "the page must not need anything from outside"
