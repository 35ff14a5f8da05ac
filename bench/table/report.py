"""`anystate table report`: one page that says how good a synthetic table is, beside tables of known worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from ...train.data.table_sets import SETS
from .baselines import gaussian_copula, independent, known, resample
from .charts import association_map, associations, marginal
from .columns import Roles, check_tables, load_schema, numbers, read_table, roles_of
from .metrics import Density, density, detection, precision_recall, privacy
from .mle import mle

COLUMNS_SHOWN = 60  # charts on the page; the worst columns where there are more
MAP_COLUMNS = 80
PAIRS_SHOWN = 12
MEANING = {
    "Shape": "Each column on its own: do its values have the right frequencies? 100 is a perfect match.",
    "Trend": "Each pair of columns: do they go together as in the real table? 100 is a perfect match.",
    "MLE": "A model loss_mask to predict the target from the synthetic rows and is tested on real ones. Settings are "
    "chosen on synthetic rows, never on the test rows.",
    "MLE, official pick": "The same with the papers' code, which keeps the best of its settings on the test rows: a "
    "little flattering, for comparison with published numbers.",
    "Detection, linear": "Can a linear classifier tell synthetic from real rows? 100: not at all. 0: always.",
    "Detection, trees": "The same with gradient-boosted trees, which see far more. Few generators score high here.",
    "α-precision": "Do synthetic rows look like typical real rows? 100 is as typical as the real rows themselves.",
    "β-recall": "Are all kinds of real rows covered? About 50 is what fresh real rows get; more means rows that "
    "follow single training rows closely.",
    "Exact copies": "Synthetic rows that equal a training row in every column. Real rows never seen have some too.",
    "Distance to closest record": "Median distance to the nearest training row (a differing category or the full "
    "range of a number counts 1). Below that of unseen real rows, the table follows its training rows too closely.",
    "Closer to training": "Synthetic rows whose closest real row is a training row. Fresh rows get the share that "
    "training rows have among the real ones; copies get 100.",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One score of the page, as a number to show for each table, and whether it warns."""

    name: str
    cells: list[str]
    warns: bool = False

    @property
    def meaning(self) -> str:
        return MEANING[self.name.split(" (")[0]]


