"""The report renders for any table as one self-contained page with the right scores and notes."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from anystate.bench.table.report import report
from anystate.model.codecs.table.schema import infer

N = 60


def check(page: str) -> None:
    """A self-contained, well-formed page: all URLs are data URLs, all tags are closed, no NaN."""
    from html.parser import HTMLParser

    for address in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page):
        assert address.startswith("data:image/png;base64,")
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r'(?:x|y|width|height)="(?:nan|-?inf)', page)
    assert not re.search(r">\s*nan\s*<", page)

    class Tags(HTMLParser):
        void = ("meta", "br", "img", "line", "rect", "image")
        open: list[str]

        def handle_starttag(self, tag, attrs):
            if tag not in self.void:
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in self.void:
                assert self.open.pop() == tag

    tags = Tags()
    tags.open = []
    tags.feed(page)
    assert not [t for t in tags.open if t not in ("p", "li", "td", "tr", "th")]


def wide(columns: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({f"c{i}": rng.normal(size=N) if i % 2 else rng.choice(list("abc"), N) for i in range(columns)})


def tables() -> dict[str, tuple]:
    """name: (real, synth, test or None, target)."""
    rng = np.random.default_rng(0)
    x, letters = rng.normal(size=N), rng.choice(list("ab"), N)
    base = pd.DataFrame({"x": x, "k": letters})
    again = base.sample(frac=1, random_state=0).reset_index(drop=True)
    dated = pd.DataFrame({"d": pd.date_range("2024-01-01", periods=N, freq="h"), "b": rng.random(N) < 0.5})
    many = pd.DataFrame({"k": (np.arange(2000) // 2).astype(str), "x": np.arange(2000.0)})
    nasty = pd.DataFrame(
        {
            "constant": 3,
            "word": "same",
            "empty": np.nan,
            "no words": pd.Series([None] * N, dtype=object),
            "ends": [np.inf, -np.inf, *x[2:]],
            "spike": np.where(np.arange(N) < 55, 0, 1e9 * np.arange(N)),
            "<script>alert(1)</script>": letters,
            "ünï→𝛼": [f"<b>&\"'\u0000{i % 7}" for i in range(N)],
            "mixed": [1, 2.0, "three", True, None] * (N // 5),
            "id": [f"row {i}" for i in range(N)],
            "y": letters,
        }
    )
    return {
        "plain with target and test": (base, again, base[::-1], "k"),
        "regression": (base, again, base[::-1], "x"),
        "one number": (base[["x"]], again[["x"]], base[["x"]], None),
        "one category": (base[["k"]], again[["k"]], None, None),
        "only categories": (base.assign(j=base["k"]).drop(columns="x"), again.assign(j=again["k"]).drop(columns="x"),
                            None, "k"),
        "dates and flags": (dated, dated[::-1], dated, None),
        "nasty": (nasty, nasty[::-1], nasty[:30], "y"),
        "200 columns": (wide(200, 0), wide(200, 1), None, None),
        "1000 categories": (many, many[::-1], None, None),
        "ten rows": (base[:10], again[:10], base[:10], "k"),
        "one row": (base[:1], again[:1], base[:1], "k"),
        "one class in synth": (base, again.assign(k="a"), base, "k"),
        "other levels and missing": (base, again.assign(k="z", x=np.nan), base, None),
        "column order and dtypes": (base, again[["k", "x"]].astype({"k": "category"}), base, "k"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(tables()))
def test_renders(tmp_path, name):
    real, synth, test, target = tables()[name]
    out = tmp_path / "deep" / "page.html"
    scores = report(real, synth, test, out, target=target, fast=True)
    page = out.read_text()
    check(page)
    assert "Shape" in page
    assert {"shape", "trend", "copies"} <= set(scores)
    assert "<script>alert" not in page
    if name == "nasty":
        assert scores["copies"] == 1.0, "the same rows in another order"
        assert "Infinite values count as missing: ends" in page
        assert (
            "Not scored: constant (a constant), word (a constant), empty (a constant), no words (a constant), id"
            in page
        )
    if name == "other levels and missing":
        assert "Without a value in one of the tables" in page
    if name == "200 columns":
        assert "The worst 60 of 200" in page
        assert page.count('<figure class="card">') == 60
        assert len(page) < 3e6
    if name == "plain with target and test":
        assert {"mle", "mle_official", "closer_to_train"} <= set(scores)
    if name == "one class in synth":
        assert "No MLE" in page


def test_a_published_set_is_recognized(real_table, tmp_path):
    """Adult is recognized: the official baselines are shown, with a warning about copies of training rows."""
    train, test, _ = real_table("adult")
    train.to_csv(tmp_path / "real.csv", index=False)
    test[:3000].to_csv(tmp_path / "test.csv", index=False)
    train[:3000].to_csv(tmp_path / "synth.csv", index=False)
    scores = report(*(tmp_path / f"{n}.csv" for n in ("real", "synth", "test")), tmp_path / "r.html", fast=True)
    page = (tmp_path / "r.html").read_text()
    check(page)
    assert "Recognized as Adult" in page
    for baseline in ("99.06 ± 0.01", "92.62 ± 0.02", "93.09 ± 0.33", "98.73"):
        assert baseline in page
    assert "The baselines are for 32,561 synthetic rows; 3,000 rows" in page
    assert scores["copies"] == 1.0
    assert page.count("⚠</td>") == 3


def test_no_warning_for_fresh_rows(mixed, tmp_path):
    tables = (mixed(600, 0), mixed(600, 1), mixed(400, 2))
    scores = report(*tables, tmp_path / "r.html", target="label", fast=True)
    page = (tmp_path / "r.html").read_text()
    assert "⚠</td>" not in page
    assert report(*tables, tmp_path / "r.html", target="label", fast=True) == scores
    assert (tmp_path / "r.html").read_text() == page, "the same tables gave another page"


def test_baselines_are_measured_for_a_part_of_a_set(real_table, tmp_path):
    """Published baselines are used for all rows of adult only, not for a few hundred rows with its schema."""
    train, _, roles = real_table("adult")
    schema = {"name": "adult", "numerical": list(roles.numerical), "categorical": list(roles.categorical[:-1]),
              "target": "income", "task": "binclass"}  # fmt: skip
    report(train[:400], train[400:800], None, tmp_path / "r.html", schema=schema)
    page = (tmp_path / "r.html").read_text()
    assert "99.06 ± 0.01" not in page
    assert "were measured with this table" in " ".join(page.split())


def test_schema_rules(mixed, tmp_path):
    """A schema's roles are used; the page notes that the rows are a part of a set."""
    schema = {"name": "mine", "numerical": ["size"], "categorical": ["count"], "partial": True}
    scores = report(mixed(), mixed(600, 1), None, tmp_path / "r.html", schema=schema)
    page = (tmp_path / "r.html").read_text()
    assert "mine" in page
    assert "never compare" in page
    assert ">size<" in page
    assert ">weight<" not in page
    assert scores["shape"] > 0.9


