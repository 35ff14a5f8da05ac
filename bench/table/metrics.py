"""Scores of a synthetic table against a real one: Shape, Trend, detection, α-precision and β-recall, privacy.

Shape and Trend equal those of sdmetrics 0.11.1, the version of the published numbers (later versions leave out weakly
related pairs unless both thresholds are 0). They are computed here because sdmetrics is slow on many columns and
subsamples tables of more than 50,000 rows; tests compare every column and pair with sdmetrics, and the means with the
baselines. All scores are in [0, 1].
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd

from .columns import MISSING, Encoded, Features, Roles, codes, numbers, strings

BINS = 10  # of a numerical column in the Trend of a pair with a categorical one
DECIMALS = 14  # sdmetrics rounds numbers to these before the Kolmogorov–Smirnov statistic
BLOCK = 2048  # rows of a block of the distance matrix
TIES = 1e-9  # distances that differ by less are equal
RECORDS = 50_000  # real rows that distances are computed to, at most


@dataclasses.dataclass(frozen=True)
class Density:
    """Shape and Trend; NaN scores (a constant number has no correlation) do not enter the means."""

    shape: float
    trend: float
    columns: dict[str, float]
    pairs: dict[tuple[str, str], float]


def density(real: pd.DataFrame, synth: pd.DataFrame, roles: Roles) -> Density:
    """Shape and Trend.

    Shape is the mean over columns of 1 − Kolmogorov–Smirnov statistic (numerical) or 1 − total variation (categorical).
    Trend is the mean over pairs of 1 − |Δ Pearson|/2 (two numerical columns) or 1 − total variation of the contingency
    tables, where a numerical column is cut into ten equal bins of each table's own range.
    """
    numerical = {c: (numbers(real[c]), numbers(synth[c])) for c in roles.numerical}
    categorical = {c: codes(real[c], synth[c]).codes for c in roles.categorical}
    columns = {c: ks_complement(*numerical[c]) for c in roles.numerical}
    columns |= {c: tv_complement(*(v[v >= 0] for v in categorical[c])) for c in roles.categorical}
    pairs = _correlation_pairs(numerical)
    cells = {c: tuple(v + 1 for v in tables) for c, tables in categorical.items()}
    if categorical:
        cells |= {c: tuple(_binned(v) for v in tables) for c, tables in numerical.items()}
    for a, b in itertools.combinations(roles.columns, 2):
        if (a, b) not in pairs:
            pairs[a, b] = tv_complement(*_joint(cells[a], cells[b]))
    return Density(_mean(columns), _mean(pairs), columns, pairs)


def ks_complement(real: np.ndarray, synth: np.ndarray) -> float:
    """1 − the largest difference of the two empirical distribution functions; NaN if either table has no values."""
    real, synth = (np.sort(np.round(v[~np.isnan(v)], DECIMALS)) for v in (real, synth))
    if not len(real) or not len(synth):
        return float("nan")
    at = np.concatenate([real, synth])
    shares = [np.searchsorted(v, at, "right") / len(v) for v in (real, synth)]
    return 1.0 - float(np.abs(shares[0] - shares[1]).max())


def tv_complement(real: np.ndarray, synth: np.ndarray) -> float:
    """1 − total variation distance of two arrays of codes ≥ 0; NaN if either is empty."""
    if not len(real) or not len(synth):
        return float("nan")
    size = int(max(real.max(), synth.max())) + 1
    if size > 4 * (len(real) + len(synth)) + 1024:
        joined, inverse = np.unique(np.concatenate([real, synth]), return_inverse=True)
        size, real, synth = len(joined), inverse[: len(real)], inverse[len(real) :]
    shares = [np.bincount(v, minlength=size) / len(v) for v in (real, synth)]
    return 1.0 - float(np.abs(shares[0] - shares[1]).sum()) / 2


def correlations(values: dict[str, np.ndarray]) -> np.ndarray:
    """Pearson correlations over the rows where both are known; NaN where one does not vary."""
    if not values:
        return np.zeros((0, 0))
    matrix = np.column_stack(list(values.values()))
    # np.ptp of a column of NaN alone is NaN, which is not > 0 either
    varies = np.array([np.ptp(v[~np.isnan(v)]) > 0 if (~np.isnan(v)).any() else False for v in matrix.T])
    if len(matrix) < 2:
        result = np.full((matrix.shape[1],) * 2, np.nan)
    elif np.isnan(matrix).any():
        result = pd.DataFrame(matrix).corr().to_numpy(copy=True)
    else:
        with np.errstate(all="ignore"):
            result = np.atleast_2d(np.corrcoef(matrix, rowvar=False))
    result[~varies] = np.nan
    result[:, ~varies] = np.nan
    return result


def _correlation_pairs(numerical: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[tuple[str, str], float]:
    """1 − |Δ Pearson|/2 of every pair of numerical columns {name: (real, synthetic)}."""
    real, synth = (correlations({c: tables[i] for c, tables in numerical.items()}) for i in (0, 1))
    return {
        (a, b): 1.0 - float(abs(real[i, j] - synth[i, j])) / 2
        for (i, a), (j, b) in itertools.combinations(enumerate(numerical), 2)
    }


def _binned(values: np.ndarray) -> np.ndarray:
    """Bins 0 … 11 of the table's own range; the maximum and missing values share the last, as in sdmetrics."""
    present = values[~np.isnan(values)]
    if len(present) and np.ptp(present) < 4 * BINS * np.spacing(np.abs(present).max()):  # too few floats for the edges
        values, present = values - present.min(), present - present.min()
    return np.digitize(values, np.histogram_bin_edges(present, BINS))


