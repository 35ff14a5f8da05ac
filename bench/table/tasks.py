"""Runs of `anystate bench table --conditional` and `--imputation` over sets and seeds, saved in a JSON file.

The fits are those of `--quality` with the same --out. A finished run is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
from rich.console import Console

from ...model.codecs.table.schema import Schema
from ...model.provenance import provenance
from ...model.storage import atomic_write
from ...train.synthesizer import TableSynthesizer
from . import conditional, imputation
from .columns import Roles, roles_of
from .sets import find_set, read_set

Fit = Callable[[pd.DataFrame, Schema, str, int], TableSynthesizer]
Task = Callable[[TableSynthesizer, pd.DataFrame, pd.DataFrame, Roles, int], list]


@dataclasses.dataclass
class Tasks:
    """The two benchmarks on some sets and seeds.

    Args:
        fit: (training rows, schema, recipe, seed) → a fitted model.
        out: folder of conditional.json and imputation.json.
        data: folder of the sets, default $ANYSTATE_DATA/tabular.
    """

    sets: Iterable[str]
    seeds: Iterable[int]
    recipe: str
    fit: Fit
    out: Path
    data: Path | None = None
    console: Console = dataclasses.field(default_factory=Console)

    def conditional(self, column_lists: list[list[str]], rows: int, pool: int) -> list[dict]:
        """Conditional against filtered rows, see `conditional`; the target is the schema's.

        Args:
            column_lists: sets of conditioning columns; all use the same pool.
            rows: number of conditional rows.
            pool: number of unconditional rows to filter.
        """

        def task(
            model: TableSynthesizer, train: pd.DataFrame, test: pd.DataFrame, roles: Roles, seed: int
        ) -> list[conditional.ConditionResult]:
            real, results = pd.concat([train, test], ignore_index=True), []
            unconditional = model.sample(pool, seed=seed)
            for columns in column_lists:
                results += conditional.conditional(model, real, columns, roles.target, unconditional, rows, seed=seed)
            return results

        runs = self._run("conditional", task, {"given": column_lists, "rows": rows, "pool": pool})
        for run in runs:
            results = [conditional.ConditionResult.from_json(saved) for saved in run["result"]]
            for columns in run["asked"]["given"]:
                chosen = [r for r in results if r.columns == tuple(columns)]
                title = f"{run['set']}, {run['recipe']}, seed {run['seed']}, given {', '.join(columns)}"
                self.console.print(conditional.table_of(conditional.summary(chosen), title))
        return runs

    def imputation(self, draws: int, share: float, limit: int | None) -> list[dict]:
        """A share of the cells of the test rows (the first `limit`) removed and imputed, see `imputation`."""

        def task(
            model: TableSynthesizer, train: pd.DataFrame, test: pd.DataFrame, roles: Roles, seed: int
        ) -> list[imputation.Filled]:
            def ours(holes: pd.DataFrame) -> pd.DataFrame:
                return model.impute(holes[list(model.feature_names_in_)], "expected", draws, seed)[0]

            test = test if limit is None else test.head(limit)
            return imputation.imputation(train, test, roles, ours, share, seed)

        runs = self._run("imputation", task, {"draws": draws, "share": share, "limit": limit})
        for run in runs:
            filled = [imputation.Filled(**r) for r in run["result"]]
            title = f"{run['set']}, {run['recipe']}, seed {run['seed']}: {run['asked']['share']:.0%} of cells removed"
            self.console.print(imputation.table_of(filled, title))
        return runs

    def _run(self, name: str, task: Task, settings: dict) -> list[dict]:
        """The runs of a benchmark with these settings, from its file; missing runs are computed and added."""
        file = self.out / f"{name}.json"
        done = json.loads(file.read_text()) if file.exists() else []
        wanted = []
        for set_name in self.sets:
            folder = find_set(set_name, self.data)
            for seed in self.seeds:
                key = {"set": set_name, "recipe": self.recipe, "seed": seed, "asked": settings}
                run = next((r for r in done if all(r[k] == v for k, v in key.items())), None)
                if run is None:
                    run = json.loads(json.dumps({**key, **self._result(task, folder, seed)}))
                    done.append(run)
                    atomic_write(file, json.dumps(done, indent=1) + "\n")
                wanted.append(run)
        return wanted

    def _result(self, task: Task, folder: Path, seed: int) -> dict:
        train, test, schema = read_set(folder)
        model = self.fit(train, schema, self.recipe, seed)
        began = time.perf_counter()
        result = task(model, train, test, roles_of(train, schema), seed)
        seconds = round(time.perf_counter() - began, 1)
        return {"seconds": seconds, "origin": provenance(), "result": [dataclasses.asdict(r) for r in result]}
