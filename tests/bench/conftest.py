"""Small tables, and the real ones where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import anystate
from anystate.bench.table.columns import roles_of
from anystate.bench.table.sets import read_set

NEAR = Path(anystate.__file__).resolve().parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def tabular():
    """The folder of real tables: $ANYSTATE_DATA/tabular, or shared/data/tabular beside the clone."""
    for folder in (os.environ.get("ANYSTATE_DATA"), NEAR):
        if folder and (Path(folder) / "tabular" / "adult" / "train.csv.gz").is_file():
            return Path(folder) / "tabular"
    pytest.skip(f"real tables lie neither in $ANYSTATE_DATA nor in {NEAR}")


@pytest.fixture(scope="session")
def real_table(tabular):
    """real_table("adult") → (train, test, roles)."""
    cache = {}

    def load(name):
        if name not in cache:
            train, test, schema = read_set(tabular / name)
            cache[name] = (train, test, roles_of(train, schema))
        return cache[name]

    return load


@pytest.fixture
def mixed():
    """mixed(rows, seed) → a table with dependent numbers, categories, a date and missing values; target `label`."""

    def make(rows=600, seed=0):
        rng = np.random.default_rng(seed)
        kind = rng.choice(["a", "b", "c"], rows, p=[0.5, 0.3, 0.2])
        size = rng.normal(np.where(kind == "a", 0.0, 3.0), 1.0)
        weight = size * 2 + rng.normal(0, 0.5, rows)
        return pd.DataFrame(
            {
                "size": size,
                "weight": np.where(rng.random(rows) < 0.1, np.nan, weight),
                "count": rng.poisson(3, rows),
                "kind": kind,
                "flag": rng.random(rows) < 0.3,
                "when": pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 1000, rows), "D"),
                "label": np.where(size + rng.normal(0, 0.5, rows) > 1.5, "yes", "no"),
            }
        )

    return make
