"""`anystate bench table --imputation`: cells removed at random from held-out rows, imputed by us and by baselines.

The score of a numerical column is the root mean square error over its standard deviation (1: the mean of the held-out
column), that of a categorical column the accuracy, over the same removed cells for all methods. All methods are fitted
on the training rows. The baselines are the column's mean or most frequent value, and scikit-learn's `IterativeImputer`
with its default, Bayesian ridge regression, in two forms: categories as their index in sorted order, rounded; and
one-hot, the largest of which is the category. One-hot imputation mostly returns the most frequent category, because the
indicators of one column predict each other perfectly but are always missing together.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from rich.table import Table

from .columns import Roles, numbers, strings

if TYPE_CHECKING:
    from sklearn.impute import IterativeImputer

Fill = Callable[[pd.DataFrame], pd.DataFrame]
FILLERS = ("anystate", "iterative, ordinal", "iterative, one-hot", "mean/mode")


@dataclasses.dataclass(frozen=True)
class Filled:
    """The score of one method on one column: RMSE over standard deviation, or accuracy."""

    column: str
    metric: str
    filler: str
    score: float
    cells: int
    seconds: float
    error: float  # standard error of the difference to the best other method, paired over cells


def remove(table: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """(the table without a random share of its cells, (N, C) bool of the cells removed)."""
    gone = np.random.default_rng(seed).random(table.shape) < share
    return table.mask(gone), gone & table.notna().to_numpy()


def imputation(
    train: pd.DataFrame,
    test: pd.DataFrame,
    roles: Roles,
    ours: Fill,
    share: float = 0.2,
    seed: int = 0,
    one_hot_rows: int = 8000,
) -> list[Filled]:
    """The scores of every column and method.

    Args:
        ours: fills the missing cells of a table.
        share: share of the cells to remove.
        one_hot_rows: training rows of IterativeImputer on one-hot categories, at most; 8,000 take minutes.
    """
    train, test = (t[list(roles.columns)].reset_index(drop=True) for t in (train, test))
    holes, gone = remove(test, share, seed)
    subsample = train.sample(min(one_hot_rows, len(train)), random_state=0)
    fills = dict(
        zip(FILLERS, (ours, _ordinal(train, roles), _one_hot(subsample, roles), _simple(train, roles)), strict=True)
    )
    imputed, seconds = {}, {}
    for name, fill in fills.items():
        began = time.perf_counter()
        imputed[name] = fill(holes)
        seconds[name] = time.perf_counter() - began
    rows = []
    for c, column in enumerate(roles.columns):
        cells = gone[:, c]
        if not cells.any():
            continue
        numerical = column in roles.numerical
        losses = {name: _losses(test[column][cells], imputed[name][column][cells], numerical) for name in fills}
        variance = float(np.nanvar(numbers(test[column]))) if numerical else None
        for name in fills:
            score, error = _score(losses, name, variance)
            metric = "RMSE" if numerical else "accuracy"
            rows.append(Filled(column, metric, name, score, int(cells.sum()), round(seconds[name], 1), error))
    return rows


def _score(losses: dict[str, np.ndarray], name: str, variance: float | None) -> tuple[float, float]:
    """(score of a method, standard error of its difference to the best other one).

    Args:
        losses: of every method, per cell.
        variance: of a numerical column; None of a categorical one.
    """
    loss = losses[name]
    other = min((losses[k] for k in losses if k != name), key=np.mean)
    error = float((loss - other).std() / np.sqrt(len(loss)))
    if variance is None:
        return 1.0 - float(loss.mean()), error
    score = float(np.sqrt(loss.mean() / variance))
    # a − b = (a² − b²) / (a + b)
    return score, error / max(variance * (score + np.sqrt(other.mean() / variance)), 1e-12)


def _losses(truth: pd.Series, guess: pd.Series, numerical: bool) -> np.ndarray:
    """Per cell, the squared error, or whether the category is wrong."""
    if numerical:
        return (numbers(truth) - numbers(guess)) ** 2
    return (strings(truth).to_numpy() != strings(guess).to_numpy()).astype(float)


def _simple(train: pd.DataFrame, roles: Roles) -> Fill:
    values = {c: float(np.nanmean(numbers(train[c]))) for c in roles.numerical}
    values |= {c: strings(train[c]).mode().iloc[0] for c in roles.categorical}

    def fill(holes: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            {
                c: pd.Series(numbers(holes[c])).fillna(values[c])
                if c in roles.numerical
                else strings(holes[c]).fillna(values[c])
                for c in roles.columns
            }
        )

    return fill


def _ordinal(train: pd.DataFrame, roles: Roles) -> Fill:
    """IterativeImputer on numbers and indices of categories."""
    levels = {c: np.array(sorted(strings(train[c]).dropna().unique()), dtype=object) for c in roles.categorical}
    scale = _scale(train, roles)

    def features(table: pd.DataFrame) -> np.ndarray:
        parts = [(numbers(table[c]) - scale[c][0]) / scale[c][1] for c in roles.numerical]
        for c in roles.categorical:
            index = pd.Index(levels[c]).get_indexer(strings(table[c])).astype(float)
            parts.append(np.where(index < 0, np.nan, index))
        return np.column_stack(parts)

    imputer = _fitted(features(remove(train, 0.2, 1)[0]))

    def fill(holes: pd.DataFrame) -> pd.DataFrame:
        values = dict(zip(roles.columns, imputer.transform(features(holes)).T, strict=True))
        imputed = {c: values[c] * scale[c][1] + scale[c][0] for c in roles.numerical}
        for c in roles.categorical:
            imputed[c] = levels[c][np.clip(np.round(values[c]), 0, len(levels[c]) - 1).astype(int)]
        return pd.DataFrame(imputed)

    return fill


def _one_hot(train: pd.DataFrame, roles: Roles) -> Fill:
    """IterativeImputer on numbers and one-hot categories."""
    levels = {c: np.array(sorted(strings(train[c]).dropna().unique()), dtype=object) for c in roles.categorical}
    scale = _scale(train, roles)

    def features(table: pd.DataFrame) -> np.ndarray:
        parts = [((numbers(table[c]) - scale[c][0]) / scale[c][1])[:, None] for c in roles.numerical]
        for c in roles.categorical:
            categories = strings(table[c])
            hot = (categories.to_numpy(dtype=object)[:, None] == levels[c]).astype(float)
            hot[categories.isna().to_numpy()] = np.nan
            parts.append(hot)
        return np.concatenate(parts, 1)

    imputer = _fitted(features(remove(train, 0.2, 1)[0]))

    def fill(holes: pd.DataFrame) -> pd.DataFrame:
        values = imputer.transform(features(holes))
        imputed = {c: values[:, i] * scale[c][1] + scale[c][0] for i, c in enumerate(roles.numerical)}
        start = len(roles.numerical)
        for c in roles.categorical:
            imputed[c] = levels[c][values[:, start : start + len(levels[c])].argmax(1)]
            start += len(levels[c])
        return pd.DataFrame(imputed)

    return fill


def _scale(train: pd.DataFrame, roles: Roles) -> dict[str, tuple[float, float]]:
    """{numerical column: (mean, standard deviation)}."""
    values = {c: numbers(train[c]) for c in roles.numerical}
    return {c: (np.nanmean(v), np.nanstd(v) or 1.0) for c, v in values.items()}


def _fitted(features: np.ndarray) -> IterativeImputer:
    """IterativeImputer with its default settings, fitted on rows with cells removed."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may not converge in its ten rounds
        return IterativeImputer(random_state=0, keep_empty_features=True).fit(features)


def verdict(rows: list[Filled], column: str) -> str:
    """Whether ours is better or worse than the best baseline by more than two standard errors."""
    scores = {row.filler: row for row in rows if row.column == column}
    ours, sign = scores["anystate"], -1 if scores["anystate"].metric == "RMSE" else 1
    difference = sign * ours.score - max(sign * row.score for row in scores.values() if row is not ours)
    if abs(difference) <= 2 * ours.error:
        return "equal within noise"
    return "better" if difference > 0 else "worse"


def table_of(rows: list[Filled], title: str) -> Table:
    """A table of the scores: rows are columns of the data, columns are methods."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("column", "metric", "cells", *FILLERS, ""):
        table.add_column(name, justify="left" if name in ("column", "metric", "") else "right")
    for column in dict.fromkeys(row.column for row in rows):
        scores = {row.filler: row for row in rows if row.column == column}
        ours = scores["anystate"]
        cells = (f"{scores[name].score:.4f}" for name in FILLERS)
        table.add_row(column, ours.metric, str(ours.cells), *cells, verdict(rows, column))
    return table
