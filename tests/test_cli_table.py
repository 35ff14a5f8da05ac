"""`anystate table` from the command line: files in, files out; wrong input is one line and exit code 2."""

from __future__ import annotations

import csv
import gzip
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from anystate.model.codecs.table.column import MISSING
from anystate.model.codecs.table.schema import infer
from anystate.train.data.bundled import load_bundled
from anystate.train.synthesizer import TableSynthesizer
from anystate.train.trainer import Trainer

OLD = Path(__file__).parent / "old_runs"

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
        (["impute", "RUN", "OTHER"], ["none of the model's columns, which are age"]),
        (["fit", "BAD"], ["row 1 has 1 fields, the header 2"]),
        (["fit", "FOLDER"], ["is a folder: name a table file in it"]),
        (["schema", "OTHER", "--sep", "ab"], ["--sep 'ab': give one character, or tab"]),
    ],
)
def test_wrong_input_is_one_line(run, tmp_path, args, parts, refused):
    (tmp_path / "bad.csv").write_text("a,b\n1\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    paths = {"RUN": run, "BAD": tmp_path / "bad.csv", "OTHER": tmp_path / "other.csv", "FOLDER": tmp_path}
    error = refused("table", *[paths.get(a, a) for a in args])
    assert all(part in error for part in parts), error


@pytest.mark.parametrize("setting", [["--missing", "?"], ['modalities.row.missing=["?"]'], ['missing=["?", "NA"]']])
def test_strings_that_mean_a_missing_cell(setting, tmp_path, call):
    """By option, or by a setting under its name of today or an earlier one; the first one is written."""
    rows = pd.DataFrame({"a": ["x", "y", "?", "x"] * 50, "b": range(200)})
    rows.to_csv(tmp_path / "t.csv", index=False)
    run, out = tmp_path / "run", tmp_path / "rows.csv"
    assert call("table", "fit", tmp_path / "t.csv", *TINY, *setting, "--out", run, "--device", "cpu") == 0
    column = TableSynthesizer.load(run, device="cpu").columns_.columns["a"]
    assert column.state(MISSING) >= 0
    assert len(column.states) == 3
    assert call("table", "sample", run, "-n", "30", "a=", "--out", out, "--device", "cpu") == 0
    assert set(pd.read_csv(out, na_filter=False)["a"]) == {"?"}


@pytest.fixture(scope="module")
def german(tmp_path_factory, call):
    """(file with semicolons, decimal commas and umlauts of cp1252, run of it)."""
    folder = tmp_path_factory.mktemp("german")
    rows = [f"{'Köln' if i % 3 else 'Ulm'};{i % 7},{i % 10}5;{i % 5}" for i in range(300)]
    (folder / "in.csv").write_bytes(("Größe;Preis;n\n" + "\n".join(rows) + "\n").encode("cp1252"))
    options = [*TINY, "--missing", "k.A.", "--out", folder / "run", "--device", "cpu"]
    assert call("table", "fit", folder / "in.csv", *options) == 0
    return folder / "in.csv", folder / "run"


def test_rows_are_written_in_the_dialect_of_the_training_file(german, tmp_path, call):
    """A .csv as the training file is written, other formats as they always are."""
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    _, run = german
    for ending in ("csv", "tsv", "parquet"):
        out = tmp_path / f"rows.{ending}"
        assert call("table", "sample", run, "-n", "40", "--where", "Größe=Köln", "--out", out, "--device", "cpu") == 0
    lines = (tmp_path / "rows.csv").read_bytes().decode("cp1252").split("\n")
    assert lines[0] == "Größe;Preis;n"
    assert all(re.fullmatch(r"Köln;\d,\d{1,2};\d", line) for line in lines[1:-1])
    assert (tmp_path / "rows.tsv").read_text(encoding="utf-8").startswith("Größe\tPreis\tn\nKöln\t")
    made = pd.read_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(made, pd.read_csv(tmp_path / "rows.csv", sep=";", decimal=",", encoding="cp1252"))


def test_imputing_keeps_the_dialect_of_the_file(german, tmp_path, call, capsys):
    """That of the training file only where the file itself leaves it open; every other byte stays."""
    _, run = german
    for encoding, text in (
        ("cp1252", "Größe;Preis;n\r\nKöln;;1\r\nk.A.;1,25;2\r\n"),
        ("utf-8-sig", "Größe\tPreis\tn\nKöln\t\t1\nk.A.\t1.25\t2\n"),
        ("utf-8", "Größe;Preis;n\nKöln;;1\nk.A.;1,255;2\n"),
        ("utf-8", "Größe;Preis;n\nKöln;;1\nk.A.;;2\n"),
    ):
        (tmp_path / "holes.csv").write_bytes(text.encode(encoding))
        out = tmp_path / ("filled.tsv" if "\t" in text else "filled.csv")
        assert call("table", "impute", run, tmp_path / "holes.csv", "--out", out, "--device", "cpu") == 0
        gaps = re.escape(text).replace("k\\.A\\.", "(?:Köln|Ulm)")
        sep, mark = ("\t", ".") if "\t" in text else (";", ",")
        gaps = gaps.replace(re.escape(sep) * 2, rf"{sep}\d[{mark}]\d+{sep}")
        assert re.fullmatch(gaps, out.read_bytes().decode(encoding))


@pytest.mark.parametrize("command", ["sample", "impute"])
def test_a_name_of_no_format_is_refused_before_sampling(german, tmp_path, command, refused, monkeypatch):
    file, run = german
    monkeypatch.setattr(TableSynthesizer, "load", lambda *_: pytest.fail("the model was loaded"))
    rest = [file] if command == "impute" else []
    line = refused("table", command, run, *rest, "--out", tmp_path / "rows.doc", "--device", "cpu")
    assert "rows.doc: the name says no format that can be written; end it with .csv, .tsv, .parquet" in line


def test_metadata_of_sdv(data, tmp_path, call):
    """Written by `schema`, and read by `fit`, which gives the same kinds as the inferred ones."""
    file = tmp_path / "metadata.json"
    assert call("table", "schema", data, "--out", file) == 0
    assert '"METADATA_SPEC_VERSION": "SINGLE_TABLE_V1"' in file.read_text()
    options = [*TINY, "train.steps=1", "--out", tmp_path / "run", "--device", "cpu"]
    assert call("table", "fit", data, "--schema", file, *options) == 0
    kinds = [c.kind for c in TableSynthesizer.load(tmp_path / "run", device="cpu").schema_.columns]
    assert kinds == [c.kind for c in infer(pd.read_csv(data)).columns]


def test_a_schema_is_in_the_checkpoint(data, tmp_path, call):
    """Columns that the schema does not name are left out."""
    file, run, out = tmp_path / "schema.yaml", tmp_path / "run", tmp_path / "rows.csv"
    file.write_text("columns: [{name: education.num, kind: categorical}, {name: sex}, {name: age}]\n")
    options = ["--schema", file, "--out", run, "--device", "cpu"]
    assert call("table", "fit", data, *TINY, *options) == 0
    assert call("table", "fit", data, *TINY, *options) == 0  # resumes
    assert call("table", "sample", run, "-n", "20", "education.num=13", "--out", out, "--device", "cpu") == 0
    made = pd.read_csv(out)
    assert list(made) == ["education.num", "sex", "age"]
    assert set(made["education.num"]) == {13}
    assert TableSynthesizer.load(run, device="cpu").columns_.columns["education.num"].column.kind == "categorical"


def test_a_run_of_an_earlier_version(tmp_path, call):
    """Its codec lies in codec.json, its config has old names."""
    run, out, filled = tmp_path / "run", tmp_path / "rows.csv", tmp_path / "filled.csv"
    shutil.copytree(OLD / "table", run)
    assert call("table", "sample", run, "-n", "20", "education=Masters", "--out", out, "--device", "cpu") == 0
    made = pd.read_csv(out)
    assert set(made["education"]) == {"Masters"}
    assert call("table", "impute", run, OLD / "table_holes.csv", "--out", filled, "--device", "cpu") == 0
    holes, done = pd.read_csv(OLD / "table_holes.csv"), pd.read_csv(filled)
    assert holes.isna().any(axis=None)
    assert not done.isna().any(axis=None)
    assert (done.where(holes.notna()).fillna(0) == holes.fillna(0)).all(axis=None)


def test_a_report_of_sampled_rows(run, data, tmp_path, call, capsys):
    rows, page = tmp_path / "rows.csv", tmp_path / "report.html"
    assert call("table", "sample", run, "-n", "100", "--out", rows, "--device", "cpu") == 0
    capsys.readouterr()
    assert call("table", "report", data, rows, "--out", page) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^shape +0\.\d+", shown, re.MULTILINE)
    assert "<html" in page.read_text()[:200]


def test_configs_and_runs_of_other_modalities_are_refused(data, tmp_path, tiny, refused):
    line = refused("table", "fit", data, "--config", "digits", "--out", tmp_path / "run")
    assert "config digits has the modalities image, text: a table needs one of columns and no other" in line
    Trainer(tiny("train.steps=1"), tmp_path / "digits", "cpu", quiet=True).run()
    line = refused("table", "sample", tmp_path / "digits", "--device", "cpu")
    assert "not one of a table alone, it has image, text: use anystate sample" in line


def test_what_was_assumed_is_printed_with_kind_and_reason(tmp_path, capsys, call):
    """Warnings on stderr; the YAML on stdout stays one that fit takes, with the kinds as comments."""
    file, schema = tmp_path / "t.csv", tmp_path / "schema.yaml"
    file.write_text("price,day\n" + "".join(f"${i}.50,0{i % 9 + 1}/02/2020\n" for i in range(30)))
    capsys.readouterr()
    assert call("table", "schema", file) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: column 'day': no cell tells DD/MM/YYYY from MM/DD/YYYY")
    assert shown.out.startswith("#   price: continuous, 2 decimals, multiples of 1 plus 0.5")
    assert "(numbers written like '$0.50')" in shown.out
    schema.write_text(shown.out.replace("'%d/%m/%Y'", "'%m/%d/%Y'"))
    assert call("table", "fit", file, "--schema", schema, "--dry-run") == 0
    assert "%m/%d/%Y" in capsys.readouterr().out
