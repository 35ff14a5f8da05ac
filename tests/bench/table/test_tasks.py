"""Benchmarks of conditional rows and imputation: correct scores of known methods; finished runs are kept."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from anystate.bench.table import imputation as imputation_bench
from anystate.bench.table.columns import Roles
from anystate.bench.table.conditional import conditional, summary
from anystate.bench.table.imputation import imputation, remove, verdict
from anystate.bench.table.tasks import Tasks

ROLES = Roles(("x", "y"), ("kind", "label"), "label", "binclass")


def table(n: int, seed: int) -> pd.DataFrame:
    """y is 2x plus noise, label depends on kind."""
    r = np.random.default_rng(seed)
    x, kind = r.standard_normal(n), r.choice(["a", "b", "c"], n, p=[0.5, 0.45, 0.05])
    label = np.where(r.random(n) < np.select([kind == "a", kind == "b"], [0.9, 0.2], 0.5), "yes", "no")
    return pd.DataFrame({"x": x, "y": 2 * x + 0.1 * r.standard_normal(n), "kind": kind, "label": label})


class OracleModel:
    """Samples from the true distribution; with `wrong`, conditional samples have another probability of yes."""

    feature_names_in_ = tuple(table(1, 0))

    def __init__(self, wrong: float = 0.0):
        self.wrong = wrong

    def sample(self, n, where=None, seed=0):
        if where is None:
            return table(n, seed + 100)
        rows = table(40 * n, seed + 200)
        rows = rows[np.logical_and.reduce([rows[c] == v for c, v in where.items()])].head(n).reset_index(drop=True)
        flip = np.random.default_rng(seed).random(len(rows)) < self.wrong
        return rows.assign(label=rows["label"].mask(flip, "no"))

    def impute(self, holes, how, draws, seed):
        return holes.assign(
            x=holes["x"].fillna(holes["y"] / 2).fillna(0.0),
            y=holes["y"].fillna(2 * holes["x"]).fillna(0.0),
            kind=holes["kind"].fillna("a"),
            label=holes["label"].fillna((holes["kind"] == "b").map({True: "no", False: "yes"})),
        ), None


def test_exact_conditional_rows_are_as_good_as_filtered_ones_and_wrong_ones_worse():
    real = table(20_000, 0)
    good, bad = (conditional(OracleModel(w), real, ["kind"], "label", table(6000, 100), 400) for w in (0.0, 0.4))
    assert [c.given for c in good] == [("a",), ("b",), ("c",)]
    for c in good:
        assert c.filtered == pytest.approx(6000 * c.share, rel=0.2)
        assert c.cost == 15
        assert c.ours < 0.08
        assert c.theirs < 0.08
    assert bad[0].ours == pytest.approx(0.9 * 0.4, abs=0.05)
    rows = summary(bad, rare=0.1)
    assert [row["conditions"] for row in rows][-1] == "rarer than 10.0% of rows"
    assert rows[-1]["n"] == 1
    assert rows[1]["ours"] == pytest.approx(np.average([c.ours for c in bad], weights=[c.real for c in bad]))
    with pytest.raises(ValueError, match="unknown column 'colour'"):
        conditional(OracleModel(), real, ["colour"], "label", real)


def test_an_empty_filter_counts_as_distance_one():
    found = conditional(OracleModel(), table(20_000, 0), ["kind"], "label", table(3, 100), 50)
    rare = found[2]
    assert np.isnan(rare.theirs) or rare.filtered > 0
    assert all(np.isfinite(row["theirs"]) for row in summary(found))


def test_scores_of_exact_imputation_and_of_baselines():
    train, test = table(2000, 0), table(1000, 1)
    rows = imputation(train, test, ROLES, lambda holes: OracleModel().impute(holes, "", 0, 0)[0], one_hot_rows=500)
    score = {(r.column, r.filler): r.score for r in rows}
    assert score["y", "anystate"] == pytest.approx(np.sqrt(0.2 + 0.8 * 0.05**2), abs=0.08)  # x is gone in a fifth
    assert score["x", "mean/mode"] == pytest.approx(1.0, abs=0.05)
    assert score["y", "iterative, one-hot"] == pytest.approx(score["y", "anystate"], abs=0.05)
    assert score["kind", "mean/mode"] == pytest.approx(0.5, abs=0.08)
    assert score["label", "anystate"] > score["label", "mean/mode"] + 0.1
    assert verdict(rows, "x") != "better"  # the same line as regression finds
    truth = imputation(train, test, ROLES, lambda holes: test, one_hot_rows=500)
    assert {verdict(truth, c) for c in test} == {"better"}
    holes, gone = remove(test, 0.2, 0)
    assert gone.mean() == pytest.approx(0.2, abs=0.02)
    assert (holes.isna().to_numpy() == gone).all()


def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(imputation_bench, "_one_hot", lambda train, roles: imputation_bench._simple(train, roles))
    folder = tmp_path / "tabular" / "toy"
    folder.mkdir(parents=True)
    for part, seed in (("train", 0), ("test", 1)):
        table(800, seed).to_csv(folder / f"{part}.csv.gz", index=False)
    roles = {"numerical": ["x", "y"], "categorical": ["kind"], "target": "label", "task": "binclass", "name": "toy"}
    (folder / "schema.yaml").write_text(yaml.safe_dump(roles))
    fits = []

    def fit(train, schema, recipe, seed):
        fits.append((schema.name, recipe, seed))
        return OracleModel()

    console = Console(file=io.StringIO(), width=200)
    tasks = Tasks(["toy"], range(2), "default", fit, tmp_path / "out", tmp_path / "tabular", console)
    tasks.conditional([["kind"], ["kind", "label"]], 50, 500)
    tasks.imputation(4, 0.2, 300)
    assert fits == [("toy", "default", 0), ("toy", "default", 1)] * 2
    tasks.conditional([["kind"], ["kind", "label"]], 50, 500)
    tasks.imputation(4, 0.2, 300)
    assert len(fits) == 4
    tasks.conditional([["kind"], ["kind", "label"]], 60, 500)  # other settings
    assert len(fits) == 6
    saved = json.loads((tmp_path / "out" / "conditional.json").read_text())
    assert {"commit", "device", "date", "versions"} <= set(saved[0]["origin"])
    shown = console.file.getvalue()
    assert "weighted by real rows" in shown
    assert "mean/mode" in shown
    with pytest.raises(ValueError, match="set 'gone' is not in"):
        Tasks(["gone"], [0], "default", fit, tmp_path / "out", tmp_path / "tabular", console).imputation(4, 0.2, None)
