"""Baselines for synthetic tables: resampled real rows, independent columns, a Gaussian copula.

For the published data sets their scores were measured with the official code (`baselines.json`, a copy of the golden
file); for other tables they are measured here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd

from .columns import Roles, codes, numbers

FILE = Path(__file__).with_suffix(".json")


@functools.cache
def _measured() -> dict:
    return json.loads(FILE.read_text())["datasets"]


def published_baselines(name: str | None) -> dict:
    """The measured scores of the baselines on a set; {} for a set without any."""
    return _measured().get(name, {})


def resample(real: pd.DataFrame, rows: int, rng: np.random.Generator, extremes: tuple[str, ...] = ()) -> pd.DataFrame:
    """Real rows drawn with replacement; the first ones have the minimum and maximum of the columns in `extremes`."""
    chosen = rng.integers(0, len(real), rows)
    ends = []
    for values in (numbers(real[c]) for c in extremes):
        if not np.isnan(values).all():
            ends += [np.nanargmin(values), np.nanargmax(values)]
    chosen[: len(ends)] = ends[:rows]
    return real.iloc[chosen].reset_index(drop=True)


def independent(real: pd.DataFrame, rows: int, rng: np.random.Generator) -> pd.DataFrame:
    """Every column permuted independently (repeated as often as needed): exact margins, no dependence."""
    repeats = -(-rows // len(real))
    return pd.DataFrame(
        {c: real[c].take(np.concatenate([rng.permutation(len(real)) for _ in range(repeats)])[:rows]).array
         for c in real.columns}
    )  # fmt: skip


def gaussian_copula(real: pd.DataFrame, roles: Roles, rows: int, rng: np.random.Generator) -> pd.DataFrame:
    """A Gaussian copula with the empirical margins.

    Its correlation matrix is that of the normal scores of ranks; equal values are ranked in random order.
    """
    from scipy.stats import norm

    columns, orders, z = roles.columns, {}, []
    if len(real) < 2:
        return real[columns].take(np.zeros(rows, int)).reset_index(drop=True)
    for column in columns:
        values = numbers(real[column]) if column in roles.numerical else codes(real[column]).codes[0]
        orders[column] = np.lexsort([rng.random(len(real)), values])
        rank = np.empty(len(real))
        rank[orders[column]] = np.arange(len(real))
        z.append(norm.ppf((rank + 0.5) / len(real)))
    correlation = np.atleast_2d(np.corrcoef(z))
    drawn = norm.cdf(rng.multivariate_normal(np.zeros(len(columns)), correlation, rows, method="eigh"))
    ranks = np.minimum((drawn * len(real)).astype(int), len(real) - 1)
    return pd.DataFrame({c: real[c].take(orders[c][ranks[:, i]]).array for i, c in enumerate(columns)})
