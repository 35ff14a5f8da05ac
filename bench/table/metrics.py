"""How near a synthetic table is to a real one: Shape, Trend, detection, α-precision and β-recall, privacy.

Shape and Trend equal sdmetrics 0.11.1, the version of the published numbers (later versions leave out weakly related
pairs unless both thresholds are 0). They are computed here rather than by sdmetrics because that is slow on many
columns and samples rows above 50,000; tests hold every column and pair to sdmetrics and the means to the yardsticks.
All scores are in [0, 1].
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd

from .columns import MISSING, Encoded, Features, Roles, codes, numbers, words

BINS = 10  # of a number that meets a category in Trend
DECIMALS = 14  # sdmetrics rounds numbers to these before the Kolmogorov–Smirnov statistic
BLOCK = 2048  # rows of a distance block
TIES = 1e-9  # distances this near are equal
RECORDS = 50_000  # real rows that distances are taken to, at most


@dataclasses.dataclass(frozen=True)
class Density:
    """Shape and Trend; NaN scores (a constant number has no correlation) do not enter the means."""

    shape: float
    trend: float
    columns: dict[str, float]
    pairs: dict[tuple[str, str], float]


def density(real: pd.DataFrame, synth: pd.DataFrame, roles: Roles) -> Density:
    """Shape: mean over columns of 1 − Kolmogorov–Smirnov (numbers) or 1 − total variation (categories).
    Trend: mean over pairs of 1 − |Δ Pearson|/2 (two numbers) or 1 − total variation of the contingency tables, where a
    number is cut into ten equal bins of each table's own range."""
    number = {c: (numbers(real[c]), numbers(synth[c])) for c in roles.numerical}
    level = {c: codes(real[c], synth[c]).codes for c in roles.categorical}
    columns = {c: ks_complement(*number[c]) for c in roles.numerical}
    columns |= {c: tv_complement(*(v[v >= 0] for v in level[c])) for c in roles.categorical}

    binned = {c: tuple(_binned(v) for v in pair) for c, pair in number.items()} if roles.categorical else {}
    cells = {**binned, **{c: tuple(v + 1 for v in pair) for c, pair in level.items()}}
    pairs = _correlation_pairs(number)
    for a, b in itertools.combinations(roles.columns, 2):
        if (a, b) not in pairs:
            pairs[a, b] = tv_complement(*_joint(cells[a], cells[b]))
    return Density(_mean(columns), _mean(pairs), columns, pairs)


def ks_complement(real: np.ndarray, synth: np.ndarray) -> float:
    """1 − largest gap between the two empirical distribution functions; NaN if either has no values."""
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


def _correlation_pairs(number: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[tuple[str, str], float]:
    real, synth = (correlations({c: pair[i] for c, pair in number.items()}) for i in (0, 1))
    return {
        (a, b): 1.0 - float(abs(real[i, j] - synth[i, j])) / 2
        for (i, a), (j, b) in itertools.combinations(enumerate(number), 2)
    }


def _binned(values: np.ndarray) -> np.ndarray:
    """Bins 0 … 11 of the table's own range; the maximum and missing values share the last, as in sdmetrics."""
    return np.digitize(values, np.histogram_bin_edges(values[~np.isnan(values)], BINS))


def _joint(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    width = int(max(part.max(initial=0) for part in b)) + 1
    return tuple(x.astype(np.int64) * width + y for x, y in zip(a, b, strict=True))


def _mean(scores: dict) -> float:
    known = [s for s in scores.values() if not np.isnan(s)]
    return float(np.mean(known)) if known else float("nan")


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
    """Classifier two-sample test, cross-validated: logistic regression (as sdmetrics' LogisticDetection: means for
    missing numbers, robust scaling, one-hot categories) and XGBoost. Tables are cut to equal size, at most `limit`."""
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
    """Raw numbers (NaN where missing) and one-hot categories, whose levels come from the second table."""
    parts = [numbers(table[c]).astype(np.float32) for c in roles.numerical if c not in leave_out]
    for column in roles.categorical:
        if column in leave_out:
            continue
        levels = words(levels_from[column]).fillna(MISSING).value_counts().index
        found = levels.get_indexer(words(table[column]).fillna(MISSING))
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
    """Integrated α-precision and β-recall of Alaa et al. 2022 (arXiv 2102.08921), on quantiles and one-hot categories
    instead of a learned embedding.

    The α-support of a table is the ball about its mean that holds a share α of its rows. P_α is the share of synthetic
    rows inside the real α-support. R_β is the share of real rows whose nearest synthetic row lies in the synthetic
    β-support (measured among such nearest rows, as the authors' code does) and is no farther than the nearest other
    real row. Each score is 1 − Σ|curve − level| / Σ level, 1 when the curve is the diagonal.
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
    """Distance to, and index of, the nearest row of `among` for every query; memory is two blocks of rows.
    `skip_self`: the two are the same table, and a row is not its own neighbour."""
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
    distance[distance < 1e-6] = 0.0  # what rounding leaves of the distance of equal points
    return distance, index


@dataclasses.dataclass(frozen=True)
class Privacy:
    """Copies are rows equal in every column. DCR is the distance to the closest record.

    The `holdout_*` fields are what real rows the model never saw get: the level that copies nothing. closer_to_train is
    the share of synthetic rows whose closest real row is a training row rather than a holdout row. Fresh rows get
    closer_expected, the share of training rows among the real ones (rows are exchangeable); copies get 1.
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
    RECORDS real rows of each table."""
    rng = np.random.default_rng(seed)
    features = Features(roles, train)

    def some(table: pd.DataFrame, most: int) -> Encoded:
        return features.table(table.iloc[rng.permutation(len(table))[:most]])

    queries, known = some(synth, limit), some(train, RECORDS)
    to_train, _ = nearest(queries, known)
    copies, middle = copied(train, synth, roles), float(np.median(to_train))
    if holdout is None:
        return Privacy(copies, middle)
    unseen = some(holdout, RECORDS)
    to_holdout, _ = nearest(queries, unseen)
    apart, _ = nearest(unseen.take(np.arange(min(limit, len(unseen)))), known)
    share = len(known) / (len(known) + len(unseen))
    return Privacy(
        copies,
        middle,
        copied(train, holdout, roles),
        float(np.median(apart)),
        float(((to_train < to_holdout) + share * (to_train == to_holdout)).mean()),
        share,
    )


def copied(train: pd.DataFrame, rows: pd.DataFrame, roles: Roles) -> float:
    """Share of rows that stand in the training table, every column equal (numbers as float32)."""
    return float(row_keys(rows, roles).isin(row_keys(train, roles)).mean())


def row_keys(table: pd.DataFrame, roles: Roles) -> pd.Series:
    """A 64-bit key per row; equal rows have equal keys."""
    plain = {c: numbers(table[c]).astype(np.float32) + np.float32(0) for c in roles.numerical}
    plain |= {c: words(table[c]).astype(object).fillna(MISSING).to_numpy() for c in roles.categorical}
    columns = [plain[c] for c in sorted(plain)]
    return pd.util.hash_pandas_object(pd.DataFrame(dict(enumerate(columns))), index=False)
