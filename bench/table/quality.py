"""`anystate bench table --quality`: scores of recipes on sets, printed as the paper's Tables 2 and 3 with ours below.

Finished runs are saved in a JSON file, so that the same command continues where it stopped. The synthetic rows are
saved beside it: without XGBoost the MLE is left out, and the same command on a machine with XGBoost adds it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from ...model.codecs.table.files import read_table
from ...model.codecs.table.schema import Schema
from ...model.provenance import provenance
from ...model.storage import atomic_write
from .baselines import published_baselines
from .columns import check_tables, roles_of
from .metrics import copied, density
from .mle import mle
from .sets import find_set, read_set

PUBLISHED = Path(__file__).with_name("published.yaml")


class Synthesize(Protocol):
    """Fits a recipe on the training rows and samples n rows; returns (rows, number of parameters, NFE)."""

    def __call__(
        self, train: pd.DataFrame, schema: Schema, recipe: str, seed: int, n: int
    ) -> tuple[pd.DataFrame, int, int]: ...


@dataclasses.dataclass(frozen=True)
class QualityResult:
    """The scores of one run, in [0, 1].

    Args:
        grid: of MLE, "official" or "fast".
        mle, mle_official: see `mle`; NaN if they are not computed yet.
        holdout_copies: copies of training rows among the test rows, for reference.
        evaluations: NFE per row.
        seconds: of fitting and sampling.
    """

    set: str
    recipe: str
    seed: int
    grid: str
    shape: float
    trend: float
    mle: float
    mle_official: float
    metric: str
    copies: float
    holdout_copies: float
    parameters: int
    evaluations: int
    seconds: float
    origin: dict = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.set, self.recipe, self.seed, self.grid


def quality(
    sets: Iterable[str],
    seeds: Iterable[int],
    recipes: Iterable[str],
    synthesize: Synthesize,
    data: Path | str | None = None,
    out: Path | str = "runs/table_quality.json",
    grid: str = "official",
    console: Console | None = None,
    scored: bool = True,
) -> list[QualityResult]:
    """Compute the runs that the file `out` lacks, then print both tables with all its results of this grid.

    Args:
        data: folder of the sets, default $ANYSTATE_DATA/tabular.
        scored: False leaves out the MLE.

    Raises:
        ValueError: a set that is not there, or a file of something else.
    """
    console, out = console or Console(), Path(out)
    sets = list(sets)
    for name in sets:
        find_set(name, data)
    if grid not in ("official", "fast"):
        raise ValueError(f"grid {grid!r} is neither official nor fast")
    results = read_results(out)
    if scored:
        for i, result in enumerate(results):
            if result.grid == grid and math.isnan(result.mle):
                results[i] = _with_mle(result, data, out)
    write_results(out, results)
    for name, recipe, seed in itertools.product(sets, recipes, seeds):
        if (name, recipe, seed, grid) in {result.key for result in results}:
            continue
        result = run(name, recipe, seed, grid, synthesize, data, out, scored)
        results.append(result)
        write_results(out, results)
        _print(console, result)
    for table in tables([result for result in results if result.grid == grid]):
        console.print(table)
    return results


def _print(console: Console, result: QualityResult) -> None:
    console.print(
        f"{result.set} {result.recipe} seed {result.seed}: Shape {100 * result.shape:.2f}, "
        f"Trend {100 * result.trend:.2f}, {result.metric} {result.mle:.4f}, {result.seconds:.0f} s"
        + (" (no MLE: it needs xgboost)" if math.isnan(result.mle) else ""),
        highlight=False,
    )


def run(
    name: str,
    recipe: str,
    seed: int,
    grid: str,
    synthesize: Synthesize,
    data: Path | str | None,
    out: Path,
    scored: bool = True,
) -> QualityResult:
    """Fit a recipe on a set, sample as many rows as it was trained on, and score them."""
    train, test, schema = _read_set(find_set(name, data))
    roles = roles_of(train, schema)
    began = time.perf_counter()
    synth, parameters, evaluations = synthesize(train, schema, recipe, seed, len(train))
    seconds = time.perf_counter() - began
    check_tables(roles, synthetic=synth)
    scores = density(train, synth, roles)
    result = QualityResult(
        set=name,
        recipe=recipe,
        seed=seed,
        grid=grid,
        shape=scores.shape,
        trend=scores.trend,
        mle=math.nan,
        mle_official=math.nan,
        metric="RMSE" if roles.task == "regression" else "AUC",
        copies=copied(train, synth, roles),
        holdout_copies=copied(train, test, roles),
        parameters=int(parameters),
        evaluations=int(evaluations),
        seconds=round(seconds, 1),
        origin=provenance(),
    )
    file = _synthetic_file(out, result)
    file.parent.mkdir(parents=True, exist_ok=True)
    synth.to_csv(file, index=False)
    return _with_mle(result, data, out, synth) if scored else result


def _with_mle(
    result: QualityResult, data: Path | str | None, out: Path, synth: pd.DataFrame | None = None
) -> QualityResult:
    """The result with its MLE, if there are XGBoost and the synthetic rows."""
    file = _synthetic_file(out, result)
    if importlib.util.find_spec("xgboost") is None or (synth is None and not file.is_file()):
        return result
    train, test, schema = _read_set(find_set(result.set, data))
    synth = read_table(file, text_columns=schema.text_columns) if synth is None else synth
    scores = mle(synth, test, roles_of(train, schema), result.grid, result.seed)
    return dataclasses.replace(result, mle=scores.score, mle_official=scores.official)


def _synthetic_file(out: Path, result: QualityResult) -> Path:
    return out.parent / "synthetic" / f"{result.set}-{result.recipe}-{result.seed}.csv.gz"


_read_set = functools.lru_cache(maxsize=1)(read_set)


def read_results(path: Path) -> list[QualityResult]:
    """The results of a file; [] if there is none."""
    if not path.exists():
        return []
    try:
        return [QualityResult(**row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} does not hold rows of this benchmark: {error}") from None


def write_results(path: Path, results: list[QualityResult]) -> None:
    """Write the results atomically."""
    atomic_write(path, json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")


def published() -> dict:
    """The results of other methods, see published.yaml."""
    return yaml.safe_load(PUBLISHED.read_text())


def tables(results: list[QualityResult]) -> list[Table]:
    """Tables 2 and 3 of the paper: other methods, an estimate for new real rows, then ours (mean ± sd over seeds)."""
    others = published()
    sets = others["sets"] + sorted({result.set for result in results} - set(others["sets"]))
    made = []
    for kind in ("trend", "mle"):
        table = Table(title=others[kind]["title"], title_justify="left", box=None, pad_edge=False)
        table.add_column("method")
        for name in ("parameters", *sets):
            table.add_column(name, justify="right")
        blank = [""] * (len(sets) - len(others["sets"]))
        for entry in others[kind]["rows"]:
            table.add_row(entry["method"], entry["parameters"], *(s or "–" for s in entry["scores"]), *blank)
        if kind == "trend":
            table.add_row("fresh real rows (estimate)", "", *map(_fresh_rows, sets))
        for recipe in dict.fromkeys(result.recipe for result in results):
            _add_ours(table, kind, recipe, {c: [r for r in results if (r.recipe, r.set) == (recipe, c)] for c in sets})
        if any(result.grid == "fast" for result in results):
            table.caption = "fast grid of 4 settings: MLE is not comparable with that of other methods"
        made.append(table)
    return made


def _add_ours(table: Table, kind: str, recipe: str, results: dict[str, list[QualityResult]]) -> None:
    """Add the rows of one of our recipes, whose results are {set: results}, to Table 2 ("trend") or 3 ("mle")."""
    if kind == "trend":
        table.add_row(f"anystate {recipe}", "", *(_cell(r, "trend", 100, 2) for r in results.values()))
        return
    table.add_row(f"anystate {recipe}, honest", "", *(_cell(r, "mle", 1, 4) for r in results.values()))
    table.add_row(f"anystate {recipe}, official pick", "", *(_cell(r, "mle_official", 1, 4) for r in results.values()))


def _fresh_rows(name: str) -> str:
    """The estimated Trend of new real rows of a set."""
    mean = published_baselines(name).get("fresh_rows_estimate", {}).get("trend", {}).get("mean")
    return "–" if mean is None else f"{mean:.2f}"


def _cell(results: list[QualityResult], field: str, factor: float, decimals: int) -> str:
    """Mean ± sd of a score over seeds; below it, parameters, NFE and number of runs."""
    results = [result for result in results if not math.isnan(getattr(result, field))]
    if not results:
        return "–"
    values = [factor * getattr(result, field) for result in results]
    sd = f"±{np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    sizes = sorted({(result.parameters, result.evaluations) for result in results})
    costs = "; ".join(f"{_short(parameters)}, NFE {nfe}" for parameters, nfe in sizes)
    return f"{np.mean(values):.{decimals}f}{sd}\n{costs}, n={len(results)}"


def _short(count: int) -> str:
    """A number with three digits and K or M."""
    power = min(int(math.log10(max(count, 1)) // 3), 2)
    return f"{count / 1000**power:.3g}{'KM'[power - 1]}" if power else str(count)
