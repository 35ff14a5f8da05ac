"""`anystate bench table --conditional`: rows drawn under a condition against unconditional rows filtered to it.

For every combination of the conditioning columns, the distribution of a target column in the real rows (training and
test together) is compared with that of rows drawn under the condition and that of unconditional rows which happen to
meet it, by total variation distance. Two comparisons:

- the same number of rows: as many conditional rows as the filter leaves, at most `rows`;
- the same wish: `rows` conditional rows against all that the filter leaves of a pool of unconditional rows, which cost
  pool / rows times as many network evaluations.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd
from rich.table import Table

from ...train.synthesizer import TableSynthesizer
from .columns import words


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition; distances are in [0, 1], NaN where the filter leaves no row.

    Args:
        real: real rows that meet it; share: of all real rows.
        noise: the distance that as many fresh real rows as there are would have (half the mean absolute deviation).
        filtered: unconditional rows that meet it.
        ours: of `rows` conditional rows; ours_same: of as many as were filtered.
        theirs: of the filtered rows; theirs_same: of at most `rows` of them.
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
    def of(cls, saved: dict) -> Condition:
        """From JSON."""
        return cls(**{**saved, "columns": tuple(saved["columns"]), "given": tuple(saved["given"])})


def conditional(
    model: TableSynthesizer,
    real: pd.DataFrame,
    given: list[str],
    target: str,
    plain: pd.DataFrame,
    rows: int = 200,
    fewest: int = 10,
    seed: int = 0,
) -> list[Condition]:
    """Every combination of values of `given` that at least `fewest` real rows have.

    Args:
        plain: unconditional rows of the model, to be filtered.

    Raises:
        ValueError: an unknown column.
    """
    for name in (*given, target):
        if name not in real:
            raise ValueError(f"unknown column {name!r}; the table has {', '.join(map(str, real))}")
    levels = sorted(words(real[target]).dropna().unique())
    spelled = {name: dict(zip(words(real[name]), real[name], strict=True)) for name in given}
    found = []
    for values in itertools.product(*(sorted(spelled[name]) for name in given)):
        there, kept = _meets(real, given, values), _meets(plain, given, values)
        if len(there) < fewest:
            continue
        where = {name: spelled[name][value] for name, value in zip(given, values, strict=True)}
        # random numbers of its own, or all conditions would err together
        drawn = model.sample(rows, where=where, seed=1000 * seed + len(found) + 1)
        truth, n = _shares(there[target], levels), min(len(kept), rows)
        noise = float(np.sqrt(2 * truth * (1 - truth) / (np.pi * len(there))).sum() / 2)
        found.append(
            Condition(
                columns=tuple(given),
                given=values,
                seed=seed,
                real=len(there),
                share=len(there) / len(real),
                noise=noise,
                filtered=len(kept),
                ours=_distance(truth, drawn[target], levels),
                ours_same=_distance(truth, drawn[target].iloc[:n], levels),
                theirs=_distance(truth, kept[target], levels),
                theirs_same=_distance(truth, kept[target].iloc[:n], levels),
                cost=len(plain) / rows,
            )
        )
    return found


def _meets(table: pd.DataFrame, given: list[str], values: tuple[str, ...]) -> pd.DataFrame:
    meets = np.logical_and.reduce([words(table[name]) == v for name, v in zip(given, values, strict=True)])
    return table[meets]


def _shares(column: pd.Series, levels: list[str]) -> np.ndarray:
    return words(column).value_counts(normalize=True).reindex(levels, fill_value=0.0).to_numpy()


def _distance(truth: np.ndarray, column: pd.Series, levels: list[str]) -> float:
    return float(np.abs(truth - _shares(column, levels)).sum() / 2) if len(column) else float("nan")


def summary(found: list[Condition], rare: float = 1e-3) -> list[dict]:
    """Mean distances over all conditions, over them weighted by their real rows, and over the rare ones; a condition
    of which the filter leaves nothing counts as distance 1 there and is left out where row numbers are equal."""
    groups = {
        "every condition alike": (found, np.ones(len(found))),
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
    """Mean distances down, groups of conditions across."""
    lines = {
        "n": "conditions",
        "filtered_rows": "rows that the filter leaves",
        "cost": "evaluations of filtering ÷ of giving",
        "ours": "given",
        "theirs": "filtered, all it leaves",
        "ours_same": "given, as many rows",
        "theirs_same": "filtered, as many rows",
        "noise": "of fresh real rows",
    }
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("mean distance to real")
    for row in rows:
        table.add_column(row["conditions"], justify="right")
    for key, name in lines.items():
        places = 0 if key in ("n", "filtered_rows", "cost") else 4
        table.add_row(name, *(f"{row[key]:.{places}f}" for row in rows))
    return table
