"""Runs of `anystate bench table --conditional` and `--imputation`: sets × seeds of fits, kept in a JSON file.

The fits are those of `--quality`: the same --out takes them up. A finished run is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
from rich.console import Console

from ...model.storage import atomic_write
from ...train.provenance import origin
from ...train.synthesizer import TableSynthesizer
from . import conditional as table_conditional
from . import imputation as table_imputation
from .columns import load_schema, read_table, roles_of

Fit = Callable[[pd.DataFrame, dict, str, int], TableSynthesizer]


@dataclasses.dataclass
class Tasks:
    """What to run it on.

    Args:
        fit: (training rows, schema, recipe, seed) → a fitted model.
        data: folder of the tables, default $ANYSTATE_DATA/tabular.
        out: folder of conditional.json and imputation.json.
    """

    sets: Iterable[str]
    seeds: Iterable[int]
    recipe: str
    fit: Fit
    out: Path
    data: Path | None = None
    console: Console = dataclasses.field(default_factory=Console)

    def conditional(self, given: list[list[str]], rows: int, pool: int) -> list[dict]:
        """Conditional rows against filtered ones, target the schema's, see `table_conditional`; `given` are sets of
        columns, which share the pool."""

        def one(model, train, test, roles, seed):
            real = pd.concat([train, test], ignore_index=True)
            plain = model.sample(pool, seed=seed)
            parts = [
                table_conditional.conditional(model, real, columns, roles.target, plain, rows, seed=seed)
                for columns in given
            ]
            return [condition for part in parts for condition in part]

        asked = {"given": given, "rows": rows, "pool": pool}
        done = self._run("conditional", one, asked)
        for row in done:
            found = [table_conditional.Condition.of(saved) for saved in row["result"]]
            for columns in row["asked"]["given"]:
                chosen = [c for c in found if c.columns == tuple(columns)]
                title = f"{row['set']}, {row['recipe']}, seed {row['seed']}, given {', '.join(columns)}"
                self.console.print(table_conditional.table_of(table_conditional.summary(chosen), title))
        return done

    def imputation(self, draws: int, share: float, limit: int | None) -> list[dict]:
        """A share of the cells of (the first `limit`) test rows removed and filled, see `table_imputation`."""

        def one(model, train, test, roles, seed):
            def ours(holes: pd.DataFrame) -> pd.DataFrame:
                return model.impute(holes[list(model.feature_names_in_)], "expected", draws, seed)[0]

            test = test if limit is None else test.head(limit)
            return table_imputation.imputation(train, test, roles, ours, share, seed)

        done = self._run("imputation", one, {"draws": draws, "share": share, "limit": limit})
        for row in done:
            filled = [table_imputation.Filled(**r) for r in row["result"]]
            title = f"{row['set']}, {row['recipe']}, seed {row['seed']}: {row['asked']['share']:.0%} of cells removed"
            self.console.print(table_imputation.table_of(filled, title))
        return done

    def _run(self, task: str, one: Callable, asked: dict) -> list[dict]:
        file = self.out / f"{task}.json"
        done = json.loads(file.read_text()) if file.exists() else []
        wanted = []
        for name in self.sets:
            folder = self.folder(name)
            for seed in self.seeds:
                key = {"set": name, "recipe": self.recipe, "seed": seed, "asked": asked}
                row = next((r for r in done if all(r[k] == v for k, v in key.items())), None)
                if row is None:
                    schema = load_schema(folder / "schema.yaml")
                    train, test = (read_table(folder / f"{part}.csv.gz", schema) for part in ("train", "test"))
                    model = self.fit(train, schema, self.recipe, seed)
                    began = time.perf_counter()
                    result = one(model, train, test, roles_of(train, schema), seed)
                    seconds = round(time.perf_counter() - began, 1)
                    row = {**key, "seconds": seconds, "origin": origin()}
                    row["result"] = [dataclasses.asdict(r) for r in result]
                    done.append(json.loads(json.dumps(row)))
                    atomic_write(file, json.dumps(done, indent=1) + "\n")
                wanted.append(row)
        return wanted

    def folder(self, name: str) -> Path:
        data = self.data if self.data is not None else Path(os.environ.get("ANYSTATE_DATA", "data")) / "tabular"
        if not (data / name / "schema.yaml").is_file():
            raise ValueError(f"set {name!r} is not in {data}; `anystate table fetch {name}` gets it")
        return data / name
