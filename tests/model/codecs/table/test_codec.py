"""Tables to tensors and back: any table round-trips; files are read and completed byte by byte."""

from __future__ import annotations

import datetime
import decimal
import importlib.util
import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from anystate.model.codecs.table.codec import TableCodec
from anystate.model.codecs.table.delimited import fill, parse
from anystate.model.codecs.table.dialect import Dialect
from anystate.model.codecs.table.encoding import EncodingConfig
from anystate.model.codecs.table.files import read_table, write_table
from anystate.model.codecs.table.schema import Schema, infer

R = np.random.default_rng(0)
N = 400


def some(values, share: float = 0.2):
    """The values as objects, with a share of them empty."""
    out = pd.Series(values.tolist(), dtype=object)
    out[R.random(len(out)) < share] = None
    return out


NASTY = {
    "int": pd.Series(R.integers(-5, 5, N)),
    "int8": pd.Series(R.integers(-5, 5, N).astype("int8")),
    "uint": pd.Series(R.integers(0, 3000, N).astype("uint16")),
    "wide int": pd.Series(R.integers(-(10**9), 10**9, N)),
    "Int64 with NA": pd.Series(R.integers(0, 10_000, N)).astype("Int64").mask(pd.Series(R.random(N) < 0.2)),
    "float": pd.Series(R.standard_normal(N)),
    "float32": pd.Series(R.standard_normal(N).astype("float32")),
    "two decimals": pd.Series(np.round(R.standard_normal(N) * 100, 2)),
    "float with NaN": pd.Series(np.where(R.random(N) < 0.3, np.nan, R.standard_normal(N))),
    "whole floats": pd.Series(R.integers(0, 5000, N).astype(float)),
    "infinite": pd.Series(np.where(R.random(N) < 0.1, np.inf, np.where(R.random(N) < 0.1, -np.inf, R.random(N)))),
    "spiky": pd.Series(np.where(R.random(N) < 0.9, 0.0, R.gamma(2.0, 1000.0, N))),
    "heavy tail": pd.Series(np.exp(8 * R.standard_normal(N))),
    "text": pd.Series(R.choice(["a", "B", " b", "", "ü", "猫", "1", "None"], N)),
    "text with None": some(R.choice(["x", "y"], N)),
    "mixed": pd.Series(R.choice(np.array([1, "1", 1.5, True, "x"], dtype=object), N)),
    "bool": pd.Series(R.random(N) < 0.3),
    "boolean": pd.Series(R.random(N) < 0.3).astype("boolean").mask(pd.Series(R.random(N) < 0.2)),
    "yes no": pd.Series(R.choice(["Yes", "No"], N)),
    "category": pd.Series(pd.Categorical(R.choice(["lo", "hi"], N), ["lo", "mid", "hi"], ordered=True)),
    "category with NaN": pd.Series(pd.Categorical(some(R.choice(["lo", "hi"], N)))),
    "string": pd.Series(R.choice(["x", "y"], N), dtype="string"),
    "day": pd.Series(pd.Timestamp("2020-02-28") + pd.to_timedelta(R.integers(0, 900, N), "D")),
    "time": pd.Series(pd.Timestamp("2020-02-28") + pd.to_timedelta(R.integers(0, 10**7, N), "s")),
    "time with NaT": pd.Series(pd.Timestamp("1900-01-01") + pd.to_timedelta(R.integers(0, 10**6, N), "h")).mask(
        pd.Series(R.random(N) < 0.2)
    ),
    "zoned": pd.Series(pd.date_range("2020", periods=N, freq="h", tz="Europe/Berlin")),
    "date text": pd.Series(pd.Timestamp("2020-02-28") + pd.to_timedelta(R.integers(0, 900, N), "D")).dt.strftime(
        "%d.%m.%Y"
    ),
    "dates": pd.Series([datetime.date(2020, 2, 28) + datetime.timedelta(int(d)) for d in R.integers(0, 900, N)]),
    "dates with None": some(np.array([datetime.date(2020, 2, int(d)) for d in R.integers(1, 29, N)])),
    "beyond float64": pd.Series(R.choice([2**63 - 1, 2**63 - 2, -(2**63), 0], N)),
    "uint64": pd.Series(R.choice(np.array([2**64 - 1, 2**64 - 2, 0], dtype="uint64"), N)),
    "arrow text": pd.Series(R.choice(["x", "y"], N), dtype="string[pyarrow]"),
    "constant": pd.Series(["same"] * N),
    "constant number": pd.Series([3.5] * N),
    "all missing": pd.Series([np.nan] * N),
    "all None": pd.Series([None] * N, dtype=object),
}


