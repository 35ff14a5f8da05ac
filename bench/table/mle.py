"""Machine-learning efficiency (MLE): XGBoost trained on synthetic rows, tested on real ones.

As in the papers, 36 hyperparameter settings are compared on a validation set, a ninth of the synthetic rows. Two
scores:

- `score`: the test score of the setting with the best validation AUC (or smallest validation error).
- `official`: that of the papers' code. It selects settings by five validation criteria (regression: two) and reports
  the best test score among them; it does not take the logarithm of the validation target; and it scales all numerical
  columns by the minimum and maximum of the first one (`_official_scale`).

Boosting adds trees one by one, so the settings with 10 and 50 trees are the first trees of the one with 100, and 12
fits give all 36 settings. Trees depend only on the order of values, so the official scaling needs separate fits only
where its logarithm merges values.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from .columns import Roles, numbers, strings
from .metrics import model_features

GRID = {"gamma": (0.0, 1.0), "max_depth": (5, 10, 20), "min_child_weight": (1, 10), "n_estimators": (10, 50, 100)}
FAST = {"gamma": (0.0,), "max_depth": (5, 10), "min_child_weight": (10,), "n_estimators": (50, 100)}
LOG_RANGE = (1.0, 20_000.0)  # the papers clip regression targets to this range and take the logarithm


@dataclasses.dataclass(frozen=True)
class Mle:
    """AUC (higher is better) or RMSE (lower is better) on the real test rows."""

    metric: str
    score: float
    official: float
    setting: dict[str, float]
    settings: int
    log_target: bool = False


def mle(
    synth: pd.DataFrame,
    test: pd.DataFrame,
    roles: Roles,
    grid: str = "official",
    seed: int = 0,
    log_target: bool | None = None,
    threads: int | None = None,
) -> Mle:
    """Fit on `synth`, score on `test`.

    Args:
        grid: "official", or "fast" for 4 settings, whose score is not comparable with published ones.
        log_target: RMSE of the logarithm of the target clipped to [1, 20000]; default: if the target in the test rows
            is not negative and reaches 100, as in the papers' sets.
        threads: of XGBoost; default all.

    Raises:
        ValueError: no target, too few rows with a value of it, or a single class.
    """
    if grid not in ("official", "fast"):
        raise ValueError(f"grid {grid!r} is neither official nor fast")
    if roles.target is None:
        raise ValueError("machine-learning efficiency needs a target column")
    synth, test = (t[t[roles.target].notna()] for t in (synth, test))
    if len(synth) < 18 or not len(test):
        raise ValueError(f"target {roles.target!r}: too few rows with a value to train and test on")
    train, val = _split(len(synth), seed)
    fit = _regression if roles.task == "regression" else _classification
    x, x_test = (model_features(t, synth, roles, leave_out=(roles.target,)) for t in (synth, test))
    settings = FAST if grid == "fast" else GRID
    if roles.task == "regression":
        y, y_test = numbers(synth[roles.target]), numbers(test[roles.target])
        if log_target is None:
            log_target = bool(y_test.min() >= 0 and y_test.max() >= 100)
        data = _Data(x, y, x_test, y_test, train, val, threads, log_target)
    else:
        levels = pd.Index(sorted(set(strings(synth[roles.target]))))
        y, y_test = levels.get_indexer(strings(synth[roles.target])), levels.get_indexer(strings(test[roles.target]))
        if len(set(y[train])) < 2:
            raise ValueError(f"target {roles.target!r} has only one value in the synthetic rows")
        data = _Data(x, y, x_test, y_test, train, val, threads, False)
    score, chosen, official = fit(data, settings)
    scaled, scaled_test, merges = _official_scale(x, x_test, synth, test, roles)
    if merges:
        _, _, official = fit(dataclasses.replace(data, x=scaled, x_test=scaled_test), settings)
    metric = "RMSE" if roles.task == "regression" else "AUC"
    tried = int(np.prod([len(v) for v in settings.values()]))
    return Mle(metric, score, official, chosen, tried, bool(log_target))


@dataclasses.dataclass(frozen=True)
class _Data:
    """Features and targets of the synthetic rows and of the test rows; train and val index the former."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    train: np.ndarray
    val: np.ndarray
    threads: int | None
    log_target: bool


def _split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training indices, validation indices), by numpy's legacy generator as in the papers' code."""
    order = np.arange(n)
    np.random.RandomState(seed).shuffle(order)
    return order[n // 9 :], order[: n // 9]


def _fits(
    data: _Data, y: np.ndarray, settings: dict, make: Callable
) -> Iterator[tuple[dict, Callable[[np.ndarray], np.ndarray]]]:
    """(setting, function from features to predictions) of every setting, in the order of scikit-learn's grid."""
    trees = settings["n_estimators"]
    for gamma, depth, weight in itertools.product(*(settings[k] for k in list(settings)[:3])):
        model = make(
            n_estimators=max(trees),
            gamma=gamma,
            max_depth=depth,
            min_child_weight=weight,
            tree_method="hist",
            n_jobs=data.threads,
        ).fit(data.x[data.train], y[data.train])
        for count in trees:
            setting = {"gamma": gamma, "max_depth": depth, "min_child_weight": weight, "n_estimators": count}
            yield setting, lambda x, model=model, count=count: _output(model, x, count)