def report(
    real: pd.DataFrame | Path | str,
    synth: pd.DataFrame | Path | str,
    test: pd.DataFrame | Path | str | None = None,
    out: Path | str = "report.html",
    schema: Mapping | Path | str | None = None,
    target: str | None = None,
    fast: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Write the page to `out` and return the scores (shares, not percent). `real` are the rows that the generator was
    trained on; `test`, real rows that it never saw, add MLE and the level of privacy that copies nothing. `fast` fits 4
    settings instead of 36 for MLE. Without a schema, the sets of the literature are recognized."""
    settings = load_schema(schema)
    tables = {
        name: read_table(table, settings) if isinstance(table, (str, Path)) else table
        for name, table in (("real", real), ("synth", synth), ("test", test))
    }
    real, synth, test = tables["real"], tables["synth"], tables["test"]
    check_tables(Roles((), ()), **tables)
    notes = []
    if not settings and (name := recognize(real)):
        settings = set_schema(name, real)
        notes.append(f"Recognized as {SETS[name].title}; the columns have their roles of the literature.")
    roles = roles_of(real, settings, target)
    tables = {k: t if t is None else _narrowed(t, roles, k) for k, t in tables.items()}
    real, synth, test = tables["real"], tables["synth"], tables["test"]
    check_tables(roles, **tables)
    found = density(real, synth, roles)
    notes += _notes(real, synth, roles, found, settings)
    yardsticks, measured = _yardsticks(real, roles, len(synth), seed)
    if not measured and abs(len(synth) / len(real) - 1) > 0.1:
        notes.append(
            f"The yardsticks are for {len(real):,} synthetic rows; {len(synth):,} rows have another noise, and "
            "fewer rows score lower."
        )
    lines, scores = _scores(tables, roles, found, yardsticks, fast, seed, notes)
    columns = sorted(roles.columns, key=lambda c: (math.isnan(found.columns[c]), found.columns[c]))
    mapped = columns if len(columns) <= MAP_COLUMNS else columns[:MAP_COLUMNS]
    mapped = [c for c in roles.columns if c in set(mapped)]
    matrices = [associations(t, roles, mapped, seed) for t in (real, synth)]
    page = {
        "title": settings.get("name") or "Synthetic table",
        "rows": {k: len(t) for k, t in tables.items() if t is not None},
        "roles": roles,
        "lines": lines,
        "measured": measured,
        "notes": notes,
        "cards": [
            (c, found.columns[c], Markup(marginal(real[c], synth[c], c in roles.numerical)))
            for c in columns[:COLUMNS_SHOWN]
        ],
        "all_columns": [(c, found.columns[c]) for c in columns],
        "maps": [
            (title, Markup(association_map(matrix, mapped, title, scale)))
            for title, matrix, scale in (
                ("Real", matrices[0], 1.0),
                ("Synthetic", matrices[1], 1.0),
                ("Synthetic − real (colours × 3)", matrices[1] - matrices[0], 1 / 3),
            )
        ],
        "mapped": len(mapped),
        "pairs": sorted(((v, a, b) for (a, b), v in found.pairs.items() if not math.isnan(v)))[:PAIRS_SHOWN],
    }
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(templates.get_template("report.html").render(page), encoding="utf-8")
    return scores


def _narrowed(table: pd.DataFrame, roles: Roles, name: str) -> pd.DataFrame:
    """The columns that have a role, numbers first."""
    missing = [c for c in roles.columns if c not in table.columns]
    if missing:
        raise ValueError(f"the {name} table lacks column {missing[0]!r}")
    return table[roles.columns]


def recognize(real: pd.DataFrame) -> str | None:
    """The set of the literature that a table is the training part of, by its columns and number of rows."""
    for name, source in SETS.items():
        named = {*source.categorical, source.target, *(source.columns or ())}
        if len(real) == source.rows[0] and named <= set(real.columns):
            return name
    return None


def set_schema(name: str, real: pd.DataFrame) -> dict:
    source = SETS[name]
    numerical = [c for c in real.columns if c not in source.categorical and c != source.target]
    return {
        "name": name,
        "task": source.task,
        "target": source.target,
        "numerical": numerical,
        "categorical": list(source.categorical),
    }


def _yardsticks(real: pd.DataFrame, roles: Roles, rows: int, seed: int) -> tuple[dict[str, dict], bool]:
    """{yardstick: {score: "mean ± sd"}} from the golden file for a known set, else measured now. True if measured."""
    given = known(roles.name) if roles.name in SETS and len(real) == SETS[roles.name].rows[0] else {}
    names = ("fresh_rows_estimate", "resample", "independent_columns", "gaussian_copula_empirical")
    if given:
        result = {}
        for name in names:
            found = given.get(name, {})
            result[name] = {k: _golden(found[k], k) for k in ("shape", "trend", "mle_auc") if k in found}
        return result, False
    rng = np.random.default_rng(seed)
    made = {
        "resample": resample(real, rows, rng),
        "independent_columns": independent(real, rows, rng),
        "gaussian_copula_empirical": gaussian_copula(real, roles, rows, rng),
    }
    result = {"fresh_rows_estimate": {}}
    for name, table in made.items():
        got = density(real, table, roles)
        result[name] = {"shape": _percent(got.shape, 2), "trend": _percent(got.trend, 2)}
    return result, True


def _golden(entry: dict, score: str) -> str:
    places = 4 if score == "mle_auc" else 2
    spread = f" ± {entry['sd']:.{places}f}" if entry.get("sd") else ""
    return f"{entry['mean']:.{places}f}{spread}"


def _scores(
    tables: dict, roles: Roles, found: Density, yardsticks: dict, fast: bool, seed: int, notes: list[str]
) -> tuple[list[Line], dict[str, float]]:
    """Lines of the table of scores: this table, fresh real rows, resampled, independent columns, Gaussian copula."""
    real, synth, test = tables["real"], tables["synth"], tables["test"]

    def beside(score: str, fresh: str | None = None) -> list[str]:
        cells = [yardsticks[name].get(score, "–") for name in yardsticks]
        return [fresh, *cells[1:]] if fresh is not None else cells

    lines = [
        Line("Shape", [_percent(found.shape, 2), *beside("shape")]),
        Line("Trend", [_percent(found.trend, 2), *beside("trend")]),
    ]
    scores = {"shape": found.shape, "trend": found.trend}

    def attempt(what: str, work):
        """A score that a table cannot have (too few rows, one class) becomes a note instead of a failure."""
        try:
            return work()
        except ValueError as error:
            notes.append(f"{what}: {error}.")
            return None

    grid = "fast" if fast else "official"
    if test is not None and roles.target:
        got = attempt("No MLE", lambda: mle(synth, test, roles, grid, seed))
        if got:
            best = attempt("No MLE of the real rows", lambda: mle(real, test, roles, grid, seed))
            suffix = f" ({'AUC' if got.metric == 'AUC' else 'RMSE of log' if got.log_target else 'RMSE'})"
            ours, theirs = ((f"{m.score:.4f}", f"{m.official:.4f}") if m else ("–", "–") for m in (got, best))
            lines.append(Line("MLE" + suffix, [ours[0], theirs[0] + " *", "–", "–", "–"]))
            official = [*beside("mle_auc")[1:]] if got.metric == "AUC" and not fast else ["–"] * 3
            lines.append(Line("MLE, official pick" + suffix, [ours[1], theirs[1] + " *", *official]))
            scores |= {"mle": got.score, "mle_official": got.official}
    elif roles.target:
        notes.append("No MLE: it needs real test rows (--test).")

    def compared(work):
        """The score of the synthetic rows and that of the test rows, which the generator never saw."""
        return work(synth), work(test) if test is not None else None

    got = attempt("No detection", lambda: compared(lambda t: detection(real, t, roles, seed)))
    if got:
        for key, name in (("logistic", "Detection, linear"), ("xgboost", "Detection, trees")):
            fresh = _percent(getattr(got[1], key), 1) if got[1] else "–"
            lines.append(Line(name, [_percent(getattr(got[0], key), 1), fresh, "–", "–", "–"]))
            scores[f"detection_{key}"] = getattr(got[0], key)
    got = attempt("No α-precision", lambda: compared(lambda t: precision_recall(real, t, roles, seed)))
    if got:
        for key, name in (("alpha_precision", "α-precision"), ("beta_recall", "β-recall")):
            fresh = _percent(getattr(got[1], key), 1) if got[1] else "–"
            lines.append(Line(name, [_percent(getattr(got[0], key), 1), fresh, "–", "–", "–"]))
            scores[key] = getattr(got[0], key)
    lines += _privacy_lines(real, synth, test, roles, seed, scores)
    return lines, scores


def _privacy_lines(real, synth, test, roles: Roles, seed: int, scores: dict[str, float]) -> list[Line]:
    got = privacy(real, synth, roles, test, seed)
    scores |= {k: v for k, v in dataclasses.asdict(got).items() if v is not None}
    held = test is not None
    rest = ["–", "–", "–"]
    # one row more than the holdout's share is chance: three standard errors are not
    noise = 3 * math.sqrt(max(got.holdout_copies or 0, 1 / len(synth)) / len(synth)) if held else 0
    lines = [
        Line(
            "Exact copies",
            [_percent(got.copies, 2), _percent(got.holdout_copies, 2) if held else "–", *rest],
            held and got.copies > got.holdout_copies + noise,
        ),
        Line(
            "Distance to closest record",
            [f"{got.median_dcr:.3f}", f"{got.holdout_median_dcr:.3f}" if held else "–", *rest],
            held and got.median_dcr < 0.8 * got.holdout_median_dcr,
        ),
    ]
    if held:
        error = math.sqrt(got.closer_expected * (1 - got.closer_expected) / min(len(synth), len(test), 10_000))
        cells = [_percent(got.closer_to_train, 1), _percent(got.closer_expected, 1), *rest]
        lines.append(Line("Closer to training", cells, got.closer_to_train > got.closer_expected + 4 * error))
    return lines


def _notes(real: pd.DataFrame, synth: pd.DataFrame, roles: Roles, found: Density, settings: dict) -> list[str]:
    """What a reader must know about these tables before trusting a mean."""
    notes = []
    if settings.get("partial"):
        notes.append("This set is a part of the published one: never compare its numbers with published ones.")
    endless = [c for c in roles.numerical for t in (real, synth) if pd.api.types.is_numeric_dtype(t[c])
               and np.isinf(t[c].to_numpy(float, na_value=np.nan)).any()]  # fmt: skip
    if endless:
        notes.append(f"Infinite values count as missing: {_list(dict.fromkeys(endless))}.")
    constant = [c for c in roles.numerical if len(np.unique(v := numbers(real[c]))) == 1 and not np.isnan(v).any()]
    if constant:
        notes.append(f"Constant in the real table, so without correlation and not in Trend: {_list(constant)}.")
    empty = [c for c in roles.columns if math.isnan(found.columns[c])]
    if empty:
        notes.append(f"Without a value in one of the tables, so not in Shape: {_list(empty)}.")
    lost = {}
    for column in roles.numerical:
        a, b = numbers(real[column]), numbers(synth[column])
        if np.isnan(a).all() or np.isnan(b).all():
            continue
        span = np.nanmax(a) - np.nanmin(a)
        if span > 0 and not 0.9 < (np.nanmax(b) - np.nanmin(b)) / span < 1.1:
            lost[column] = (np.nanmax(b) - np.nanmin(b)) / span
    if lost and roles.categorical:
        notes.append(
            "Trend cuts each table's numbers by its own range, so another range costs points: "
            + _list([f"{c} ({v:.0%} of the real range)" for c, v in lost.items()])
            + "."
        )
    return notes


def _list(names, shown: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _percent(share: float | None, places: int) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.{places}f}"