def codec_of(table: pd.DataFrame, **settings) -> TableCodec:
    return TableCodec.fit(table, infer(table), EncodingConfig(**settings))


def companion(values: pd.Series) -> pd.DataFrame:
    return pd.DataFrame({"it": values, "other": R.choice(["p", "q"], len(values))})


@pytest.mark.parametrize("name", NASTY)
def test_columns_round_trip(name):
    table = companion(NASTY[name])
    codec = codec_of(table)
    codec = TableCodec.from_json(json.loads(json.dumps(codec.to_json())))
    back = codec.decode(*codec.encode(table))
    it, was = back["it"], table["it"]
    assert list(back) == list(table)
    assert it.dtype == was.dtype
    assert it.isna().equals(was.isna())
    known = was.notna()
    if codec.columns["it"].quantiles is None:
        assert all(type(a) is type(b) and a == b for a, b in zip(it[known], was[known], strict=True))
        return
    a, b = (codec.columns["it"].to_numbers(v)[known] for v in (it, was))
    finite = np.isfinite(b)
    assert np.array_equal(a[~finite], b[~finite])
    width = codec.columns["it"].width
    ranks = np.argsort(np.argsort(b[finite]))
    near = np.abs(a[finite] - b[finite]) <= 1.01 * width + 1e-5 * np.abs(b[finite])
    assert near.mean() > 0.95 or np.corrcoef(ranks, np.argsort(np.argsort(a[finite])))[0, 1] > 0.999
    assert a[finite].min() == pytest.approx(b[finite].min(), abs=1e-9)
    assert a[finite].max() == pytest.approx(b[finite].max(), rel=1e-6)


@pytest.mark.parametrize("name", ["wide int", "float", "spiky", "two decimals", "time", "date text"])
def test_any_z_decodes_into_the_range_of_the_data(name):
    table = companion(NASTY[name])
    codec = codec_of(table)
    tokens = torch.from_numpy(np.stack([R.integers(0, k, 500) for k in codec.states], 1))
    back = codec.decode(tokens, torch.randn(500, len(codec.numerical)) * 3)
    column = codec.columns["it"]
    seen, made = column.to_numbers(table["it"]), column.to_numbers(back["it"])
    assert made.min() >= seen.min()
    assert made.max() <= seen.max()
    if column.width:
        assert np.allclose(made, np.round(made / column.width) * column.width)


def test_z_of_a_skewed_column_is_normal():
    table = companion(NASTY["heavy tail"])
    _, z = codec_of(table).encode(table)
    assert abs(z.mean()) < 0.05
    assert abs(z.std() - 1) < 0.05


@pytest.mark.parametrize("tail_rows", [2.0, 6.0])
def test_generated_numbers_reach_both_ends_as_often_as_configured(tail_rows):
    """From standard normal z, in 50 tables; an encoded table is not changed."""
    n = 1000
    table = companion(pd.Series(np.exp(R.standard_normal(n))))
    codec = codec_of(table, tail_rows=tail_rows)
    drawn = codec.columns["it"].quantiles.clip_tails(torch.from_numpy(R.standard_normal((50 * n, 1))))
    back = codec.decode(torch.zeros(50 * n, 1, dtype=torch.int64), drawn)["it"]
    for end in (table["it"].min(), table["it"].max()):
        assert 50 * tail_rows == pytest.approx((back == end).sum(), abs=4 * (50 * tail_rows) ** 0.5)
    encoded = codec.decode(*codec.encode(table))["it"]
    assert (encoded == table["it"].max()).sum() == 1


def test_kinds_are_inferred():
    table = pd.DataFrame({**NASTY, "id": np.arange(N), "key": [f"k{i}" for i in range(N)]})
    kinds = {c.name: c.kind for c in infer(table).columns}
    assert {kinds[c] for c in ("int", "int8", "uint", "wide int", "Int64 with NA", "whole floats")} == {"integer"}
    assert {kinds[c] for c in ("float", "float32", "two decimals", "infinite", "spiky")} == {"continuous"}
    assert {kinds[c] for c in ("text", "mixed", "category", "string")} == {"categorical"}
    assert {kinds[c] for c in ("bool", "boolean", "yes no")} == {"boolean"}
    assert {kinds[c] for c in ("day", "time", "time with NaT", "zoned", "date text")} == {"datetime"}
    assert {kinds[c] for c in ("constant", "constant number", "all missing", "all None")} == {"constant"}
    assert {kinds[c] for c in ("id", "key")} == {"identifier"}


