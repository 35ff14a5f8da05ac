"""Conditions of `TableSynthesizer.sample` in every form, on one small model; the truth is a filter of the made rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from anystate.cli import main
from anystate.train.synthesizer import TableSynthesizer

SETTINGS = [
    "network.width=16", "network.depth=1", "network.heads=2", "train.batch=64", "train.steps=150",
    "train.warmup_steps=2", "train.lr=1e-2", "sample.steps=6",
]  # fmt: skip


def table(n: int = 500) -> pd.DataFrame:
    r = np.random.default_rng(0)
    group = r.choice(["north", "south", "north-west", ">50K"], n, p=[0.4, 0.3, 0.2, 0.1])
    size = np.round(r.normal(size=n) * 20 + 100 * (group == "south"), 2)
    return pd.DataFrame(
        {
            "group": group,
            "size": np.where(r.random(n) < 0.2, np.nan, size),
            "count": r.integers(0, 1000, n) * 5,
            "rank": r.integers(1, 6, n),
            "day": pd.Timestamp("2020-01-01") + pd.to_timedelta(r.integers(0, 900, n), unit="D"),
            "ok": r.choice(["yes", "no"], n),
            "note": pd.Series(np.where(r.random(n) < 0.5, None, "x"), dtype=object),
        }
    )


@pytest.fixture(scope="module")
def model() -> TableSynthesizer:
    return TableSynthesizer(overrides=SETTINGS, device="cpu").fit(table())


DAY = pd.Timestamp("2021-01-01")
CASES = [
    ({"group": "south"}, lambda t: t["group"] == "south"),
    ({"group": ["south", "north"]}, lambda t: t["group"].isin(["south", "north"])),
    ({"group": {"south", "north"}}, lambda t: t["group"].isin(["south", "north"])),
    ({"group": ("south", "north")}, lambda t: t["group"].isin(["south", "north"])),
    ({"group": np.array(["south", "north"])}, lambda t: t["group"].isin(["south", "north"])),
    ({"group": "!=north"}, lambda t: t["group"] != "north"),
    ({"group": "!=north, !=south"}, lambda t: ~t["group"].isin(["north", "south"])),
    ({"group": "not in {north, south}"}, lambda t: ~t["group"].isin(["north", "south"])),
    ({"group": ">50K"}, lambda t: t["group"] == ">50K"),
    ({"size": ">30"}, lambda t: t["size"] > 30),
    ({"size": ">=-5.5 and <20"}, lambda t: (t["size"] >= -5.5) & (t["size"] < 20)),
    ({"size": "not null"}, lambda t: t["size"].notna()),
    ({"size": None}, lambda t: t["size"].isna()),
    ({"size": [None, (0, 10)]}, lambda t: t["size"].isna() | t["size"].between(0, 10)),
    ({"size": pd.Interval(0, 10, closed="left")}, lambda t: (t["size"] >= 0) & (t["size"] < 10)),
    ({"note": "not null"}, lambda t: t["note"].notna()),
    ({"count": [(0, 500), (4000, None)]}, lambda t: (t["count"] <= 500) | (t["count"] >= 4000)),
    ({"count": "!=0"}, lambda t: t["count"] != 0),
    ({"rank": [1, 5]}, lambda t: t["rank"].isin([1, 5])),
    ({"rank": "in {2, 3}"}, lambda t: t["rank"].isin([2, 3])),
    ({"rank": range(2, 4)}, lambda t: t["rank"].isin([2, 3])),
    ({"rank": ">=4", "group": "south"}, lambda t: (t["rank"] >= 4) & (t["group"] == "south")),
    ({"day": ">2021-01-01"}, lambda t: t["day"] > DAY),
    ({"day": (DAY, "2021-02-01")}, lambda t: t["day"].between(DAY, pd.Timestamp("2021-02-01"))),
    ({"ok": True}, lambda t: t["ok"] == "yes"),
    ({"ok": "yes"}, lambda t: t["ok"] == "yes"),
]


@pytest.mark.parametrize(("where", "holds"), CASES)
def test_all_rows_satisfy_their_condition(model, where, holds):
    made = model.sample(24, where)
    assert holds(made).all()
    assert (made.dtypes == table().dtypes).all()


def test_the_texts_of_a_command_line_mean_the_same(model):
    from anystate.sample.table.where import parse_where

    texts = ["group in {south, north}", "size>=0", "size<50", "rank!=3", "day=2020-01-01..2021-01-01", "note not null"]
    where = parse_where(model.columns_, [*texts, "ok=yes"])
    made = model.sample(20, where)
    assert (made["group"].isin(["south", "north"]) & (made["size"] >= 0) & (made["size"] < 50)).all()
    assert ((made["rank"] != 3) & (made["day"] <= DAY) & made["note"].notna() & (made["ok"] == "yes")).all()
    assert parse_where(model.columns_, ["group=>50K", "size="]) == {"group": ">50K", "size": ""}
    with pytest.raises(ValueError, match="'rank' has no value in"):
        model.sample(3, parse_where(model.columns_, ["rank=3", "rank=4"]))


def test_a_table_of_conditions_gives_a_row_each(model):
    given = pd.DataFrame({"group": ["north", "south", None], "rank": [np.nan, 2, 5], "size": ["0..10", None, ">20"]})
    made = model.sample(where=given)
    assert len(made) == 3
    assert made["group"].tolist()[:2] == ["north", "south"]
    assert made["rank"].tolist()[1:] == [2, 5]
    assert 0 <= made["size"][0] <= 10 < 20 < made["size"][2]
    assert model.sample(9, given.to_dict("records"))["group"].tolist()[::3] == ["north"] * 3
    with pytest.raises(ValueError, match="n = 4 is not a multiple of the 3 rows"):
        model.sample(4, given)


def test_conditions_from_a_file(model, tmp_path):
    (tmp_path / "given.csv").write_text("group,count\nsouth,\n,100..200\nnorth,5\n")
    run, out = model.save(tmp_path / "run"), tmp_path / "made.csv"
    command = ["table", "sample", str(run), "--conditions", str(tmp_path / "given.csv"), "--out", str(out)]
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--device", "cpu"])
    made = pd.read_csv(out)
    assert len(made) == 3
    assert (made["group"][0], made["group"][2], made["count"][2]) == ("south", "north", 5)
    assert 100 <= made["count"][1] <= 200


def test_several_columns_are_balanced_together(model):
    counts = model.sample(200, balance=["rank", "ok"]).value_counts(["rank", "ok"])
    assert len(counts) == 10
    assert (counts == 20).all()


@pytest.mark.parametrize("seed", [3, np.int64(3), 3.0])
def test_whole_numbers_of_any_type(model, seed):
    pd.testing.assert_frame_equal(model.sample(1e1, seed=seed), model.sample(np.int64(10), seed=3))
    with pytest.raises(ValueError, match=r"n must be a whole number, got 2\.5"):
        model.sample(2.5)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"group": "nort"}, "has no value 'nort'; it has .* did you mean 'north'"),
        ({"grup": "north"}, "unknown column 'grup'; .* did you mean 'group'"),
        ({"group": ">north"}, "no order"),
        ({"size": ">9999"}, "'size' has no value in >9999; its values are from"),
        ({"size": (0.0011, 0.0019)}, r"'size' has no value in 0.0011..0.0019; .* in steps of 0.01"),
        ({"count": (-9, -2)}, "'count' has no value in -9..-2; its values are from 5 to 4975"),
        ({"group": []}, "an empty list allows no value"),
        ({"rank": {"a": 1}}, "not a mapping"),
    ],
)
def test_errors_name_the_column_and_the_way_out(model, where, message):
    with pytest.raises(ValueError, match=message):
        model.sample(3, where)


def test_a_loaded_model_gives_the_same_rows_bit_for_bit(model, tmp_path):
    model.save(tmp_path / "run")
    loaded = TableSynthesizer.load(tmp_path / "run", device="cpu")
    for where in (None, {"size": (0, 50)}, {"count": 100, "note": None}):
        pd.testing.assert_frame_equal(
            loaded.sample(60, where, seed=5), model.sample(60, where, seed=5), check_exact=True
        )


def test_a_pooled_category_is_a_condition():
    rare = table().assign(group=[f"g{min(i % 40, i % 7)}" for i in range(500)])
    model = TableSynthesizer(overrides=[*SETTINGS, "encoding.max_categories=4", "train.steps=10"], device="cpu").fit(
        rare
    )
    pooled = [tag.split(":")[1] for tag, _ in model.columns_.columns["group"].rare]
    assert len(pooled) > 1
    assert set(model.sample(20, {"group": pooled[0]})["group"]) == {pooled[0]}
    assert set(model.sample(60, {"group": [pooled[0], "g0"]})["group"]) <= {pooled[0], "g0"}
    assert pooled[1] not in set(model.sample(60, {"group": f"!={pooled[1]}"})["group"])
