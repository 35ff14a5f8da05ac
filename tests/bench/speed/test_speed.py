"""The benchmarks of speed: stored results, worker processes, agreement with the reference, figures."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from anystate.bench.speed import all as bench_all
from anystate.bench.speed import scaling
from anystate.bench.speed import train as training
from anystate.bench.speed.results import ResultLog
from anystate.bench.speed.sample import agreement
from anystate.bench.speed.systems import SIZES, Synthetic, config_of
from anystate.bench.speed.train import check_losses
from anystate.bench.speed.workers import Worker, interleave, quantile, timer
from anystate.bench.studies import sampler_figure
from anystate.bench.studies.samplers import point
from anystate.diffusion import Gaussian, LogLinear, Masked, ScaledLinear, Space, Uniform
from anystate.model.build import build_codecs, build_space

CPU = torch.device("cpu")


def test_results_hold_ratio_and_provenance(tmp_path):
    lines = []
    rows = ResultLog(CPU, tmp_path / "deep" / "rows.json", lines.append)
    rows.add("speed", {"plain": 2.0, "fast": 5.0}, "1/s", batch=3)
    rows.add("time", {"plain": 10.0, "fast": 4.0}, "ms", more_is_better=False)
    rows.add("alone", {"fast": 1.0}, "ms")
    written = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert [row["ratio_to_plain"] for row in written] == [None, 2.5, None, 2.5, None]
    assert written[1]["batch"] == 3
    assert {"name", "engine", "value", "unit", "device", "versions", "commit", "date"} <= set(written[0])
    assert len(lines) == 5


THINGS = """
import torch

def things(n):
    def fail():
        raise ValueError("three\\nlines\\nhere")

    return {"count": lambda: n, "fail": fail}, torch.device("cpu")