def test_identifiers_continue_without_repetition():
    table = pd.DataFrame({"id": np.arange(N), "key": [f"k{i}" for i in range(N)], "x": NASTY["int"]})
    back = (codec := codec_of(table)).decode(*codec.encode(table))
    assert not set(back["id"]) & set(table["id"])
    assert back["id"].dtype == table["id"].dtype
    assert back["key"].is_unique


def test_schema_round_trip_through_yaml_with_edits(tmp_path):
    table = pd.DataFrame({**NASTY, "id": np.arange(N)})
    schema = infer(table)
    (tmp_path / "s.yaml").write_text(schema.dump(), encoding="utf-8")
    assert Schema.load(tmp_path / "s.yaml") == schema
    column = next(c for c in schema.columns if c.name == "id")
    column.kind = "integer"
    assert "id" in TableCodec.fit(table, schema, EncodingConfig()).numerical


def test_frequent_values_are_split_off():
    codec = codec_of(companion(pd.Series(np.where(R.random(5000) < 0.92, 0, R.integers(1, 10**5, 5000)))))
    assert codec.columns["it"].states == [["regular"], ["v", 0.0]]
    table = companion(pd.Series(R.integers(0, 100, 5000)))
    assert codec_of(table).numerical == []
    assert codec_of(table, max_discrete_values=0).numerical == ["it"]


def test_rare_categories_are_pooled_and_decoded_by_frequency():
    values = pd.Series([f"c{i}" for i in range(1000) for _ in range(1 + (i < 20) * 50)])
    table = companion(values)
    codec = codec_of(table, max_categories=64)
    assert len(codec.columns["it"].states) == 64
    back = codec.decode(*codec.encode(table))
    common = values.isin([f"c{i}" for i in range(20)])
    assert (back["it"][common] == values[common]).all()
    assert set(back["it"]) <= set(values)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "'a' occurs more than once"),
        (pd.DataFrame({"a": []}), "0 rows"),
        (pd.DataFrame({"a": [1, 1, 1]}), "nothing to model"),
        (pd.DataFrame({"a": [1j, 2j]}), "'a' has dtype complex128"),
        (pd.DataFrame({"a": [[1], [2]]}), "'a' holds values of type list"),
        (pd.DataFrame({"a": [f"k{i}" for i in range(30)]}), "nothing to model"),
    ],
)
def test_errors_of_tables_that_cannot_be_modelled(table, message):
    with pytest.raises(ValueError, match=message):
        codec_of(table)


def test_a_schema_that_does_not_fit_names_the_column():
    table = pd.DataFrame({"a": ["x", "y"] * 10, "b": [1, 2] * 10})
    schema = infer(table)
    schema.columns[0].kind = "continuous"
    with pytest.raises(ValueError, match=r"'a'.*not a number"):
        TableCodec.fit(table, schema, EncodingConfig())
    with pytest.raises(ValueError, match="'a' is missing; the table has c, b"):
        codec_of(table).encode(table.rename(columns={"a": "c"}))


LISTS = {"numerical": ["age", "height"], "categorical": ["sex"], "target": "income", "task": "binclass"}


def people(n: int = 100) -> pd.DataFrame:
    r = np.random.default_rng(0)
    return pd.DataFrame(
        {"sex": r.choice(["f", "m"], n), "age": r.integers(18, 60, n), "note": "", "height": r.normal(170, 9, n),
         "income": r.integers(0, 2, n)}
    )  # fmt: skip


