"""The table of scores on the report: the synthetic rows beside real rows and baselines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pandas as pd

from .columns import Roles
from .metrics import Density, detection, precision_recall, privacy
from .mle import Mle, mle

MEANING = {
    "Shape": "Each column on its own: do its values have the right frequencies? 100 is a perfect match.",
    "Trend": "Each pair of columns: are they related as in the real table? 100 is a perfect match.",
    "MLE": "A model is trained on the synthetic rows to predict the target, and tested on real rows. Its settings are "
    "selected on synthetic rows, never on the test rows.",
    "MLE, official pick": "The same with the papers' code, which keeps the best of its settings on the test rows: "
    "slightly optimistic, for comparison with published numbers.",
    "Detection, linear": "Can a linear classifier tell synthetic from real rows? 100: not at all. 0: always.",
    "Detection, trees": "The same with gradient-boosted trees, which detect far more. Few generators score high here.",
    "α-precision": "Do synthetic rows look like typical real rows? 100 is as typical as the real rows themselves.",
    "β-recall": "Are all kinds of real rows covered? New real rows get about 50; more means rows that follow single "
    "training rows closely.",
    "Exact copies": "Synthetic rows that equal a training row in every column. Held-out real rows have some too.",
    "Distance to closest record": "Median distance to the nearest training row (two different categories, or the full "
    "range of a number, count 1). Below that of held-out real rows, the table follows its training rows too closely.",
    "Closer to training": "Synthetic rows whose closest real row is a training row. New rows get the share that "
    "training rows have among the real ones; copies get 100.",
}
NONE = "–"


@dataclasses.dataclass(frozen=True)
class Line:
    """One score of the page, as the text of each table's cell; `warns` marks signs of copied training rows."""

    name: str
    cells: list[str]
    warns: bool = False

    @property
    def meaning(self) -> str:
        return MEANING[self.name.split(" (")[0]]


def score_lines(
    tables: dict[str, pd.DataFrame | None],
    roles: Roles,
    found: Density,
    baselines: dict[str, dict[str, str]],
    fast: bool,
    seed: int,
    notes: list[str],
) -> tuple[list[Line], dict[str, float]]:
    """(lines, {score: value}) of the tables "real", "synth" and "test".

    The cells of a line are those of the synthetic rows and of the baselines. A score that these tables cannot have (too
    few rows, a single class) is left out and mentioned in `notes`.
    """
    lines = [
        Line("Shape", [percent(found.shape, 2), *_cells(baselines, "shape")]),
        Line("Trend", [percent(found.trend, 2), *_cells(baselines, "trend")]),
    ]
    scores = {"shape": found.shape, "trend": found.trend}
    if tables["test"] is None and roles.target:
        notes.append("No MLE: it needs real test rows (--test).")
    elif roles.target:
        lines += _mle_lines(tables, roles, baselines, fast, seed, notes, scores)
    names = {"logistic": "Detection, linear", "xgboost": "Detection, trees"}
    lines += _compared("No detection", detection, names, "detection_", tables, roles, seed, notes, scores)
    names = {"alpha_precision": "α-precision", "beta_recall": "β-recall"}
    lines += _compared("No α-precision", precision_recall, names, "", tables, roles, seed, notes, scores)
    return lines + _privacy_lines(tables, roles, seed, scores), scores


def _cells(baselines: dict[str, dict[str, str]], score: str) -> list[str]:
    return [cells.get(score, NONE) for cells in baselines.values()]


def _mle_lines(
    tables: dict[str, pd.DataFrame],
    roles: Roles,
    baselines: dict[str, dict[str, str]],
    fast: bool,
    seed: int,
    notes: list[str],
    scores: dict[str, float],
) -> list[Line]:
    """MLE of the synthetic rows, and of the real rows in the place of new real rows."""
    grid = "fast" if fast else "official"
    found: list[Mle | None] = []
    for table, note in (("synth", "No MLE"), ("real", "No MLE of the real rows")):
        try:
            found.append(mle(tables[table], tables["test"], roles, grid, seed))
        except ValueError as error:
            notes.append(f"{note}: {error}.")
            if table == "synth":
                return []
            found.append(None)
    synth, real = found
    metric = "AUC" if synth.metric == "AUC" else "RMSE of log" if synth.log_target else "RMSE"
    real_cells = [NONE, NONE] if real is None else [f"{real.score:.4f}", f"{real.official:.4f}"]
    official = _cells(baselines, "mle_auc")[1:] if synth.metric == "AUC" and not fast else [NONE] * 3
    scores |= {"mle": synth.score, "mle_official": synth.official}
    return [
        Line(f"MLE ({metric})", [f"{synth.score:.4f}", f"{real_cells[0]} *", NONE, NONE, NONE]),
        Line(f"MLE, official pick ({metric})", [f"{synth.official:.4f}", f"{real_cells[1]} *", *official]),
    ]


def _compared(
    note: str,
    metric: Callable,
    names: dict[str, str],
    prefix: str,
    tables: dict[str, pd.DataFrame | None],
    roles: Roles,
    seed: int,
    notes: list[str],
    scores: dict[str, float],
) -> list[Line]:
    """The lines `names` {attribute: name} of a metric, of the synthetic rows and of the test rows."""
    real, test = tables["real"], tables["test"]
    try:
        synth_scores = metric(real, tables["synth"], roles, seed)
        test_scores = None if test is None else metric(real, test, roles, seed)
    except ValueError as error:
        notes.append(f"{note}: {error}.")
        return []
    lines = []
    for key, name in names.items():
        scores[prefix + key] = getattr(synth_scores, key)
        of_test = NONE if test_scores is None else percent(getattr(test_scores, key), 1)
        lines.append(Line(name, [percent(scores[prefix + key], 1), of_test, NONE, NONE, NONE]))
    return lines


def _privacy_lines(
    tables: dict[str, pd.DataFrame | None], roles: Roles, seed: int, scores: dict[str, float]
) -> list[Line]:
    """Lines of the privacy scores; they warn where the synthetic rows differ significantly from the test rows."""
    synth, test = tables["synth"], tables["test"]
    got = privacy(tables["real"], synth, roles, test, seed)
    scores |= {k: v for k, v in dataclasses.asdict(got).items() if v is not None}
    if test is None:
        return [
            Line("Exact copies", [percent(got.copies, 2), *[NONE] * 4]),
            Line("Distance to closest record", [f"{got.median_dcr:.3f}", *[NONE] * 4]),
        ]
    copies_error = math.sqrt(max(got.holdout_copies, 1 / len(synth)) / len(synth))
    closer_error = math.sqrt(got.closer_expected * (1 - got.closer_expected) / min(len(synth), len(test), 10_000))
    return [
        Line(
            "Exact copies",
            [percent(got.copies, 2), percent(got.holdout_copies, 2), NONE, NONE, NONE],
            got.copies > got.holdout_copies + 3 * copies_error,
        ),
        Line(
            "Distance to closest record",
            [f"{got.median_dcr:.3f}", f"{got.holdout_median_dcr:.3f}", NONE, NONE, NONE],
            got.median_dcr < 0.8 * got.holdout_median_dcr,
        ),
        Line(
            "Closer to training",
            [percent(got.closer_to_train, 1), percent(got.closer_expected, 1), NONE, NONE, NONE],
            got.closer_to_train > got.closer_expected + 4 * closer_error,
        ),
    ]


def percent(share: float | None, decimals: int) -> str:
    """A share in percent, or a dash for None and NaN."""
    return NONE if share is None or math.isnan(share) else f"{100 * share:.{decimals}f}"
