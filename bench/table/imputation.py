"""`anystate bench table --imputation`: cells removed at random from held-out rows, filled by us and by scikit-learn.

Numbers are judged by their root mean square error over the standard deviation of the column (1 is the mean of the
held-out column itself), categories by the share that is right; a column's scores are over the same removed cells for
all. Every filler loss_mask from the training rows alone. The opponents: the column's mean or most frequent value, and
`IterativeImputer` (Bayesian ridge regression, the default) twice: categories as their numbers in sorted order, rounded
when they come back; and one-hot, the largest of which is the category filled in. The latter leaves categories at their
most frequent value, because the levels of one column tell each other and are missing together.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from rich.table import Table

from .columns import Roles, numbers, words

Fill = Callable[[pd.DataFrame], pd.DataFrame]
FILLERS = ("anystate", "iterative, ordinal", "iterative, one-hot", "mean/mode")


@dataclasses.dataclass(frozen=True)
class Filled:
    """One column by one filler: RMSE over standard deviation (lower is better) or accuracy (higher is better)."""

    column: str
    metric: str
    filler: str
    score: float
    cells: int
    seconds: float
    error: float  # standard error of the difference to the best other filler, paired over cells


def remove(table: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The table without a share of its cells, and which they are."""
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
    """Scores of every column and filler; `ours` takes a table with empty cells.

    Args:
        one_hot_rows: training rows of IterativeImputer on one-hot categories, which takes minutes for so many.
    """
    train, test = (t[list(roles.columns)].reset_index(drop=True) for t in (train, test))
    holes, gone = remove(test, share, seed)
    few = train.sample(min(one_hot_rows, len(train)), random_state=0)
    fills = dict(zip(FILLERS, (ours, _ordinal(train, roles), _one_hot(few, roles), _simple(train, roles)), strict=True))
    made, seconds = {}, {}
    for name, fill in fills.items():
        began = time.perf_counter()
        made[name] = fill(holes)
        seconds[name] = time.perf_counter() - began
    rows = []
    for c, column in enumerate(roles.columns):
        at = gone[:, c]
        if not at.any():
            continue
        losses = {name: _losses(test[column][at], made[name][column][at], column in roles.numerical) for name in fills}
        scale = float(np.nanvar(numbers(test[column]))) if column in roles.numerical else 1.0
        roots = column in roles.numerical
        for name, loss in losses.items():
            score = float(np.sqrt(loss.mean() / scale)) if roots else 1.0 - float(loss.mean())
            other = min((k for k in losses if k != name), key=lambda k: losses[k].mean())
            error = float((loss - losses[other]).std() / np.sqrt(len(loss)))
            if roots:  # a − b = (a² − b²) / (a + b)
                error /= max(scale * (score + np.sqrt(losses[other].mean() / scale)), 1e-12)
            metric = "RMSE" if roots else "accuracy"
            rows.append(Filled(column, metric, name, score, int(at.sum()), round(seconds[name], 1), error))
    return rows


def _losses(truth: pd.Series, guess: pd.Series, numerical: bool) -> np.ndarray:
    """Squared errors or mistakes, cell by cell."""
    if numerical:
        return (numbers(truth) - numbers(guess)) ** 2
    return (words(truth).to_numpy() != words(guess).to_numpy()).astype(float)


def _simple(train: pd.DataFrame, roles: Roles) -> Fill:
    values = {c: float(np.nanmean(numbers(train[c]))) for c in roles.numerical}
    values |= {c: words(train[c]).mode().iloc[0] for c in roles.categorical}

    def fill(holes: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            {
                c: pd.Series(numbers(holes[c])).fillna(values[c])
                if c in roles.numerical
                else words(holes[c]).fillna(values[c])
                for c in roles.columns
            }
        )

    return fill


def _ordinal(train: pd.DataFrame, roles: Roles) -> Fill:
    """IterativeImputer on numbers and the places of categories."""
    levels = {c: np.array(sorted(words(train[c]).dropna().unique()), dtype=object) for c in roles.categorical}
    scale = _scale(train, roles)

    def features(table: pd.DataFrame) -> np.ndarray:
        parts = [(numbers(table[c]) - scale[c][0]) / scale[c][1] for c in roles.numerical]
        for c in roles.categorical:
            place = pd.Index(levels[c]).get_indexer(words(table[c])).astype(float)
            parts.append(np.where(place < 0, np.nan, place))
        return np.column_stack(parts)

    imputer = _fitted(features(remove(train, 0.2, 1)[0]))

    def fill(holes: pd.DataFrame) -> pd.DataFrame:
        values = dict(zip(roles.columns, imputer.transform(features(holes)).T, strict=True))
        made = {c: values[c] * scale[c][1] + scale[c][0] for c in roles.numerical}
        for c in roles.categorical:
            made[c] = levels[c][np.clip(np.round(values[c]), 0, len(levels[c]) - 1).astype(int)]
        return pd.DataFrame(made)

    return fill


def _one_hot(train: pd.DataFrame, roles: Roles) -> Fill:
    """IterativeImputer on numbers and one-hot categories."""
    levels = {c: np.array(sorted(words(train[c]).dropna().unique()), dtype=object) for c in roles.categorical}
    scale = _scale(train, roles)

    def features(table: pd.DataFrame) -> np.ndarray:
        parts = [((numbers(table[c]) - scale[c][0]) / scale[c][1])[:, None] for c in roles.numerical]
        for c in roles.categorical:
            known = words(table[c])
            hot = (known.to_numpy(dtype=object)[:, None] == levels[c]).astype(float)
            hot[known.isna().to_numpy()] = np.nan
            parts.append(hot)
        return np.concatenate(parts, 1)

    imputer = _fitted(features(remove(train, 0.2, 1)[0]))

    def fill(holes: pd.DataFrame) -> pd.DataFrame:
        values = imputer.transform(features(holes))
        made = {c: values[:, i] * scale[c][1] + scale[c][0] for i, c in enumerate(roles.numerical)}
        start = len(roles.numerical)
        for c in roles.categorical:
            made[c] = levels[c][values[:, start : start + len(levels[c])].argmax(1)]
            start += len(levels[c])
        return pd.DataFrame(made)

    return fill


def _scale(train: pd.DataFrame, roles: Roles) -> dict[str, tuple[float, float]]:
    return {c: (np.nanmean(v), np.nanstd(v) or 1.0) for c in roles.numerical for v in [numbers(train[c])]}


def _fitted(features: np.ndarray):
    """IterativeImputer as it comes, fitted on rows with cells removed."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge in its ten rounds
        return IterativeImputer(random_state=0, keep_empty_features=True).fit(features)


def verdict(rows: list[Filled], column: str) -> str:
    """Ours against the better of the others: better, within two standard errors, or worse."""
    scores = {row.filler: row for row in rows if row.column == column}
    mine, sign = scores["anystate"], -1 if scores["anystate"].metric == "RMSE" else 1
    lead = sign * mine.score - max(sign * row.score for row in scores.values() if row is not mine)
    return "better" if lead > 2 * mine.error else "worse" if lead < -2 * mine.error else "equal within noise"


def table_of(rows: list[Filled], title: str) -> Table:
    """Columns down, fillers across."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("column", "metric", "cells", *FILLERS, ""):
        table.add_column(name, justify="left" if name in ("column", "metric", "") else "right")
    for column in dict.fromkeys(row.column for row in rows):
        scores = {row.filler: row for row in rows if row.column == column}
        mine = scores["anystate"]
        cells = (f"{scores[name].score:.4f}" for name in FILLERS)
        table.add_row(column, mine.metric, str(mine.cells), *cells, verdict(rows, column))
    return table