def test_a_schema_may_list_numerical_and_categorical_columns():
    """As in schema.yaml of the published data sets: kinds and dtypes come from the table."""
    lists = Schema.load({**LISTS, "columns": ["sex", "age", "height", "income"], "levels": {"sex": ["f", "m"]}})
    assert lists.text_columns == ["sex", "income"]
    assert lists.roles() == (["age", "height"], ["sex"])
    schema = infer(people(), lists)
    assert {c.name: c.kind for c in schema.columns} == {
        "sex": "categorical", "age": "integer", "height": "continuous", "income": "categorical"
    }  # fmt: skip
    assert list(schema.roles()) == list(lists.roles())
    assert list(TableCodec.fit(people(), schema, EncodingConfig()).columns) == ["sex", "age", "height", "income"]
    assert Schema.load(yaml.safe_load(schema.dump())) == schema
    assert infer(people(), Schema(target="income")).columns == infer(people()).columns
    only_kind = infer(people(), Schema(columns=[{"name": "age", "kind": "continuous"}]))
    assert [c.name for c in only_kind.columns] == ["age"]
    assert only_kind.columns[0].dtype == "int64"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("numerical: [age]\nkind: x", "unknown key 'kind'"),
        ("columns: [{name: age, kinds: integer}]", "unknown key 'columns.0.kinds'"),
        ("columns: [{name: age, kind: sort of}]", "columns.0.kind: "),
        ("task: ranking", "task: "),
        ("columns: [{name: age, kind: categorical}]\nnumerical: [age]", "'age' is listed as numerical, but its kind"),
        ("- age", "a schema is a mapping"),
        ("", "a schema is a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_schema_names_file_and_key(tmp_path, content, message):
    file = tmp_path / "schema.yaml"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:
        Schema.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def parsed(*args, **options) -> pd.DataFrame:
    return parse(*args, **options)[0]


def test_missing_cells_of_a_csv():
    """Empty cells, NaN and nan are missing in every column; "NA" and the like only among numbers."""
    table = parsed("x,k,e,f,n\n1,None,,True,NaN\nNA,a,,,\n 2.5,NA,NaN,False,b\n", "t.csv")
    assert table["k"].tolist() == ["None", "a", "NA"]
    assert table["x"].isna().tolist() == [False, True, False]
    assert table["x"].tolist()[2] == 2.5
    assert table["e"].isna().all()
    assert table["e"].dtype == "float64"
    assert table["f"].isna().tolist() == [False, True, False]
    assert table["n"].isna().tolist() == [True, True, False]
    assert parsed("x\n1\n2\n", "t.csv", text_columns=["x"])["x"].tolist() == ["1", "2"]


CSV = 'id,"a, b",c,día,e\r\n007,"x ""y""",1.50,2020-01-31,\r\n008,,,,1\r\n\r\n009,"z\nz",-2,2020-02-29,3'


def test_csv_keeps_spellings_and_fills_only_empty_cells():
    table = parsed(CSV.replace("\r\n\r\n", "\r\n"), "t.csv")
    assert table["id"].tolist() == ["007", "008", "009"]
    assert table["a, b"].tolist()[::2] == ['x "y"', "z\nz"]
    assert table["a, b"].isna().tolist() == [False, True, False]
    assert table["c"].dtype == "float64"
    assert table["e"].dtype == "Int64"
    filled = table.copy()
    filled.loc[1, ["a, b", "c", "día"]] = ['q,"', 7.25, "2020-03-01"]
    filled["e"] = pd.array([5, 1, 3], dtype="Int64")
    out = fill(CSV, table, filled, Dialect())
    assert out == CSV.replace("-31,\r\n", "-31,5\r\n").replace("008,,,,1", '008,"q,""",7.25,2020-03-01,1')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", "row 2 has 1 fields, the header 2"),
        ("a,a\n1,2\n", "'a' occurs more than once"),
        ("a;b,c\n1;2,3\n", "could be separated by commas or semicolons; give --sep"),
        ("a,b\n", "no rows below its header a, b"),
        ('a,b\n1,"x"y\n', "malformed CSV"),
        ('a,b\n1,"2\n', "malformed CSV"),
        ("", "is empty"),
    ],
)
def test_errors_of_malformed_csv_name_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        parsed(text, "t.csv")


def test_old_line_ends_and_long_cells_are_read():
    assert parsed("a,b\r1,2\r3,4\r", "t.csv").to_numpy().tolist() == [[1, 2], [3, 4]]
    assert len(parsed(f"a,b\n{'x' * 200_000},1\n", "t.csv")["a"][0]) == 200_000


def test_errors_of_parquet_files(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    mixed = pd.DataFrame({"a": [1.5, "x"] * 9})
    with pytest.raises(ValueError, match="column 'a' mixes float and str, which Parquet cannot hold"):
        write_table(mixed, tmp_path / "mixed.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_table(tmp_path / "bad.parquet")
    exact = pd.DataFrame({"a": [decimal.Decimal("1.25"), None, decimal.Decimal("3.50")]})
    exact.to_parquet(tmp_path / "exact.parquet")
    assert read_table(tmp_path / "exact.parquet")["a"].tolist()[::2] == [1.25, 3.5]


def test_files_round_trip(tmp_path):
    table = parsed("a,b,c\n1,x,0.5\n2,,1.25\n", "t.csv")
    parquet = ["t.parquet"] if importlib.util.find_spec("pyarrow") else []
    for name in ("t.csv", "t.csv.gz", *parquet):
        write_table(table, tmp_path / name)
        pd.testing.assert_frame_equal(read_table(tmp_path / name), table)
    with pytest.raises(ValueError, match="not found"):
        read_table(tmp_path / "gone.csv")