"""


def test_ratios_of_results_added_in_separate_calls(tmp_path):
    """In one process or in two that share a .jsonl file; results of another device or commit do not count."""
    file, lines = tmp_path / "rows.jsonl", []
    rows = ResultLog(CPU, file, lines.append)
    rows.add("speed", {"fast": 5.0}, "1/s", batch=3)
    assert len(file.read_text().splitlines()) == 1
    assert rows.results[0].ratio_to_plain is None
    again = ResultLog(CPU, file, lines.append)
    again.add("speed", {"plain": 2.0}, "1/s", batch=3)
    assert again.find("speed") == {"fast": 5.0, "plain": 2.0}
    third = ResultLog(CPU, file)
    assert {(r.engine, r.value, r.ratio_to_plain) for r in third.results} == {("fast", 5.0, 2.5), ("plain", 2.0, None)}
    assert third.results[0].about == {"batch": 3}
    assert third.results[0].provenance == rows.provenance
    others = [
        json.loads(line) | {key: "other"} for key in ("device", "commit") for line in file.read_text().splitlines()
    ]
    elsewhere = tmp_path / "others.jsonl"
    elsewhere.write_text("".join(json.dumps(values) + "\n" for values in others))
    assert not ResultLog(CPU, elsewhere).results


def test_an_incomplete_line_is_skipped(tmp_path):
    file = tmp_path / "rows.jsonl"
    ResultLog(CPU, file, lambda line: None).add("speed", {"fast": 5.0}, "1/s")
    with file.open("a") as out:
        out.write('{"name": "sp')
    rows = ResultLog(CPU, file, lambda line: None)
    rows.add("time", {"fast": 1.0}, "s")
    assert [row.name for row in ResultLog(CPU, file).results] == ["speed", "time"]


def test_functions_run_in_worker_processes(tmp_path, monkeypatch):
    (tmp_path / "measured_things.py").write_text(THINGS)
    monkeypatch.syspath_prepend(tmp_path)
    things = importlib.import_module("measured_things").things
    group = {str(n): Worker(things, n) for n in (1, 2)}
    assert [worker("count").result for worker in group.values()] == [1, 2]
    assert {name: len(s) for name, s in interleave(group, "count", 3).items()} == {"1": 3, "2": 3}
    with pytest.raises(ValueError, match="three lines here"):
        group["1"]("fail")
    for worker in group.values():
        worker.stop()
        assert not worker.process.is_alive()


def test_differences_from_the_reference_are_errors():
    check_losses("loss of a", {"plain": 1.0, "fast": 1.001}, 2e-3)
    check_losses("loss of a", {"fast": 1.1}, 2e-3)
    with pytest.raises(ValueError, match=r"loss of a differs from the reference: 1\.1, reference 1"):
        check_losses("loss of a", {"plain": 1.0, "fast": 1.1}, 2e-3)
    tokens, images = torch.zeros(100, 3, dtype=torch.int64).numpy(), torch.zeros(100, 2).numpy()
    same = {"plain": {"t": tokens, "p": images}, "fast": {"t": tokens, "p": images}}
    assert agreement("x", same, CPU) == 1.0
    with pytest.raises(ValueError, match="tokens agree"):
        agreement("x", {**same, "fast": {"t": tokens + 1, "p": images}}, CPU)
    with pytest.raises(ValueError, match="p differs from the reference"):
        agreement("x", {**same, "fast": {"t": tokens, "p": images + 1}}, CPU)


@pytest.mark.parametrize("size", SIZES)
def test_synthetic_data_has_the_shapes_of_the_space(size):
    config = config_of(size, [])
    space = build_space(config, build_codecs(config))
    data = Synthetic(space, CPU)
    batch = data.batch(0, 1, range(2, 5), 8)
    assert set(batch) == set(space)
    assert {len(x) for x in batch.values()} == {3}
    space.check(batch)
    assert all(torch.equal(x, data.batch(7, 1, range(2, 5), 8)[m]) for m, x in batch.items())
    assert not torch.equal(batch["image"], data.batch(0, 2, range(2, 5), 8)["image"])


def test_synthetic_data_of_any_space():
    """Padded tokens have random lengths of at least a quarter; without a pad, or under uniform diffusion, all count."""
    space = Space(
        {
            "waves": Gaussian((3, 20), ScaledLinear()),
            "words": Masked(8, 50, LogLinear(), pad_id=49),
            "codes": Masked(6, 4, LogLinear()),
            "class": Uniform(1, 10, LogLinear()),
        }
    )
    data = Synthetic(space, CPU).x
    space.check(data)
    assert abs(float(data["waves"].std()) - 1.0) < 0.02
    is_pad = data["words"] == 49
    lengths = 8 - is_pad.flip(1).long().cumprod(1).sum(1)
    assert set(lengths.tolist()) >= set(range(2, 9))
    assert set(data["codes"].unique().tolist()) == set(range(4))
    assert set(data["class"].unique().tolist()) == set(range(10))


def test_the_page_shows_every_result_and_failure(tmp_path):
    rows = ResultLog(CPU, None, lambda line: None)
    rows.add("train <tiny>: MFU", {"fast": 0.4, "plain": 0.2}, "")
    html = bench_all.page(rows, ["a part <failed>"], tmp_path)
    assert "data:image/png;base64" in html
    assert "&lt;failed&gt;" in html
    assert "train &lt;tiny&gt;: MFU<td>fast<td>0.4<td><td>2.00" in html


@pytest.mark.long
def test_fp8_is_compared_with_bf16_and_fails_where_losses_differ(tmp_path, monkeypatch):
    """In worker processes with stub trainers: losses that differ by 1% pass, by 5% they do not."""
    (tmp_path / "measured_trainers.py").write_text(TRAINERS)
    monkeypatch.syspath_prepend(tmp_path)
    trainers = importlib.import_module("measured_trainers")
    monkeypatch.setenv("ANYSTATE_EMULATE_FP8", "1")  # needs no GPU
    monkeypatch.setattr(training, "text_image", trainers.one_percent)
    rows = ResultLog(CPU, tmp_path / "rows.json", lambda line: None)
    training.fp8("tiny", CPU, rows, "never", steps=4)
    written = json.loads((tmp_path / "rows.json").read_text())
    loss = {row["engine"]: row for row in written if "loss of x near step 4" in row["name"]}
    assert loss["fp8"]["value"] == pytest.approx(2.02)
    assert loss["bf16"]["value"] == pytest.approx(2.0)
    assert loss["fp8"]["agrees"]
    assert loss["fp8"]["apart"] == pytest.approx(0.01)
    assert {row["engine"] for row in written if row["name"].endswith("samples per second")} == {"bf16", "fp8"}
    monkeypatch.setattr(training, "text_image", trainers.five_percent)
    rows = ResultLog(CPU, tmp_path / "rows.json", lambda line: None)
    with pytest.raises(ValueError, match=r"losses differ from bf16's, that of x by 5.0%; allowed 2%"):
        training.fp8("tiny", CPU, rows, "never", steps=4)
    assert not rows.results[-1].about["agrees"]


TRAINERS = """
import torch
from anystate.bench.speed.systems import SyntheticTrainer, config_of

