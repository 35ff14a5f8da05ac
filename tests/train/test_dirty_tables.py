"""A table of cells in many spellings through a model: fit, sample, conditions, imputation, save and load."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from anystate.model.codecs.table.files import read_table
from anystate.train.synthesizer import TableSynthesizer

TINY = ["network.width=16", "network.depth=1", "network.heads=2", "train.batch=64", "train.steps=40", "sample.steps=4"]
N = 300


def dirty() -> pd.DataFrame:
    r = np.random.default_rng(0)
    moments = pd.Timestamp("2020-01-01") + pd.to_timedelta(r.integers(0, 10**8, N), "s")
    size = r.gamma(2.0, 1000.0, N)
    table = pd.DataFrame(
        {
            "key": [f"A-{i:05d}" for i in r.permutation(N)],
            "price": [f"${v:,.2f}" for v in size],
            "weight": [f"{v:.1f} kg".replace(".", ",") for v in size / 7],
            "seen": moments.strftime("%m/%d/%Y %I:%M %p"),
            "day": [m.date() for m in moments],
            "local": pd.Series(moments).dt.normalize().dt.tz_localize("Europe/Berlin"),
            "ymd": moments.strftime("%Y%m%d").astype("int64"),
            "cost": [Decimal(f"{v:.2f}") for v in size],
            "salary": r.integers(40, 300, N) * 500,
            "wait": pd.to_timedelta(r.integers(0, 400, N) * 15, "min"),
            "band": pd.cut(size, 4),
            "open": r.choice(["Y", "N"], N),
            "zip": [f"{v:05d}" for v in r.integers(500, 540, N)],
            "big": 10**17 + r.integers(0, 90, N),
        }
    )
    table["score"] = [f"{v:.1f}" if r.random() < 0.9 else "NA" for v in size / 100]
    return table


@pytest.fixture(scope="module")
def model() -> TableSynthesizer:
    with pytest.warns(UserWarning, match="column") as said:
        model = TableSynthesizer(overrides=TINY, device="cpu").fit(dirty())
    lines = sorted(str(warning.message) for warning in said)
    assert [line.partition(":")[0] for line in lines] == ["column 'score'", "column 'ymd'"]
    return model


PATTERNS = {
    "key": r"A-\d{5}",
    "price": r"\$\d{1,3}(,\d{3})*\.\d\d",
    "weight": r"\d+,\d kg",
    "seen": r"\d\d/\d\d/20\d\d \d\d:\d\d [AP]M",
    "open": r"[YN]",
    "zip": r"005[0-3]\d",
    "score": r"\d+\.\d",
}


def test_rows_are_spelled_like_the_table(model):
    real, made = dirty(), model.sample(N, seed=3)
    assert list(made.dtypes.astype(str)) == list(real.dtypes.astype(str))
    for name, pattern in PATTERNS.items():
        assert made[name].dropna().map(lambda text, p=pattern: re.fullmatch(p, text) is not None).all()
    assert not set(made["key"]) & set(real["key"])
    assert {type(day) for day in made["day"]} == {datetime.date}
    assert {cost.as_tuple().exponent for cost in made["cost"]} == {-2}
    assert (made["local"].dt.hour == 0).all()
    assert pd.to_datetime(made["ymd"].astype(str), format="%Y%m%d").between("2020-01-01", "2023-04-01").all()
    assert (made["salary"] % 500 == 0).all()
    assert (made["wait"] % pd.Timedelta("15min") == pd.Timedelta(0)).all()
    assert made["big"].between(10**17, 10**17 + 89).all()
    assert made["big"].nunique() > 30


def test_conditions_are_read_in_the_spelling_of_the_column_and_plain(model):
    for low in ("$1,500.00", 1500):
        made = model.sample(40, where={"price": (low, None)})["price"]
        assert made.str.replace(r"[$,]", "", regex=True).astype(float).min() >= 1500
    for low, high in (("03/01/2021 12:00 AM", "04/01/2021 12:00 AM"), ("2021-03-01", "2021-04-01")):
        made = pd.to_datetime(model.sample(40, where={"seen": (low, high)})["seen"], format="%m/%d/%Y %I:%M %p")
        assert made.between("2021-03-01", "2021-04-01").all()
    made = model.sample(40, where={"big": (10**17 + 5, 10**17 + 7), "day": (datetime.date(2021, 1, 1), None)})
    assert set(made["big"]) <= {10**17 + 5, 10**17 + 6, 10**17 + 7}
    assert min(made["day"]) >= datetime.date(2021, 1, 1)


def test_files_and_copies_of_the_model_give_the_same_rows(model, tmp_path):
    model.save(tmp_path / "model")
    again = TableSynthesizer.load(tmp_path / "model", device="cpu")
    made = model.sample(50, seed=1)
    pd.testing.assert_frame_equal(again.sample(50, seed=1), made)
    made.to_csv(tmp_path / "rows.csv", index=False)
    texts = read_table(tmp_path / "rows.csv", text_columns=list(made))
    for name in PATTERNS:
        assert texts[name].fillna("").tolist() == made[name].fillna("").tolist()


def test_missing_cells_are_filled_in_the_same_spelling(model):
    table = dirty().head(60)
    holes = table.copy()
    for i, name in enumerate(name for name in PATTERNS if name != "key"):
        holes.loc[i::6, name] = None
    filled = model.impute(holes)
    for i, name in enumerate(name for name in PATTERNS if name != "key"):
        assert filled.loc[i::6, name].map(lambda text, p=PATTERNS[name]: re.fullmatch(p, text) is not None).all()
        rest = [row for row in range(60) if row % 6 != i and table[name][row] != "NA"]  # which is a gap too
        assert (filled.loc[rest, name] == table.loc[rest, name]).all()
