"""A saved model gives the same rows as the fitted one, bit for bit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from anystate.train.synthesizer import TableSynthesizer

TINY = ["network.width=16", "network.depth=1", "network.heads=2", "train.batch=64", "train.steps=20", "sample.steps=4"]


def narrow_table() -> pd.DataFrame:
    """One number: its head is a matrix product of one column, which torch rounds in a way of its own."""
    r = np.random.default_rng(0)
    return pd.DataFrame({"x": r.normal(size=300), "a": r.choice(["p", "q"], 300), "b": r.choice(list("uvw"), 300)})


def wide_table() -> pd.DataFrame:
    """Gaps, infinities, large integers, dates with a time zone, a category of numbers, pooled categories."""
    r, n = np.random.default_rng(1), 300
    gaps = r.random(n) < 0.2
    return pd.DataFrame(
        {
            "gaps": np.where(gaps, np.nan, r.normal(size=n)),
            "infinite": np.where(r.random(n) < 0.1, np.inf, r.normal(size=n)),
            "small": r.normal(size=n).astype("float32"),
            "long": r.integers(10**17, 10**18, n),
            "nullable": pd.array(r.integers(0, 900, n), dtype="Int64"),
            "when": pd.Timestamp("2020-01-01", tz="Europe/Berlin") + pd.to_timedelta(r.integers(0, 10**4, n), unit="h"),
            "level": pd.Categorical(r.choice(["lo", "mid", "hi"], n), ["lo", "mid", "hi"], ordered=True),
            "share": pd.Categorical(r.choice([0.1, 1 / 3, 2e300], n)),
            "text": pd.Series(r.choice(list("xy"), n), dtype=object).mask(gaps, None),
            "zip": [f"z{i}" for i in r.zipf(1.5, n).clip(max=400)],
        }
    )


@pytest.fixture(scope="module", params=[narrow_table, wide_table], ids=["narrow", "wide"])
def models(request, tmp_path_factory) -> tuple[pd.DataFrame, TableSynthesizer, TableSynthesizer]:
    """(training table, fitted model, the same saved and loaded)."""
    table = request.param()
    fitted = TableSynthesizer(overrides=[*TINY, "encoding.max_categories=20"], seed=3, device="cpu").fit(table)
    folder = tmp_path_factory.mktemp("model")
    fitted.save(folder)
    return table, fitted, TableSynthesizer.load(folder, device="cpu")


@pytest.mark.parametrize("case", ["rows", "a seed", "a value", "a range", "a rare region", "balance"])
def test_the_same_rows(models, case):
    table, fitted, loaded = models
    number, token = ("x", "a") if "x" in table else ("small", "text")
    value = table[token].dropna().iloc[0]
    options = {
        "rows": {"n": 5000},
        "a seed": {"n": 200, "seed": 7},
        "a value": {"n": 200, "where": {token: value}},
        "a range": {"n": 200, "where": {number: (0.0, 1.0)}},
        "a rare region": {"n": 20, "where": {number: (0.5, 0.501), token: value}},
        "balance": {"n": 30, "balance": token},
    }[case]
    pd.testing.assert_frame_equal(fitted.sample(**options), loaded.sample(**options), check_exact=True)


@pytest.mark.parametrize("how", ["draw", "expected"])
def test_the_same_cells_are_filled_in(models, how):
    table, fitted, loaded = models
    rows = table.head(40).copy()
    for start, name in enumerate(rows):
        rows[name] = rows[name].mask(np.arange(40) % len(rows.columns) == start)
    made = [model.impute(rows, how) for model in (fitted, loaded)]
    for a, b in [made] if how == "draw" else zip(*made, strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
