"""The benchmark computes the runs that are missing, keeps the others, and prints published numbers unchanged."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

import anystate
from anystate.bench.table.baselines import independent, resample
from anystate.bench.table.quality import QualityResult, _cell, published, quality, read_results, tables

TABLES_MD = Path(anystate.__file__).resolve().parent.parent / "shared" / "tables.md"


@pytest.fixture
def data(mixed, tmp_path):
    """A folder with two small sets."""
    for name, target, task in (("tiny", "label", "binclass"), ("adult", "size", "regression")):
        folder = tmp_path / "tabular" / name
        folder.mkdir(parents=True)
        for part, seed in (("train", 0), ("test", 1)):
            mixed(300, seed).drop(columns=["when", "weight"]).to_csv(folder / f"{part}.csv.gz", index=False)
        schema = {"name": name, "task": task, "target": target}
        schema["numerical"] = [c for c in ("size", "count") if c != target]
        schema["categorical"] = [c for c in ("kind", "flag", "label") if c != target]
        (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    return tmp_path / "tabular"


class Fake:
    """Counts its calls and stops at one of them."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def __call__(self, train, schema, recipe, seed, n):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((schema.name, recipe, seed))
        make = resample if recipe == "copy" else independent
        return make(train, n, np.random.default_rng(seed)), 64_300 if recipe == "copy" else 12, 50


def test_runs_resumes_and_prints(data, tmp_path):
    out, fake = tmp_path / "rows.json", Fake(stop_at=3)
    what = {"sets": ["tiny", "adult"], "seeds": [0, 1], "recipes": ["copy", "floor"], "data": data, "grid": "fast"}
    console = Console(record=True, width=220, file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        quality(**what, synthesize=fake, out=out, console=console)
    assert len(read_results(out)) == 3
    again = Fake()
    rows = quality(**what, synthesize=again, out=out, console=console)
    assert len(fake.calls) == 3
    assert len(again.calls) == 5
    assert sorted(row.key for row in rows) == sorted(
        (s, r, k, "fast") for s in what["sets"] for r in what["recipes"] for k in what["seeds"]
    )
    copy, floor = ([r for r in rows if r.recipe == k and r.set == "tiny"] for k in ("copy", "floor"))
    assert min(r.trend for r in copy) > max(r.trend for r in floor)
    assert min(r.mle for r in copy) > max(r.mle for r in floor)
    assert [r.copies for r in copy] == [1.0, 1.0]
    text = console.export_text()
    for part in ("98.75±.09", ".915", "anystate copy, honest", "anystate floor, official pick", "64.3K, NFE 50, n=2",
                  "98.73", "not comparable"):  # fmt: skip
        assert part in text


def test_cells_of_the_tables():
    rows = [
        QualityResult("adult", "r", s, "official", 0.9, t, 0.9, 0.91, "AUC", 0, 0, 70_194, 50, 1.0)
        for s, t in enumerate((0.98, 0.99, 0.985))
    ]
    assert _cell(rows, "trend", 100, 2) == "98.50±0.50\n70.2K, NFE 50, n=3"
    assert _cell(rows[:1], "mle", 1, 4) == "0.9000\n70.2K, NFE 50, n=1"
    assert _cell([], "mle", 1, 4) == "–"
    assert len(tables(rows)) == 2


def test_published_numbers_equal_those_of_the_paper():
    """Row by row against tables.md, if that file is present."""
    for kind in ("trend", "mle"):
        assert all(len(row["scores"]) == len(published()["sets"]) for row in published()[kind]["rows"])
    if not TABLES_MD.is_file():
        pytest.skip(f"{TABLES_MD} is not there")
    text = TABLES_MD.read_text()
    trend, rest = text.split("MLE (train XGBoost")
    parts = {"trend": trend, "mle": rest.split("\nNewer than the paper")[0]}
    for kind, part in parts.items():
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        theirs = {c[0]: c[1:] for c in lines if not re.match(r"method|-|\*", c[0])}
        ours = {row["method"]: [row["parameters"], *row["scores"]] for row in published()[kind]["rows"]}
        assert ours == theirs


def test_bad_requests(data, tmp_path):
    out = tmp_path / "rows.json"
    with pytest.raises(ValueError, match=r"set 'news' is not in .*`anystate table fetch news`"):
        quality(["news"], [0], ["copy"], Fake(), data, out)
    with pytest.raises(ValueError, match="neither official nor fast"):
        quality(["tiny"], [0], ["copy"], Fake(), data, out, grid="slow")
    with pytest.raises(ValueError, match="synthetic table lacks column 'kind'"):
        quality(["tiny"], [0], ["copy"], lambda t, *_: (t.drop(columns="kind"), 1, 1), data, out)
    out.write_text(json.dumps([{"speed": 3}]))
    with pytest.raises(ValueError, match="does not hold rows of this benchmark"):
        quality(["tiny"], [0], ["copy"], Fake(), data, out)
