"""`anystate bench table --quality`: sets × recipes × seeds, printed as the paper's Tables 2 and 3 with our rows below.

Every finished run is a row of a JSON file, so the same command goes on where it was stopped. The synthetic rows lie
beside it: a machine without XGBoost leaves MLE open, and the same command where there is one fills it in.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from ...model.storage import atomic_write
from ...train.provenance import origin
from .baselines import known
from .columns import check_tables, load_schema, read_table, roles_of
from .metrics import copied, density
from .mle import mle

PUBLISHED = Path(__file__).with_name("published.yaml")


class Synthesize(Protocol):
    """Fits `recipe` on the training rows and samples n rows: (rows, parameters of the network, network evaluations)."""

    def __call__(
        self, train: pd.DataFrame, schema: dict, recipe: str, seed: int, n: int
    ) -> tuple[pd.DataFrame, int, int]: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """One run. Shares, not percent; `mle` is the honest score, `mle_official` that of the papers' code; both are NaN
    where XGBoost was missing."""

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
    def key(self) -> tuple:
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
) -> list[Row]:
    """Run what `out` lacks, then print both tables with every row of `out` of this grid. `data` holds a folder per set
    (train.csv.gz, test.csv.gz, schema.yaml), by default $ANYSTATE_DATA/tabular. `scored` False leaves MLE open, as does
    a machine without XGBoost."""
    console, out, recipes, seeds = console or Console(), Path(out), list(recipes), list(seeds)
    data = Path(data) if data is not None else Path(os.environ.get("ANYSTATE_DATA", "data")) / "tabular"
    sets = list(sets)
    for name in sets:
        if not (data / name / "schema.yaml").is_file():
            raise ValueError(f"set {name!r} is not in {data}; `anystate table fetch {name}` gets it")
    if grid not in ("official", "fast"):
        raise ValueError(f"grid {grid!r} is neither official nor fast")
    rows = read_rows(out)
    open_ = [row for row in rows if scored and row.grid == grid and math.isnan(row.mle)]
    rows = [_with_mle(row, data, out) if row in open_ else row for row in rows]
    write_rows(out, rows)
    for name in sets:
        for recipe in recipes:
            for seed in seeds:
                if (name, recipe, seed, grid) in {row.key for row in rows}:
                    continue
                row = run(name, recipe, seed, grid, synthesize, data, out, scored)
                rows.append(row)
                write_rows(out, rows)
                console.print(
                    f"{name} {recipe} seed {seed}: Shape {100 * row.shape:.2f}, Trend {100 * row.trend:.2f}, "
                    f"{row.metric} {row.mle:.4f}, {row.seconds:.0f} s"
                    + (" (no MLE: it needs xgboost)" if math.isnan(row.mle) else ""),
                    highlight=False,
                )
    for table in tables([row for row in rows if row.grid == grid]):
        console.print(table)
    return rows


def run(
    name: str, recipe: str, seed: int, grid: str, synthesize: Synthesize, data: Path, out: Path, scored: bool = True
) -> Row:
    """One fit and one draw, as many rows as the training table has."""
    train, test, schema = _load(data / name)
    roles = roles_of(train, schema)
    began = time.perf_counter()
    synth, parameters, evaluations = synthesize(train, schema, recipe, seed, len(train))
    seconds = time.perf_counter() - began
    check_tables(roles, synthetic=synth)
    near = density(train, synth, roles)
    row = Row(
        set=name,
        recipe=recipe,
        seed=seed,
        grid=grid,
        shape=near.shape,
        trend=near.trend,
        mle=math.nan,
        mle_official=math.nan,
        metric="RMSE" if roles.task == "regression" else "AUC",
        copies=copied(train, synth, roles),
        holdout_copies=copied(train, test, roles),
        parameters=int(parameters),
        evaluations=int(evaluations),
        seconds=round(seconds, 1),
        origin=origin(),
    )
    file = _synthetic(out, row)
    file.parent.mkdir(parents=True, exist_ok=True)
    synth.to_csv(file, index=False)
    return _with_mle(row, data, out, synth) if scored else row


def _with_mle(row: Row, data: Path, out: Path, synth: pd.DataFrame | None = None) -> Row:
    """The row with its MLE, where XGBoost and the synthetic rows are there."""
    file = _synthetic(out, row)
    if importlib.util.find_spec("xgboost") is None or (synth is None and not file.is_file()):
        return row
    train, test, schema = _load(data / row.set)
    synth = read_table(file, schema) if synth is None else synth
    useful = mle(synth, test, roles_of(train, schema), row.grid, row.seed)
    return dataclasses.replace(row, mle=useful.score, mle_official=useful.official)


def _synthetic(out: Path, row: Row) -> Path:
    return out.parent / "synthetic" / f"{row.set}-{row.recipe}-{row.seed}.csv.gz"


@functools.lru_cache(maxsize=1)
def _load(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    schema = load_schema(folder / "schema.yaml")
    return *(read_table(folder / f"{part}.csv.gz", schema) for part in ("train", "test")), schema


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} does not hold rows of this benchmark: {error}") from None


def write_rows(path: Path, rows: list[Row]) -> None:
    """Whole or not at all: a kill leaves the rows before it."""
    atomic_write(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def published() -> dict:
    return yaml.safe_load(PUBLISHED.read_text())


def tables(rows: list[Row]) -> list[Table]:
    """Tables 2 and 3: numbers of others, what fresh real rows score, then ours, as mean ± sd over seeds with parameters
    and network evaluations below."""
    others = published()
    columns = others["sets"] + sorted({row.set for row in rows} - set(others["sets"]))
    result = []
    for kind in ("trend", "mle"):
        table = Table(title=others[kind]["title"], title_justify="left", box=None, pad_edge=False)
        table.add_column("method")
        for name in ("parameters", *columns):
            table.add_column(name, justify="right")
        blank = [""] * (len(columns) - len(others["sets"]))
        for entry in others[kind]["rows"]:
            table.add_row(entry["method"], entry["parameters"], *(s or "–" for s in entry["scores"]), *blank)
        if kind == "trend":
            fresh = [known(c).get("fresh_rows_estimate", {}).get("trend", {}).get("mean") for c in columns]
            table.add_row("fresh real rows (estimate)", "", *("–" if f is None else f"{f:.2f}" for f in fresh))
        for recipe in dict.fromkeys(row.recipe for row in rows):
            mine = {c: [r for r in rows if r.recipe == recipe and r.set == c] for c in columns}
            if kind == "trend":
                table.add_row(f"anystate {recipe}", "", *(_cell(mine[c], "trend", 100, 2) for c in columns))
            else:
                table.add_row(f"anystate {recipe}, honest", "", *(_cell(mine[c], "mle", 1, 4) for c in columns))
                table.add_row(
                    f"anystate {recipe}, official pick", "", *(_cell(mine[c], "mle_official", 1, 4) for c in columns)
                )
        if any(row.grid == "fast" for row in rows):
            table.caption = "fast grid of 4 settings: MLE is not comparable with the rows of others"
        result.append(table)
    return result


def _cell(rows: list[Row], field: str, factor: float, places: int) -> str:
    rows = [row for row in rows if not math.isnan(getattr(row, field))]
    if not rows:
        return "–"
    values = [factor * getattr(row, field) for row in rows]
    spread = f"±{np.std(values, ddof=1):.{places}f}" if len(values) > 1 else ""
    sizes = sorted({(row.parameters, row.evaluations) for row in rows})
    costs = "; ".join(f"{_short(p)}, {e} evals" for p, e in sizes)
    return f"{np.mean(values):.{places}f}{spread}\n{costs}, n={len(rows)}"


def _short(count: int) -> str:
    power = min(int(math.log10(max(count, 1)) // 3), 2)
    return f"{count / 1000**power:.3g}{'KM'[power - 1]}" if power else str(count)
