"""Agreement for any mix: against modalities whose relation is known, with absent modalities, and as a command."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from anystate.bench.quality.agreement import Agreement, Judges, share
from anystate.bench.quality.class_readers import Attribute, ClassReader
from anystate.bench.quality.evaluation import Evaluation
from anystate.bench.quality.hooks import evaluate as evaluate_in_training
from anystate.bench.quality.hooks import save_galleries
from anystate.bench.quality.metrics import LikelihoodBounds
from anystate.configs.load import load_config
from anystate.model.build import build_codecs
from anystate.sample.pipeline import build_pipeline
from anystate.train.data.dataset import InMemory
from anystate.train.data.load import encode_split, load_data
from anystate.train.trainer import Trainer

ROWS = """
name: rows
modalities:
  row: {kind: columns, stream: {width: 16}}
  spectrum: {kind: vector, size: 3, stream: {width: 16}}
network: {depth: 1, heads: 2, head_dim: 8}
train: {steps: 2, batch: 16}
sample: {steps: 2, batch_size: 16}
"""


class Given:
    """Samples that a test chooses, in place of `Samples`."""

    def __init__(self, drawn, directions):
        self.drawn, self.directions = drawn, directions

    def draw(self, direction, n):
        return self.drawn[direction]

    def examples(self, direction, n):
        return torch.arange(n)


def rows(n, seed):
    """Rows with a group that the vector beside them shows and a colour that it does not; every fifth lacks it."""
    rng = np.random.default_rng(seed)
    group = rng.choice(["a", "b", "c"], n, p=[0.6, 0.2, 0.2])
    centre = np.array([{"a": 0.0, "b": 4.0, "c": -4.0}[g] for g in group])
    vectors = centre[:, None] + rng.normal(0, 0.3, (n, 3))
    table = pd.DataFrame({"size": rng.normal(0, 1, n), "group": group, "colour": rng.choice(["red", "blue"], n)})
    return InMemory({"row": table, "spectrum": [None if i % 5 == 4 else v for i, v in enumerate(vectors)]})


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """(pipeline, training examples, held-out examples) of rows and vectors, random weights."""
    path = tmp_path_factory.mktemp("rows") / "rows.yaml"
    path.write_text(ROWS)
    config = load_config(path)
    codecs = build_codecs(config)
    train, test = encode_split(rows(400, 0), rows(60, 1), config, codecs, "rows")
    return build_pipeline(config, codecs), train, test


def measured(mix, row_given_spectrum, spectrum_given_row):
    """The metrics of samples given as encoded examples."""
    pipeline, train, test = mix
    directions = {"given_row": ("row",), "given_spectrum": ("spectrum",), "joint": ()}
    drawn = {"given_row": spectrum_given_row, "given_spectrum": row_given_spectrum, "joint": spectrum_given_row}
    samples = Given(drawn, directions)
    return Agreement(Evaluation(pipeline, train, test, samples, len(test))).measure()


def test_real_data_as_samples_reach_the_classifier(mix):
    """Samples that are the held-out examples: all classes are right, and vectors are as good as real ones."""
    _, _, test = mix
    same = {k: x.nan_to_num() if x.is_floating_point() else x for k, x in test.first(slice(None)).items()}
    has = test.present["spectrum"].numpy()
    found = measured(mix, same, same)
    assert found["row.group given spectrum"]["value"] == found["row.colour given spectrum"]["value"] == 1.0
    assert found["classifier on real spectrum: row.group"] == {"value": 1.0, "error": 0.0, "samples": int(has.sum())}
    assert found["classifier on real spectrum: row.colour"]["value"] < 0.75
    group = test.raw.values["row"]["group"]
    assert found["majority: row.group"]["value"] == pytest.approx((group == "a").mean())
    assert found["majority: row.group"]["samples"] == 60
    # absent vectors are stored as zeros, which the classifier takes for class a
    right = np.where(has, True, group == "a")
    assert found["spectrum given row: row.group"]["value"] == pytest.approx(right.mean())
    assert found["joint row.group: row and spectrum"]["value"] == pytest.approx(right.mean())
    names = list(found)
    assert names.index("row.group given spectrum") < names.index("row.colour given spectrum")


def test_shuffled_samples_agree_by_chance(mix):
    _, _, test = mix
    order = torch.from_numpy(np.random.default_rng(3).permutation(60))
    found = measured(mix, test.first(order), {k: x.nan_to_num() for k, x in test.first(order).items()})
    for name in ("row.group given spectrum", "spectrum given row: row.group"):
        assert found[name]["value"] < 0.8
        assert found[name]["error"] == pytest.approx((found[name]["value"] * (1 - found[name]["value"]) / 60) ** 0.5)


def test_wrong_classes_count(mix):
    """One column of tokens is changed: only its metric falls."""
    pipeline, _, test = mix
    same = test.first(slice(None))
    c = pipeline.codecs["row"].table.categorical.index("colour")
    wrong = same["row_cat"].clone()
    wrong[:, c] = 1 - wrong[:, c]
    found = measured(mix, {**same, "row_cat": wrong}, {k: x.nan_to_num() for k, x in same.items()})
    assert found["row.colour given spectrum"]["value"] == 0.0
    assert found["row.group given spectrum"]["value"] == 1.0


def test_judges_leave_out_columns_with_too_many_classes(mix, monkeypatch):
    pipeline, train, test = mix
    monkeypatch.setattr("anystate.bench.quality.agreement.MAX_CLASSES", 2)
    judges = Judges(pipeline, train, test)
    assert judges.attributes == [Attribute("row", "colour")]
    assert str(judges.attributes[0]) == "row.colour"


def test_readers_are_not_misled_by_features_that_hardly_vary():
    """Noise on a feature that is almost constant in training, and many more features than components."""
    rng = np.random.default_rng(0)
    classes = rng.choice(["x", "y"], 300)
    x = rng.normal(0, 1, (300, 400))
    x[:, 200:] += np.where(classes == "x", 0.4, -0.4)[:, None]
    x[:, :50] = 0.0
    x[0, :50] = 0.01
    reader = ClassReader(x[:200], classes[:200])
    held_out = x[200:].copy()
    held_out[:, :50] = rng.normal(0, 0.1, (100, 50))
    assert (reader(held_out) == classes[200:]).mean() > 0.95
    again = ClassReader(x[:200], classes[:200])
    assert (again(held_out) == reader(held_out)).all()


def test_share_of_nothing_is_no_metric():
    assert share("m", np.zeros(0, dtype=bool)) == {}
    assert share("m", np.array([True, False])) == {"m": {"value": 0.5, "error": 0.125**0.5, "samples": 2}}


def test_exact_match_accepts_every_version(three):
    """Digits have four captions; the last one of the example, and one of another digit."""
    config = three()
    codecs = build_codecs(config)
    train, test = load_data(config, codecs)
    pipeline = build_pipeline(config, codecs)
    n = 20
    directions = {"given_image": ("image",)}
    for shift, value in ((0, 1.0), (1, 0.0)):
        drawn = test.first(slice(0, n))
        digit = (test.labels["digit"][:n] + shift) % 10
        last = {d: i for i, d in enumerate(test.labels["digit"].tolist())}
        drawn["text"] = torch.stack([test.x["text"][last[d], 3].long() for d in digit.tolist()])
        evaluation = Evaluation(pipeline, train, test, Given({"given_image": drawn}, directions), n)
        found = Agreement(evaluation).measure()
        assert found["text exact match given image"]["value"] == value
        assert found["text given image: label"]["value"] == value
        assert found["label given image"]["value"] == 1.0


def test_one_modality_has_no_agreement(mix):
    pipeline, train, test = mix
    alone = dataclasses.replace(
        pipeline, config=pipeline.config.model_copy(update={"modalities": {"row": pipeline.modalities["row"]}})
    )
    with pytest.raises(ValueError, match="a model of several modalities"):
        Agreement(Evaluation(alone, train, test, Given({}, {}), 4))


@pytest.fixture(scope="module")
def three_run(tmp_path_factory, three):
    """A model of images, classes and captions, evaluated during training."""
    out = tmp_path_factory.mktemp("three_run") / "run"
    Trainer(three("train.eval_every=4"), out, "cpu", on_evaluate=evaluate_in_training, quiet=True).run()
    return out


def test_eval_of_three_modalities(call, three_run, tmp_path, capsys):
    """Families are chosen by what applies; results, table, samples of every direction and report."""
    out = tmp_path / "e"
    assert call("eval", three_run, "--out", out, "--n", 12, "--device", "cpu", "--repeats", 2) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["results"]
    assert set(results) == {"elbo", "labels", "agreement"}
    bounds = results["elbo"]
    assert bounds["examples"] == {"value": 12}
    assert {f"{m}_{how}" for m in ("image", "label", "text") for how in ("alone", "given")} < set(bounds)
    found = results["agreement"]
    for name in (
        "label given image",
        "label given rest",
        "image given label: label",
        "image given text: label",
        "image given rest: label",
        "classifier on real image: label",
        "majority: label",
        "joint label: label and text",
        "joint label: image and text",
        "text exact match given image",
    ):
        assert 0.0 <= found[name]["value"] <= 1.0
        assert name in shown
    assert found["classifier on real image: label"]["value"] > 0.95
    assert found["classifier on real text: label"]["value"] > 0.99
    assert found["majority: label"]["value"] < 0.2
    assert results["labels"]["judge on real pictures digit"]["value"] > 0.95
    folders = {path.parent.name for path in out.glob("*/*.safetensors")}
    assert folders == {
        "joint", *(f"given_{m}" for m in ("image", "label", "text")),
        *(f"{m}_given_rest" for m in ("image", "label", "text")),
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "classifier on real image: label" in page
    assert 'src="http' not in page


def test_agreement_during_training(three_run):
    rows = [json.loads(line) for line in (three_run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "agreement/label given image" in row]
    assert row["step"] == 4
    assert {"held_out/image", "held_out/label", "held_out/text"} < set(row)
    assert row["agreement/classifier on real image: label"] > 0.95


def test_evaluation_and_galleries_of_incomplete_examples(tmp_path):
    """Rows of which every fifth lacks the vector: losses, agreement and contact sheets all the same."""
    (tmp_path / "rows.yaml").write_text(ROWS)
    config = load_config(tmp_path / "rows.yaml", ["train.eval_every=2", "train.sample_every=2", "train.log_every=1"])
    hooks = {"on_sample": save_galleries, "on_evaluate": evaluate_in_training}
    Trainer(config, tmp_path / "run", "cpu", data=(rows(80, 0), rows(40, 1)), quiet=True, **hooks).run()
    found = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"held_out/row_num", "held_out/row_cat", "held_out/spectrum", "agreement/row.group given spectrum"} < set(
        found
    )
    sheets = {path.name for path in (tmp_path / "run" / "samples").iterdir()}
    assert sheets == {f"00000002_{name}.png" for name in ("joint", "given_row", "given_spectrum")}


def test_bounds_leave_out_what_is_absent(mix):
    pipeline, train, test = mix
    found = LikelihoodBounds(Evaluation(pipeline, train, test, Given({}, {}), 60, repeats=2)).measure()
    assert found["examples"]["value"] == 60
    assert "samples" not in found["row_cat_alone"]
    assert found["spectrum_alone"]["samples"] == found["row_num_given"]["samples"] == 48
    assert found["spectrum_alone"]["unit"] == "bits/dim (density)"
