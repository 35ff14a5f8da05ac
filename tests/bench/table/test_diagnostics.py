"""Equal tables score as equal whatever their format, and what is wrong with a table is found, and nothing else."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pandas as pd
import pytest

from anystate.bench.table.columns import comparable
from anystate.bench.table.diagnostics import Finding, diagnostics
from anystate.bench.table.report import report
from anystate.model.codecs.table.files import read_table, write_table
from anystate.model.codecs.table.schema import infer


def drawn(seed: int, n: int = 2000) -> pd.DataFrame:
    """Rows of one distribution, with a column of every kind."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "key": [f"c{seed}-{i:05d}" for i in range(n)], "const": "same",
        "age": rng.integers(18, 90, n), "price": np.round(rng.gamma(2, 20, n), 2),
        "when": pd.Timestamp("2022-01-01") + pd.to_timedelta(rng.integers(0, 5e7, n), "s"),
        "day": pd.Timestamp("2022-01-01") + pd.to_timedelta(rng.integers(0, 500, n), "D"),
        "flag": rng.random(n) < 0.3, "kind": rng.choice(list("abc"), n, p=[0.5, 0.3, 0.2]),
        "gap": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
    })  # fmt: skip


def found(real: pd.DataFrame, synth: pd.DataFrame) -> list[Finding]:
    columns = infer(real).columns
    cells = {"real": comparable(real, columns, "real"), "synth": comparable(synth, columns, "synth")}
    return diagnostics(columns, {"real": real, "synth": synth}, cells, has_types=True)


def test_a_fresh_table_scores_high_in_every_column(tmp_path):
    """The largest distance of two empirical distributions of 1,600 draws each exceeds 1.95 √(2 / 1600) = 0.069 with
    probability 0.001 per column (Kolmogorov and Smirnov)."""
    for i, name in ((0, "real.csv"), (1, "fresh.csv")):
        drawn(i).to_csv(tmp_path / name, index=False)
    scores = report(tmp_path / "real.csv", tmp_path / "fresh.csv", None, tmp_path / "r.html", fast=True)
    page = (tmp_path / "r.html").read_text()
    shapes = dict(re.findall(r"<figcaption>(\w+)<span>([\d.]+)</span>", page))
    assert set(shapes) == {"age", "price", "when", "day", "flag", "kind", "gap"}
    assert all(float(shape) > 93.1 for shape in shapes.values())
    assert scores["copies"] == 0
    assert "Not scored: key (a key), const (a constant)." in page


def test_the_same_rows_in_every_format_score_the_same(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    real, fresh = drawn(0, 150), drawn(1, 150)
    pairs = [("parquet", "csv"), ("csv", "parquet"), ("feather", "json")]
    pairs += [("xlsx", "csv")] * bool(importlib.util.find_spec("openpyxl"))
    for ending in {ending for pair in pairs for ending in pair}:
        write_table(real, tmp_path / f"real.{ending}")
        write_table(fresh, tmp_path / f"fresh.{ending}")
    page = tmp_path / "r.html"
    expected = report(real, fresh, None, page, fast=True)
    for a, b in pairs:
        scores = report(tmp_path / f"real.{a}", tmp_path / f"fresh.{b}", None, page, fast=True)
        assert scores == pytest.approx(expected), (a, b)
    same = report(tmp_path / "real.parquet", tmp_path / "real.csv", None, page, fast=True)
    assert (same["shape"], same["trend"], same["copies"]) == (1.0, 1.0, 1.0)


def test_names_of_integers_and_categories_of_numbers_survive_a_text_file(tmp_path):
    rng = np.random.default_rng(0)
    real = pd.DataFrame({0: rng.normal(size=90), 1: pd.Categorical(rng.integers(0, 3, 90)), 2: rng.random(90) < 0.5})
    write_table(real, tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv").columns.tolist() == ["0", "1", "2"]
    scores = report(real, tmp_path / "t.csv", None, tmp_path / "r.html", fast=True)
    assert (scores["shape"], scores["trend"], scores["copies"]) == (1.0, 1.0, 1.0)
    zoned = pd.DataFrame({"t": pd.date_range("2022-01-01", periods=90, freq="h", tz="Europe/Berlin"), "x": real[0]})
    write_table(zoned, tmp_path / "t.csv")
    assert report(zoned, tmp_path / "t.csv", None, tmp_path / "r.html", fast=True)["copies"] == 1.0


def test_new_rows_of_the_distribution_show_nothing(tmp_path):
    """Gaps are said, without a warning, which by chance would come with probability 1e-4 per column."""
    for seed in range(1, 11):
        findings = found(drawn(0), drawn(seed))
        assert not [f for f in findings if f.warns]
        assert {(f.column, f.what) for f in findings} >= {("gap", "missing cells")}


@pytest.mark.parametrize(
    ("change", "column", "what", "synth"),
    [
        (lambda t: t.assign(age=t["age"] + 100), "age", "values outside the real range", "2,000 (100.00%)"),
        (lambda t: t.assign(price=t["price"].where(t.index > 4, -0.5)), "price", "negative numbers", "5 (0.25%)"),
        (lambda t: t.assign(price=t["price"].where(t.index > 1, 1.005)), "price", "more than 2 decimals", "2 (0.10%)"),
        (lambda t: t.assign(age=t["age"].where(t.index > 3, 20.5)), "age", "fractions of whole numbers", "4 (0.20%)"),
        (lambda t: t.assign(day=t["day"] + pd.Timedelta("1s")), "day", "dates between full days", "2,000 (100.00%)"),
        (lambda t: t.assign(kind=t["kind"].where(t.index > 2, "d")), "kind", "categories, such as 'd'", "3 (0.15%)"),
        (lambda t: t.assign(const=t["const"].where(t.index > 0, "x")), "const", "than the constant", "1 (0.05%)"),
        (lambda t: t.assign(key=t["key"].where(t.index > 1, "c9")), "key", "occur more than once", "2 (0.10%)"),
        (lambda t: t.assign(key=t["key"].where(t.index > 0, "c0-00007")), "key", "keys of real rows", "1 (0.05%)"),
        (lambda t: t.assign(gap=t["gap"].where(t.index > 999)), "gap", "missing cells", None),
        (lambda t: t.assign(age=t["age"].astype(object).where(t.index > 0, "old")), "age", "no number, such as old",
         "1 (0.05%)"),
        (lambda t: t.drop(columns="age"), "age", "column is missing", "–"),
        (lambda t: t.assign(more=1), "more", "column is new", "present"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(change, column, what, synth):
    warnings = [f for f in found(drawn(0), change(drawn(1))) if f.warns]
    assert {f.column for f in warnings} == {column}
    finding = next(f for f in warnings if what in f.what)
    assert synth in (None, finding.synth)


def test_the_page_shows_the_findings(tmp_path):
    wrong = drawn(1).assign(age=lambda t: t["age"] - 100).drop(columns="day").astype({"kind": "category"})
    report(drawn(0), wrong, None, tmp_path / "r.html", fast=True)
    page = " ".join((tmp_path / "r.html").read_text().split())
    assert '<td>age</td><td class="low">negative numbers ⚠</td>' in page
    assert "<td>kind</td><td>another dtype</td>" in page
    assert "day (missing in the synthetic rows)" in page