def _joint(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One code per row for the pair of codes a and b, each of (real, synthetic)."""
    width = int(max(part.max(initial=0) for part in b)) + 1
    return tuple(x.astype(np.int64) * width + y for x, y in zip(a, b, strict=True))


def _mean(scores: dict) -> float:
    finite = [s for s in scores.values() if not np.isnan(s)]
    return float(np.mean(finite)) if finite else float("nan")


@dataclasses.dataclass(frozen=True)
class Detection:
    """A classifier's test AUC at telling real from synthetic rows (0.5 is best) and the score 2 − 2·max(AUC, ½)."""

    logistic_auc: float
    xgboost_auc: float
    logistic: float
    xgboost: float


def detection(
    real: pd.DataFrame, synth: pd.DataFrame, roles: Roles, seed: int = 0, limit: int = 20_000, folds: int = 3
) -> Detection:
    """Cross-validated classifier two-sample tests by logistic regression and XGBoost.

    Logistic regression is that of sdmetrics' LogisticDetection: means for missing numbers, robust scaling, one-hot
    categories. Both tables are subsampled to the same number of rows, at most `limit`.

    Raises:
        ValueError: fewer rows than folds.
    """
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import RobustScaler
    from xgboost import XGBClassifier

    rng = np.random.default_rng(seed)
    n = min(len(real), len(synth), limit)
    if n < folds:
        raise ValueError(f"detection needs at least {folds} rows in each table, there are {n}")
    real, synth = (t.iloc[rng.permutation(len(t))[:n]] for t in (real, synth))
    both = pd.concat([real[roles.columns], synth[roles.columns]], ignore_index=True)
    x, y = model_features(both, real, roles), np.repeat([1, 0], n)
    aucs: dict[str, list[float]] = {"logistic": [], "xgboost": []}
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        logistic = make_pipeline(
            SimpleImputer(keep_empty_features=True), RobustScaler(), LogisticRegression(max_iter=300)
        )
        trees = XGBClassifier(n_estimators=100, max_depth=6, tree_method="hist", random_state=seed)
        for name, model in (("logistic", logistic), ("xgboost", trees)):
            guess = model.fit(x[train], y[train]).predict_proba(x[test])[:, 1]
            aucs[name].append(roc_auc_score(y[test], guess))
    score = {k: float(np.mean([2 - 2 * max(0.5, auc) for auc in v])) for k, v in aucs.items()}
    return Detection(float(np.mean(aucs["logistic"])), float(np.mean(aucs["xgboost"])), **score)


def model_features(table: pd.DataFrame, levels_from: pd.DataFrame, roles: Roles, leave_out: tuple = ()) -> np.ndarray:
    """(N, F) float32: numbers (NaN where missing) and one-hot categories, whose levels come from the second table."""
    parts = [numbers(table[c]).astype(np.float32) for c in roles.numerical if c not in leave_out]
    for column in roles.categorical:
        if column in leave_out:
            continue
        levels = strings(levels_from[column]).fillna(MISSING).value_counts().index
        found = levels.get_indexer(strings(table[column]).fillna(MISSING))
        parts.append((found[:, None] == np.arange(len(levels))).astype(np.float32))
    return np.column_stack(parts) if parts else np.zeros((len(table), 0), np.float32)


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """α-precision: are synthetic rows typical of the real ones? β-recall: are all kinds of real rows covered?"""

    alpha_precision: float
    beta_recall: float


def precision_recall(
    real: pd.DataFrame, synth: pd.DataFrame, roles: Roles, seed: int = 0, limit: int = 10_000, levels: int = 30
) -> PrecisionRecall:
    """Integrated α-precision and β-recall (Alaa et al. 2022, arXiv 2102.08921) of the points of `Features` instead of a
    learned embedding.

    The α-support of a table is the ball around its mean with a share α of its rows. P_α is the share of synthetic rows
    inside the real α-support. R_β is the share of real rows whose nearest synthetic row is in the synthetic β-support
    (a share β of these nearest rows, as in the authors' code) and no farther than the nearest other real row. Each
    score is 1 − Σ|curve − level| / Σ level, which is 1 if the curve is the diagonal.

    Raises:
        ValueError: a table has fewer than 2 rows.
    """
    rng = np.random.default_rng(seed)
    features = Features(roles, real)
    n = min(len(real), len(synth), limit)
    if n < 2:
        raise ValueError(f"α-precision needs at least 2 rows in each table, there are {n}")
    x, y = (features.table(t.iloc[rng.permutation(len(t))[:n]]) for t in (real, synth))
    at = np.linspace(0, 1, levels)
    real_centre, synth_centre = _centre(x), _centre(y)
    radii = np.quantile(_from_point(x, real_centre), at)
    precision = (_from_point(y, real_centre)[None] <= radii[:, None] + TIES).mean(1)
    own, _ = nearest(x, x, skip_self=True)
    other, which = nearest(x, y)
    depth = _from_point(y, synth_centre)[which]
    recall = ((other <= own + TIES)[None] & (depth[None] <= np.quantile(depth, at)[:, None] + TIES)).mean(1)
    return PrecisionRecall(*(1 - float(np.abs(c - at).sum() / at.sum()) for c in (precision, recall)))


def _centre(rows: Encoded) -> np.ndarray:
    return sum(points.sum(0) for _, points in rows.blocks(BLOCK)) / len(rows)


def _from_point(rows: Encoded, point: np.ndarray) -> np.ndarray:
    return np.concatenate([np.linalg.norm(points - point, axis=1) for _, points in rows.blocks(BLOCK)])


def nearest(queries: Encoded, among: Encoded, skip_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(distance, index) of the nearest row of `among` for every query, computed in blocks of the distance matrix.

    Args:
        skip_self: the two are the same table, and a row is not its own neighbour.
    """
    best, index = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for start, others in among.blocks(BLOCK):
        squares = (others**2).sum(1)
        for first, points in queries.blocks(BLOCK):
            square = points @ (-2.0 * others.T)
            square += squares
            square += (points**2).sum(1)[:, None]
            if skip_self and start == first:
                np.fill_diagonal(square, np.inf)
            found = square.argmin(1)
            value, rows = square[np.arange(len(points)), found], slice(first, first + len(points))
            closer = value < best[rows]
            best[rows] = np.where(closer, value, best[rows])
            index[rows] = np.where(closer, found + start, index[rows])
    distance = np.sqrt(np.maximum(best, 0.0))
    distance[distance < 1e-6] = 0.0  # equal points, up to rounding
    return distance, index


@dataclasses.dataclass(frozen=True)
class Privacy:
    """Copies are rows equal to a training row in every column; DCR is the distance to the closest record.

    Args:
        copies, median_dcr: of the synthetic rows.
        holdout_copies, holdout_median_dcr: of real rows that were not used in training, for reference.
        closer_to_train: share of synthetic rows whose closest real row is a training row, not a holdout row.
        closer_expected: what independent rows of the real distribution get there, the share of training rows among the
            real ones; copies get 1.
    """

    copies: float
    median_dcr: float
    holdout_copies: float | None = None
    holdout_median_dcr: float | None = None
    closer_to_train: float | None = None
    closer_expected: float | None = None


def privacy(
    train: pd.DataFrame,
    synth: pd.DataFrame,
    roles: Roles,
    holdout: pd.DataFrame | None = None,
    seed: int = 0,
    limit: int = 10_000,
) -> Privacy:
    """Copies are counted among all rows; distances are those of at most `limit` rows, drawn by the seed, to at most
    RECORDS rows of each real table."""
    rng = np.random.default_rng(seed)
    features = Features(roles, train)
    queries = _subsample(features, synth, limit, rng)
    train_rows = _subsample(features, train, RECORDS, rng)
    to_train, _ = nearest(queries, train_rows)
    copies, median = copied(train, synth, roles), float(np.median(to_train))
    if holdout is None:
        return Privacy(copies, median)
    holdout_rows = _subsample(features, holdout, RECORDS, rng)
    to_holdout, _ = nearest(queries, holdout_rows)
    holdout_to_train, _ = nearest(holdout_rows.take(np.arange(min(limit, len(holdout_rows)))), train_rows)
    share = len(train_rows) / (len(train_rows) + len(holdout_rows))
    return Privacy(
        copies=copies,
        median_dcr=median,
        holdout_copies=copied(train, holdout, roles),
        holdout_median_dcr=float(np.median(holdout_to_train)),
        closer_to_train=float(((to_train < to_holdout) + share * (to_train == to_holdout)).mean()),
        closer_expected=share,
    )


def _subsample(features: Features, table: pd.DataFrame, limit: int, rng: np.random.Generator) -> Encoded:
    return features.table(table.iloc[rng.permutation(len(table))[:limit]])


def copied(train: pd.DataFrame, rows: pd.DataFrame, roles: Roles) -> float:
    """Share of rows that equal a training row in every column (numbers as float32)."""
    return float(row_keys(rows, roles).isin(row_keys(train, roles)).mean())


def row_keys(table: pd.DataFrame, roles: Roles) -> pd.Series:
    """A 64-bit hash per row; equal rows have equal hashes."""
    values = {c: numbers(table[c]).astype(np.float32) + np.float32(0) for c in roles.numerical}  # −0 becomes 0
    values |= {c: strings(table[c]).astype(object).fillna(MISSING).to_numpy() for c in roles.categorical}
    columns = [values[c] for c in sorted(values)]
    return pd.util.hash_pandas_object(pd.DataFrame(dict(enumerate(columns))), index=False)