def _output(model: Any, x: np.ndarray, count: int) -> np.ndarray:
    predict = getattr(model, "predict_proba", None) or model.predict
    return predict(x, iteration_range=(0, count))


def _classification(data: _Data, settings: dict) -> tuple[float, dict, float]:
    from xgboost import XGBClassifier

    # XGBoost wants labels 0 … k − 1, so classes without a training row get −1
    present = np.unique(data.y[data.train])
    place = np.full(data.y.max() + 1, -1)
    place[present] = np.arange(len(present))
    y = place[data.y]
    y_test = np.where(data.y_test >= 0, place[data.y_test], -1)
    val = data.val[y[data.val] >= 0]
    rows, tests = [], []
    for setting, output in _fits(data, y, settings, XGBClassifier):
        rows.append({"setting": setting, **_criteria(y[val], output(data.x[val]))})
        tests.append(auc(y_test, output(data.x_test)))
    table = pd.DataFrame(rows)
    best = {c: int(table[c].fillna(-1.0).idxmax()) for c in ("f1", "weighted_f1", "auc", "accuracy", "average")}
    return tests[best["auc"]], rows[best["auc"]]["setting"], max(tests[i] for i in best.values())


def auc(y: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve; the mean over classes, each against the rest, with more than two. A label of −1
    belongs to no class. NaN if no class has both rows in it and rows outside."""
    from sklearn.metrics import roc_auc_score

    classes = [1] if probabilities.shape[1] == 2 and (y >= 0).all() else range(probabilities.shape[1])
    scores = [roc_auc_score(y == k, probabilities[:, k]) for k in classes if 0 < (y == k).sum() < len(y)]
    return float(np.mean(scores)) if scores else float("nan")


def _criteria(y: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """The five criteria of the official selection, of true labels and predicted probabilities (N, k)."""
    guess = probabilities.argmax(1)
    classes = np.union1d(y, guess)
    hits = np.array([((guess == k) & (y == k)).sum() for k in classes])
    true, predicted = (np.array([(v == k).sum() for k in classes]) for v in (y, guess))
    f1 = 2 * hits / np.maximum(true + predicted, 1)
    weighted = float((f1 * (1 - true / len(y))).sum() / max(len(classes) - 1, 1))
    plain = float(f1[classes == 1].sum()) if probabilities.shape[1] == 2 else float(f1.mean())
    area = auc(y, probabilities)
    return {
        "f1": plain,
        "weighted_f1": weighted,
        "auc": area,
        "accuracy": float((guess == y).mean()),
        "average": float(np.mean([plain, weighted, area])),
    }


def _regression(data: _Data, settings: dict) -> tuple[float, dict, float]:
    from xgboost import XGBRegressor

    def scale(y: np.ndarray) -> np.ndarray:
        return np.log(np.clip(y, *LOG_RANGE)) if data.log_target else y

    def rmse(truth: np.ndarray, guess: np.ndarray) -> float:
        return float(np.sqrt(np.mean((truth - guess) ** 2)))

    y, y_test = scale(data.y), scale(data.y_test)
    rows = []
    for setting, output in _fits(data, y, settings, XGBRegressor):
        guess = output(data.x[data.val])
        validation, test = rmse(y[data.val], guess), rmse(y_test, output(data.x_test))
        official = rmse(data.y[data.val], guess)  # the official code compares logarithms with the raw target
        rows.append((setting, validation, official, test))
    best = min(rows, key=lambda row: row[1])
    # the two official criteria, R² and RMSE, order the settings in the same way
    return best[3], best[0], min(rows, key=lambda row: row[2])[3]


def _official_scale(
    x: np.ndarray, x_test: np.ndarray, synth: pd.DataFrame, test: pd.DataFrame, roles: Roles
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(features, test features, whether trees can differ) with the scaling of the papers' code.

    Going through the columns in table order, that code keeps the first minimum and maximum that are not zero for all
    columns and both tables, and takes the logarithm of a column once that minimum is ≥ 0 and the maximum ≥ 1000.
    """
    place = {c: i for i, c in enumerate(c for c in roles.numerical if c != roles.target)}
    low = high = 0.0
    scaled = []
    for features, table in ((x, synth), (x_test, test)):
        features = features.copy()
        for column in (c for c in table.columns if c in place):
            values = features[:, place[column]]
            low, high = low or float(np.nanmin(values)), high or float(np.nanmax(values))
            if low >= 0 and high >= 1e3:
                features[:, place[column]] = np.log(np.maximum(values, 1e-2))
        scaled.append(features)
    # the rest of the official scaling is linear and the same for both tables, which does not change trees
    changed = not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(scaled, (x, x_test), strict=True))
    return *scaled, changed