def test_the_schema_of_table_fit_is_that_of_the_report(mixed, tmp_path):
    """The same file with a kind for each column, or with lists of names, gives the same roles and scores."""
    real, synth = mixed(300, 0), mixed(300, 1)
    (tmp_path / "kinds.yaml").write_text(infer(real).dump() + "target: label\ntask: binclass\n")
    lists = {"numerical": ["size", "weight", "count", "when"], "categorical": ["kind", "flag"], "target": "label"}
    scores = [report(real, synth, None, tmp_path / "r.html", s) for s in (tmp_path / "kinds.yaml", lists)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"synth": lambda t: t.drop(columns="size"), "target": "size"}, "synth table lacks column 'size', the target"),
        ({"synth": lambda t: t.assign(other=1)[["other"]]}, "nothing to score"),
        ({"test": lambda t: t.drop(columns="kind")}, "test table lacks column 'kind'"),
        ({"synth": lambda t: t.assign(size="many")}, "'size' of the synth table holds text"),
        ({"real": lambda t: t[:0]}, "real table has no rows"),
        ({"real": lambda t: pd.concat([t, t["size"]], axis=1)}, "real table has two columns named 'size'"),
        ({"target": "income"}, "target 'income' is not a column"),
        ({"synth": lambda t: "gone.csv"}, "'gone.csv' not found"),
        ({"schema": {"numerical": ["age"]}}, "column 'age'"),
        ({"schema": "gone.yaml"}, "schema 'gone.yaml' not found"),
        ({"schema": {"numeric": ["size"]}}, "schema: unknown key 'numeric'"),
    ],
)
def test_bad_input(mixed, tmp_path, change, message):
    kwargs = {"real": mixed(), "synth": mixed(), "test": mixed(), "out": tmp_path / "r.html"}
    for key, value in change.items():
        kwargs[key] = value(kwargs[key]) if callable(value) else value
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        report(**kwargs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r.html").exists()
