"""`anystate bench table --conditional`: conditional rows against unconditional rows filtered by the condition.

For every combination of values of the conditioning columns, the distribution of a target column in the real rows
(training and test together) is compared, by total variation distance, with that of conditional rows and with that of
the unconditional rows that satisfy the condition. Two comparisons:

- the same number of rows: as many conditional rows as the filter keeps, at most `rows`;
- the same task: `rows` conditional rows against all rows that the filter keeps of a pool of unconditional rows, which
  takes pool / rows times the network evaluations.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd
from rich.table import Table

from ...train.synthesizer import TableSynthesizer
from .columns import strings


@dataclasses.dataclass(frozen=True)
class ConditionResult:
    """The scores of one condition, `columns` = `given`; distances are in [0, 1], NaN if the filter keeps no row.

    Args:
        real, share: number of real rows that satisfy it, and their share of all real rows.
        noise: expected distance of another sample of real rows of this size (half the mean absolute deviation).
        filtered: number of unconditional rows that satisfy it.
        ours, ours_same: distance of `rows` conditional rows, and of as many as the filter keeps.
        theirs, theirs_same: distance of all filtered rows, and of at most `rows` of them.
        cost: network evaluations of filtering divided by those of conditional sampling.
    """

    columns: tuple[str, ...]
    given: tuple[str, ...]
    seed: int
    real: int
    share: float
    noise: float
    filtered: int
    ours: float
    ours_same: float
    theirs: float
    theirs_same: float
    cost: float

    @classmethod
    def from_json(cls, saved: dict) -> ConditionResult:
        return cls(**{**saved, "columns": tuple(saved["columns"]), "given": tuple(saved["given"])})


def conditional(
    model: TableSynthesizer,
    real: pd.DataFrame,
    columns: list[str],
    target: str,
    pool: pd.DataFrame,
    rows: int = 200,
    min_real: int = 10,
    seed: int = 0,
) -> list[ConditionResult]:
    """The result of every combination of values of `columns` that at least `min_real` real rows have.

    Args:
        pool: unconditional rows of the model, to be filtered.
        rows: number of conditional rows.

    Raises:
        ValueError: an unknown column.
    """
    for name in (*columns, target):
        if name not in real:
            raise ValueError(f"unknown column {name!r}; the table has {', '.join(map(str, real))}")
    levels = sorted(strings(real[target]).dropna().unique())
    value_of = {name: dict(zip(strings(real[name]), real[name], strict=True)) for name in columns}
    found = []
    for values in itertools.product(*(sorted(value_of[name]) for name in columns)):
        matching, kept = _matching(real, columns, values), _matching(pool, columns, values)
        if len(matching) < min_real:
            continue
        where = {name: value_of[name][value] for name, value in zip(columns, values, strict=True)}
        # every condition has its own seed, so that their errors are independent
        drawn = model.sample(rows, where=where, seed=1000 * seed + len(found) + 1)
        truth, n = _shares(matching[target], levels), min(len(kept), rows)
        noise = float(np.sqrt(2 * truth * (1 - truth) / (np.pi * len(matching))).sum() / 2)
        found.append(
            ConditionResult(
                columns=tuple(columns),
                given=values,
                seed=seed,
                real=len(matching),
                share=len(matching) / len(real),
                noise=noise,
                filtered=len(kept),
                ours=_distance(truth, drawn[target], levels),
                ours_same=_distance(truth, drawn[target].iloc[:n], levels),
                theirs=_distance(truth, kept[target], levels),
                theirs_same=_distance(truth, kept[target].iloc[:n], levels),
                cost=len(pool) / rows,
            )
        )
    return found


def _matching(table: pd.DataFrame, columns: list[str], values: tuple[str, ...]) -> pd.DataFrame:
    """The rows that have these values in `columns`."""
    conditions = [strings(table[name]) == value for name, value in zip(columns, values, strict=True)]
    return table[np.logical_and.reduce(conditions)]


def _shares(column: pd.Series, levels: list[str]) -> np.ndarray:
    return strings(column).value_counts(normalize=True).reindex(levels, fill_value=0.0).to_numpy()


def _distance(truth: np.ndarray, column: pd.Series, levels: list[str]) -> float:
    return float(np.abs(truth - _shares(column, levels)).sum() / 2) if len(column) else float("nan")


def summary(found: list[ConditionResult], rare: float = 1e-3) -> list[dict]:
    """Mean distances over all conditions, over all weighted by their number of real rows, and over the rare ones.

    Where the filter keeps no row, the distance of the filtered rows is 1, and the condition does not count in the
    comparison of equal numbers of rows.
    """
    groups = {
        "all conditions": (found, np.ones(len(found))),
        "weighted by real rows": (found, np.array([c.real for c in found], dtype=float)),
    }
    few = [c for c in found if c.share < rare]
    groups[f"rarer than {rare:.1%} of rows"] = (few, np.ones(len(few)))
    rows = []
    for name, (chosen, weights) in groups.items():
        if not chosen:
            continue
        means = {
            key: float(np.average(np.nan_to_num([getattr(c, key) for c in chosen], nan=1.0), weights=weights))
            for key in ("ours", "theirs", "noise")
        }
        both = [i for i, c in enumerate(chosen) if c.filtered]
        for key in ("ours_same", "theirs_same"):
            values = [getattr(chosen[i], key) for i in both]
            means[key] = float(np.average(values, weights=weights[both])) if both else float("nan")
        filtered = float(np.mean([c.filtered for c in chosen]))
        rows.append({"conditions": name, "n": len(chosen), "filtered_rows": filtered, "cost": chosen[0].cost, **means})
    return rows


def table_of(rows: list[dict], title: str) -> Table:
    """A table of a `summary`: rows are distances, columns are groups of conditions."""
    lines = {
        "n": "conditions",
        "filtered_rows": "rows that the filter keeps",
        "cost": "NFE of filtering / of conditioning",
        "ours": "conditional rows",
        "theirs": "all filtered rows",
        "ours_same": "conditional rows, same number",
        "theirs_same": "filtered rows, same number",
        "noise": "new real rows (noise)",
    }
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("mean distance to real")
    for row in rows:
        table.add_column(row["conditions"], justify="right")
    for key, name in lines.items():
        places = 0 if key in ("n", "filtered_rows", "cost") else 4
        table.add_row(name, *(f"{row[key]:.{places}f}" for row in rows))
    return table
