"""Imputation of tables unlike the training table: columns and rows without cells, new values, other dtypes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from anystate import TableSynthesizer
from anystate.model.codecs.table.column import ColumnCodec
from anystate.model.codecs.table.encoding import EncodingConfig
from anystate.model.codecs.table.rows import as_in_training
from anystate.model.codecs.table.schema import Column
from anystate.sample.table.incomplete import fill_cells

N = 400


def people(n: int = N, seed: int = 0) -> pd.DataFrame:
    """A table without empty cells, but for `note`, which has nothing else."""
    r = np.random.default_rng(seed)
    group = r.choice(["north", "south", "east"], n)
    return pd.DataFrame(
        {
            "key": [f"k{i:04d}" for i in range(n)],
            "age": r.integers(18, 90, n),
            "height": (150 + 20 * (group == "north") + r.normal(0, 3, n)).round(1),
            "member": r.random(n) < 0.5,
            "joined": pd.Timestamp("2020-01-01") + pd.to_timedelta(r.integers(0, 900, n), "D"),
            "group": group,
            "land": "x",
            "note": None,
        }
    )


@pytest.fixture(scope="module")
def model():
    small = ["network.width=16", "network.depth=1", "network.heads=2", "train.batch=128", "train.steps=250"]
    small += ["train.lr=1e-2", "sample.steps=6", "compile=never", "train.log_every=250"]
    return TableSynthesizer(overrides=small, device="cpu").fit(people())


MODELLED = ["age", "height", "member", "joined", "group"]


@pytest.mark.parametrize("how", ["draw", "expected"])
@pytest.mark.parametrize("name", MODELLED)
@pytest.mark.parametrize("rows", [1, 7])
def test_a_column_that_is_empty_or_absent(model, how, name, rows, caplog):
    """It is filled with values of training, in its dtype of training, and nothing else changes."""
    table = people(rows, seed=1)
    table.index = [f"r{i}" for i in range(rows)]
    for holes in (table.assign(**{name: None}), table.assign(**{name: np.nan}), table.drop(columns=name)):
        caplog.clear()
        filled = model.impute(holes, how, draws=2 if how == "expected" else None)
        filled = filled[0] if how == "expected" else filled
        assert filled[name].notna().all()
        assert filled[name].dtype == people()[name].dtype
        assert filled[name].between(people()[name].min(), people()[name].max()).all()
        rest = [column for column in table if column != name]
        pd.testing.assert_frame_equal(filled[rest], table[rest])
        absent = f"column '{name}' is not in the table: it is filled in all rows"
        assert caplog.messages == ([] if name in holes else [absent])


def test_rows_without_any_cell(model):
    empty = pd.DataFrame(index=range(30), columns=people().columns)
    filled = model.impute(empty)
    assert filled.drop(columns="note").notna().all(axis=None)
    assert filled["note"].isna().all()
    assert filled["key"].is_unique
    assert not set(filled["key"]) & set(people()["key"])
    assert (filled["land"] == "x").all()
    tall = (
        filled.loc[filled["group"] == "north", "height"].mean()
        - filled.loc[filled["group"] != "north", "height"].mean()
    )
    assert tall > 10  # 20 in truth, with a standard error of 1.3 at most


def test_values_that_training_did_not_have_stay_and_are_unknown(model, caplog):
    table = people(60, seed=2)
    table["height"] = table["height"].astype(object)
    table.loc[[3, 5], "group"] = "nort"
    table.loc[8, "height"] = "tall"
    table.loc[[3, 5, 8, 20], "age"] = np.nan
    filled = model.impute(table)
    known = table["age"].notna()
    rest = [name for name in table if name != "age"]
    pd.testing.assert_frame_equal(filled[rest], table[rest])
    assert (filled["age"][known] == table["age"][known]).all()
    assert filled["age"].between(18, 90).all()
    stay = "they stay as they are and count as unknown"
    assert caplog.messages == [
        f"column 'height': cells that cannot be read as numbers or dates: 1, the first is 'tall'; {stay}",
        f"column 'group': cells that training did not have: 2, the first is 'nort' (near it: north); {stay}",
    ]
    unknown = table.assign(group=table["group"].replace("nort", None), height=table["height"].replace("tall", None))
    pd.testing.assert_series_equal(filled["age"], model.impute(unknown)["age"])  # the same as empty cells


def test_an_unknown_cell_is_not_taken_for_another_category(model):
    """Heights of rows with a new group are those of all groups together, not of one."""
    table = people(300, seed=3).assign(group="west", height=np.nan)
    heights = model.impute(table[["group", "height"]])["height"]
    tall = (heights > 160).mean()
    assert abs(tall - 1 / 3) < 0.13  # 4.8 standard errors of 300 draws


def test_numbers_outside_the_training_range_stay(model, caplog):
    table = people(20, seed=4).assign(age=np.arange(20) * 1000 - 5000, joined=pd.Timestamp("1931-05-05"), height=np.nan)
    filled = model.impute(table)
    pd.testing.assert_frame_equal(filled.drop(columns="height"), table.drop(columns="height"))
    assert filled["height"].between(130, 190).all()
    assert not caplog.messages


@pytest.mark.parametrize("dtype", ["str", "object", "Int64", "float32", "Int16", "float64"])
def test_integers_of_another_dtype(model, dtype):
    """Cells are read whatever their dtype is, and the column keeps it."""
    ages = people(40, seed=5)["age"]
    column = ages.map(str).astype(dtype) if dtype in ("str", "object") else ages.astype(dtype)
    table = people(40, seed=5).assign(age=column)
    table.loc[::4, "age"] = None
    filled = model.impute(table)["age"]
    assert filled.dtype == table["age"].dtype
    assert filled.notna().all()
    assert pd.to_numeric(filled).between(18, 90).all()
    kept = table["age"].notna()
    assert (filled[kept] == table["age"][kept]).all()
    plain = people(40, seed=5).astype({"age": "Int64"})
    plain.loc[::4, "age"] = pd.NA
    assert pd.to_numeric(filled).astype("int64").tolist() == model.impute(plain)["age"].astype("int64").tolist()


def test_booleans_and_categories_of_other_dtypes(model):
    table = people(40, seed=6)
    table = table.assign(
        member=table["member"].astype("boolean").mask(table.index % 3 == 0),
        group=table["group"].mask(table.index % 4 == 0).astype("category"),
    )
    filled = model.impute(table)
    assert filled["member"].dtype == "boolean"
    assert isinstance(filled["group"].dtype, pd.CategoricalDtype)
    assert filled[["member", "group"]].notna().all(axis=None)
    north = table[table["group"] != "south"].assign(group=lambda t: t["group"].cat.remove_categories("south"))
    assert model.impute(north.assign(height=np.nan))["height"].notna().all()


def test_a_dtype_that_cannot_hold_the_values_becomes_one_that_can():
    small = pd.Series([1, None, 3], dtype="UInt8")
    assert fill_cells(small, pd.Series([7], index=[1])).tolist() == [1, 7, 3]
    assert fill_cells(small, pd.Series([7], index=[1])).dtype == "UInt8"
    assert fill_cells(small, pd.Series([-7], index=[1])).tolist() == [1, -7, 3]
    assert fill_cells(small, pd.Series([0.5], index=[1])).tolist() == [1, 0.5, 3]
    days = pd.Series(pd.to_datetime(["2020-01-01", None])).astype("datetime64[s]")
    moment = pd.Series([pd.Timestamp("2021-01-01 00:00:00.25")], index=[1])
    assert fill_cells(days, moment)[1] == moment[1]
    colours = pd.Series(["red", None], dtype="category")
    assert fill_cells(colours, pd.Series(["blue"], index=[1])).tolist() == ["red", "blue"]


def test_moments_of_another_time_zone_are_the_same_moments():
    moment = pd.Series([pd.Timestamp("2021-06-01 12:00", tz="Europe/Berlin")], index=[1])
    for zone, text in (("US/Eastern", "2021-06-01 06:00:00-04:00"), (None, "2021-06-01 10:00:00")):
        values = pd.Series([pd.Timestamp("2020-01-01", tz=zone), pd.NaT])
        filled = fill_cells(values, moment)
        assert str(filled[1]) == text
        assert filled.dtype == values.dtype


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ([1, 2, 3], [1.0, "2", np.int8(3)]),
        ([True, False], ["True", "false", 1.0, 0, np.bool_(False)]),
        (["1", "2"], [1, 2.0, "2"]),
    ],
)
def test_cells_of_another_type_are_the_same_categories(values, given):
    column = ColumnCodec.fit(
        Column(name="c", kind="categorical", dtype="object"),
        pd.Series(values, dtype=object),
        EncodingConfig(),
        np.random.default_rng(0),
    )
    read = as_in_training(column, pd.Series([*given, None, np.nan], dtype=object))
    tokens, _ = column.encode(read, np.random.default_rng(0))
    tags = [column.states[t][1].split(":")[1].lower() for t in tokens[: len(given)]]
    truth = {"true": "true", "1.0": "1", "1": "1", "2.0": "2", "0": "0"}
    same = [truth.get(str(g).lower(), str(g).lower()) for g in given]
    if isinstance(values[0], bool):
        same = [{"1": "true", "0": "false"}.get(g, g) for g in same]
    assert tags == same
    assert (tokens[len(given) :] == -1).all()
    with pytest.raises(ValueError, match="has no value"):
        as_in_training(column, pd.Series([[1, 2]], dtype=object))


def test_other_columns_stay_and_the_order_does_not_matter(model, caplog):
    table = people(30, seed=7)
    table.loc[::2, ["age", "group"]] = None
    shuffled = table[["note", "group", "age", "height", "member", "land", "joined", "key"]]
    other = shuffled.assign(Age2=range(30), remark="free text").drop(columns="note")
    filled = model.impute(other)
    assert list(filled) == [*other, "note"]
    pd.testing.assert_frame_equal(filled[["Age2", "remark"]], other[["Age2", "remark"]])
    pd.testing.assert_frame_equal(filled[["age", "group"]], model.impute(table)[["age", "group"]])
    with pytest.raises(ValueError, match="none of the model's columns, which are key, age"):
        model.impute(pd.DataFrame({"x": [1]}))
    caplog.clear()
    model.impute(other.rename(columns={"joined": "Joined"}))
    assert "'joined' is not in the table: it is filled in all rows; if 'Joined' is meant, rename it" in caplog.text


def test_files(model, tmp_path, call, capsys):
    """Only empty cells change: keys, new values, other columns, quotes and line ends stay byte for byte."""
    model.save(tmp_path / "run")
    lines = [
        "key,age,extra,group,note,height,land",
        'k7,,"a, b",north,,171.0,x',
        ",44,,west,,,x",
        'new-1,031, c,south,,"150.5",x',
    ]
    (tmp_path / "in.csv").write_bytes("\r\n".join(lines).encode())
    assert (
        call("table", "impute", tmp_path / "run", tmp_path / "in.csv", "--out", tmp_path / "out.csv", "--device", "cpu")
        == 0
    )
    after = (tmp_path / "out.csv").read_bytes().decode().split("\r\n")
    assert after[0] == lines[0] + ",member,joined"
    assert after[1].startswith("k7,")
    assert after[1].count('"a, b",north,,171.0,x,') == 1
    assert after[2].split(",")[1:5] == ["44", "", "west", ""]
    assert after[2].split(",")[0] not in ("", "k7", "new-1")
    assert after[3].startswith(lines[3] + ",")
    said = capsys.readouterr().out
    assert "filled 9 cells, left empty: 3 of column 'note', which had no value in training; " in said.replace("\n", " ")
    assert "1 of column 'extra', which the model does not have" in said.replace("\n", " ")
