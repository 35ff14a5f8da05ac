"""`anystate table` from the command line: files in, files out; wrong input is one line and exit code 2."""

from __future__ import annotations

import csv
import gzip

import pandas as pd
import pytest

from anystate.train.data.bundled import load_bundled

TINY = [
    "network.width=16",
    "network.depth=1",
    "network.heads=2",
    "train.batch=64",
    "train.steps=20",
    "sample.steps=16",
    "sample.batch_size=64",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("table") / "adult.csv"
    load_bundled()[0].head(500).to_csv(file, index=False)
    return file


@pytest.fixture(scope="module")
def run(data, call):
    out = data.parent / "run"
    assert call("table", "fit", data, *TINY, "--out", out, "--device", "cpu", "--missing", "?") == 0
    return out


def test_sampling_under_conditions(run, tmp_path, call):
    out = tmp_path / "new" / "rows.csv.gz"
    where = ["--where", "education=Masters", "age=30..40", "--balance", "income"]
    assert call("table", "sample", run, "-n", "20", *where, "--out", out, "--device", "cpu") == 0
    with gzip.open(out, "rt") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert {row["education"] for row in rows} == {"Masters"}
    assert all(30 <= int(row["age"]) <= 40 for row in rows)
    assert sum(row["income"] == ">50K" for row in rows) == 10
    assert set(load_bundled()[0]) == set(rows[0])


def with_holes(data) -> str:
    lines = data.read_text().split("\n")
    for i in range(1, 60):
        cells = lines[i].split(",")
        cells[i % 15] = "?"
        lines[i] = ",".join(cells)
    return "\r\n".join(lines)


def test_imputing_changes_only_empty_cells(run, data, tmp_path, call):
    file, out = tmp_path / "holes.csv", tmp_path / "filled.csv"
    file.write_bytes(with_holes(data).encode())
    assert call("table", "impute", run, file, "--out", out, "--device", "cpu") == 0
    before, after = file.read_bytes().decode().split("\r\n"), out.read_bytes().decode().split("\r\n")
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old.split(","), new.split(","), strict=True):
            assert b != "?"
            assert a in ("?", b)
    assert call("table", "impute", run, file, "--out", out, "--draws", "2", "--device", "cpu") == 0
    assert (tmp_path / "filled.1.csv").read_bytes() == out.read_bytes()
    spread = tmp_path / "spread.csv"
    options = ["--expected", "--draws", "2", "--spread", spread]
    assert call("table", "impute", run, file, "--out", out, *options, "--device", "cpu") == 0
    assert pd.read_csv(spread).shape == (500, 15)


def test_imputing_parquet_files(tmp_path, call):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    table = load_bundled()[0].head(300).assign(day=pd.to_datetime("2024-01-01") + pd.to_timedelta(range(300), "h"))
    table["age"] = table["age"].astype("int16")
    table["sex"] = table["sex"].astype("category")
    table.to_parquet(tmp_path / "in.parquet")
    assert call("table", "fit", tmp_path / "in.parquet", *TINY, "--out", tmp_path / "run", "--device", "cpu") == 0
    out = tmp_path / "rows.parquet"
    assert call("table", "sample", tmp_path / "run", "-n", "30", "--out", out, "--device", "cpu") == 0
    made = pd.read_parquet(out)
    assert (made.dtypes == pd.read_parquet(tmp_path / "in.parquet").dtypes).all()
    holes = table.head(20).assign(education=None)
    holes.to_parquet(tmp_path / "holes.parquet")
    filled = tmp_path / "filled.parquet"
    assert (
        call("table", "impute", tmp_path / "run", tmp_path / "holes.parquet", "--out", filled, "--device", "cpu") == 0
    )
    done = pd.read_parquet(filled)
    assert done["education"].isin(table["education"]).all()
    pd.testing.assert_frame_equal(done.drop(columns="education"), holes.drop(columns="education"))


def test_schema_is_shown_edited_and_used(data, run, tmp_path, capsys, call, refused):
    file = tmp_path / "schema.yaml"
    assert call("table", "schema", data, "--out", file) == 0
    edited = "- name: education.num\n  kind: categorical"
    file.write_text(file.read_text().replace("- name: education.num\n  kind: integer", edited))
    capsys.readouterr()
    assert call("table", "fit", data, "--schema", file, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert edited in shown
    assert "prediction_type: v_prediction" in shown
    file.write_text(file.read_text().replace("kind: categorical", "kind: sort of", 1))
    assert "columns.1.kind" in refused("table", "fit", data, "--schema", file)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["sample", "RUN", "--where", "schol=x"], ["unknown column 'schol'", "education"]),
        (["sample", "RUN", "--where", "education=Kindergarten"], ["has no value 'Kindergarten'", "Bachelors"]),
        (["sample", "RUN", "--where", "age=200..300"], ["'age' has no value in 200..300"]),
        (["sample", "RUN", "--where", "age"], ["--where 'age'"]),
        (["sample", "RUN", "--balance", "fnlwgt"], ["'fnlwgt'", "cannot be balanced"]),
        (["sample", "RUN", "-n", "0"], ["'-n' / '--n'"]),
        (["impute", "RUN", "BAD"], ["row 1 has 1 fields, the header 2"]),
        (["impute", "RUN", "OTHER"], ["column 'age' is missing"]),
        (["fit", "BAD"], ["row 1 has 1 fields, the header 2"]),
    ],
)
def test_wrong_input_is_one_line(run, tmp_path, args, parts, refused):
    (tmp_path / "bad.csv").write_text("a,b\n1\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    paths = {"RUN": run, "BAD": tmp_path / "bad.csv", "OTHER": tmp_path / "other.csv"}
    error = refused("table", *[paths.get(a, a) for a in args])
    assert all(part in error for part in parts), error