class Stub(SyntheticTrainer):
    def update(self):
        return {"x": torch.tensor(2.0 * (1.0 + self.off))}

def trainer(device, settings, size, off):
    made = Stub(config_of(size, [s.replace("fp8", "bf16") for s in settings]), device)
    made.off = off if "train.precision=fp8" in settings else 0.0
    return made

def one_percent(device, settings, size):
    return trainer(device, settings, size, 0.01)

def five_percent(device, settings, size):
    return trainer(device, settings, size, 0.05)
"""


def test_figures_are_written(tmp_path):
    scaling.plot({16: 1.0, 64: 1.1}, {5: 100.0}, {0.02: {1000: 1.0, 8000: 1.1}}, tmp_path / "scaling.png")
    points = [point("a", s, n, n, 0.1 * n) for s in ("heun, linear", "euler") for n in (2, 4)]
    sampler_figure.plot([*points, point("a", "real", 0, 0, 0.1)], tmp_path / "samplers.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    assert (tmp_path / "samplers.png").stat().st_size > 1000


PEAKS = """
import torch
from anystate.bench.speed import scaling

device = torch.device("cpu")
x = torch.ones(16_000_000)
del x
before = scaling.reset_peak(device)
print(scaling.peak(device) - before)
x = torch.ones(16_000_000)
print(scaling.peak(device) - before)
del x
print(scaling.peak(device) - before)
"""


@pytest.mark.skipif(not scaling.STATUS.is_file(), reason="reads the memory of a process from Linux")
def test_peak_memory_is_counted_from_the_reset():
    """64 MB allocated and freed before do not count, those after do."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", PEAKS], env=env, capture_output=True, text=True, check=True)
    before, allocated, after = map(float, done.stdout.split())
    assert before < 10
    assert 54 < allocated < 74
    assert after > 54


def test_tau_leaps_with_few_jumps_take_less_time():
    torch.set_num_threads(1)
    few, all_ = (scaling.leap_time(CPU, 8000, rate) for rate in (0.02, 1.0))
    assert few < 0.5 * all_


def test_quantiles_and_timer():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    now = timer(CPU)
    assert now() <= now()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "train", "--size", "huge"], "'huge' is not one of 'official'"),
        (["bench", "train", "--compile", "maybe"], "'maybe' is not one of 'always', 'never'"),
        (["bench", "train", "--steps", "0"], "'--steps'"),
        (["bench", "sample", "--batch-size", "a,b"], "--batch-size takes whole numbers"),
        (["bench", "train", "--size", "tiny", "--fp8", "--device", "cpu"], "fp8 needs a GPU, not cpu"),
        (["bench", "samplers"], "give --digits RUN, --table RUN or both"),
    ],
)
def test_bad_input_is_one_line(arguments, message, refused):
    assert message in refused(*arguments)


def test_other_benchmarks_run_if_one_fails(tmp_path, monkeypatch, capsys):
    def fail():
        raise TypeError("two\nlines")

    def work():
        rows.add("it", {"fast": 1.0}, "1/s")

    def benchmarks(device, rows_, quick, folder):
        nonlocal rows
        rows = rows_
        return {"first": fail, "second": work}

    rows = None
    monkeypatch.setattr(bench_all, "benchmarks", benchmarks)
    json_file, html = tmp_path / "a.json", tmp_path / "a.html"
    assert bench_all.run_all(CPU, json_file, html, True, 60.0, Console()) == 1
    assert "first: TypeError: two lines" in capsys.readouterr().out
    assert [row["name"] for row in json.loads(json_file.read_text())] == ["it"]
    assert "first: TypeError: two lines" in html.read_text()
