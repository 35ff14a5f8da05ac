"""`anystate table report`: an HTML page with the scores of a synthetic table beside those of baselines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from ...model.codecs.table.files import TableFile
from ...model.codecs.table.schema import NUMERICAL_KINDS, Schema, infer
from .baselines import gaussian_copula, independent, published_baselines, resample
from .charts import association_map, associations, marginal
from .columns import Roles, check_tables, comparable, numbers, roles_of
from .diagnostics import diagnostics
from .metrics import Density, density
from .scores import Line, percent, score_lines
from .uci import SETS

COLUMNS_SHOWN = 60  # charts on the page; the worst columns where there are more
MAP_COLUMNS = 80
PAIRS_SHOWN = 12
BASELINES = ("fresh_rows_estimate", "resample", "independent_columns", "gaussian_copula_empirical")


def report(
    real: pd.DataFrame | Path | str,
    synth: pd.DataFrame | Path | str,
    test: pd.DataFrame | Path | str | None = None,
    out: Path | str = "report.html",
    schema: Schema | Mapping | Path | str | None = None,
    target: str | None = None,
    fast: bool = False,
    seed: int = 0,
    reading: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Write the page to `out` and return the scores, in [0, 1].

    The kinds of the columns are inferred from the real table once, and the cells of all tables are compared as that
    kind: the same rows in another format score the same. Keys and constants are not scored.

    Args:
        real: the rows that the model was trained on.
        test: real rows that were not used in training; they add MLE and reference values of the privacy scores.
        schema: kinds and target of the columns; without one, the published data sets are recognized.
        target: the column to predict in MLE; default the schema's.
        fast: compare 4 settings instead of 36 in MLE.
        reading: missing, sep, encoding and decimal of the files, see `files.read_table`.

    Raises:
        ValueError: a file that cannot be read, or tables that do not fit the schema or each other.
    """
    schema = Schema() if schema is None else _with_text_names(Schema.load(schema))
    is_given = schema != Schema()
    read = {"real": _read(real, schema.text_columns, reading)}
    check_tables(Roles((), ()), real=read["real"].table)
    notes = list(read["real"].notes)
    name = None if is_given else recognize(read["real"].table)
    if name is not None:
        schema = set_schema(name, read["real"].table)
        notes.append(f"Recognized as {SETS[name].title}; the columns have their roles of the literature.")
    known = _known(read["real"].table, schema)
    for part, table in (("synth", synth), ("test", test)):
        if table is not None:
            read[part] = _read(table, known.text_columns, reading)
    raw = {part: file.table for part, file in read.items()}
    check_tables(Roles((), ()), **raw)
    notes += _unscored(known, raw["synth"], schema)
    cells = {part: comparable(table, known.columns, part) for part, table in raw.items()}
    roles = _scored(roles_of(cells["real"], schema if schema.has_lists else known, target), cells["synth"])
    tables: dict[str, Any] = {part: _select_columns(table, roles, part) for part, table in cells.items()}
    tables.setdefault("test", None)
    real, synth = tables["real"], tables["synth"]
    check_tables(roles, **tables)
    found = density(real, synth, roles)
    notes += _notes(real, synth, roles, found, schema)
    baselines, measured = _baselines(real, roles, len(synth), seed)
    if not measured and abs(len(synth) / len(real) - 1) > 0.1:
        notes.append(
            f"The baselines are for {len(real):,} synthetic rows; {len(synth):,} rows have another noise, and "
            "fewer rows score lower."
        )
    lines, scores = score_lines(tables, roles, found, baselines, fast, seed, notes)
    has_types = all(read[part].dialect is None for part in ("real", "synth"))
    page = _page(tables, roles, found, lines, seed)
    page["findings"] = diagnostics(known.columns, raw, cells, has_types)
    page |= {"title": schema.name or "Synthetic table", "measured": measured, "notes": notes}
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(templates.get_template("report.html").render(page), encoding="utf-8")
    return scores


def _read(
    table: pd.DataFrame | Path | str, text_columns: Sequence[str | int], reading: Mapping[str, Any] | None
) -> TableFile:
    """A table with names of columns that are text, as they are in a text file."""
    is_table = isinstance(table, pd.DataFrame)
    file = TableFile(table) if is_table else TableFile.read(table, **{"text_columns": text_columns, **(reading or {})})
    return dataclasses.replace(file, table=file.table.rename(columns=str))


def _with_text_names(schema: Schema) -> Schema:
    columns = [c.model_copy(update={"name": str(c.name)}) for c in schema.columns]
    lists = {key: names and [str(name) for name in names] for key, names in
             (("numerical", schema.numerical), ("categorical", schema.categorical))}  # fmt: skip
    target = None if schema.target is None else str(schema.target)
    return schema.model_copy(update={"columns": columns, "target": target, **lists})


def _known(real: pd.DataFrame, schema: Schema) -> Schema:
    """The schema of the real table with complete columns; columns that it lists as numerical are numbers."""
    known = infer(real, schema)
    listed = schema.roles()[0] if schema.has_lists else []
    columns = [
        c.model_copy(update={"kind": "continuous"}) if c.name in listed and c.kind not in NUMERICAL_KINDS else c
        for c in known.columns
    ]
    return known.model_copy(update={"columns": columns})


def _unscored(known: Schema, synth: pd.DataFrame, schema: Schema) -> list[str]:
    """A remark on the columns that are not scored."""
    listed = [name for part in schema.roles() for name in part] if schema.has_lists else []
    reasons = {"identifier": "a key", "constant": "a constant"}
    why = {c.name: reasons[c.kind] for c in known.columns if c.kind in reasons and c.name not in listed}
    why |= {c.name: "missing in the synthetic rows" for c in known.columns if c.name not in synth.columns}
    return [f"Not scored: {_list(f'{name} ({reason})' for name, reason in why.items())}."] if why else []


def _scored(roles: Roles, synth: pd.DataFrame) -> Roles:
    """The roles of the columns that the synthetic rows have.

    Raises:
        ValueError: they lack the target, or every column.
    """
    if roles.target is not None and roles.target not in synth.columns:
        raise ValueError(f"the synth table lacks column {roles.target!r}, the target")
    numerical, categorical = (
        tuple(c for c in part if c in synth.columns) for part in (roles.numerical, roles.categorical)
    )
    if not numerical and not categorical:
        raise ValueError("nothing to score: the tables share no column that is neither a key nor constant")
    return dataclasses.replace(roles, numerical=numerical, categorical=categorical)


def _select_columns(table: pd.DataFrame, roles: Roles, name: str) -> pd.DataFrame:
    """The columns that have a role, numerical ones first."""
    missing = [c for c in roles.columns if c not in table.columns]
    if missing:
        raise ValueError(f"the {name} table lacks column {missing[0]!r}")
    return table[roles.columns]


def _page(tables: dict[str, pd.DataFrame], roles: Roles, found: Density, lines: list[Line], seed: int) -> dict:
    """The variables of the template report.html that come from the scores."""
    real, synth = tables["real"], tables["synth"]
    columns = sorted(roles.columns, key=lambda c: (math.isnan(found.columns[c]), found.columns[c]))
    mapped = set(columns[:MAP_COLUMNS])
    mapped = [c for c in roles.columns if c in mapped]
    cards = [(c, found.columns[c], marginal(real[c], synth[c], c in roles.numerical)) for c in columns[:COLUMNS_SHOWN]]
    matrices = [associations(t, roles, mapped, seed) for t in (real, synth)]
    maps = [
        ("Real", matrices[0], 1.0),
        ("Synthetic", matrices[1], 1.0),
        ("Synthetic − real (colours × 3)", matrices[1] - matrices[0], 1 / 3),
    ]
    return {
        "rows": {k: len(t) for k, t in tables.items() if t is not None},
        "roles": roles,
        "lines": lines,
        "cards": [(c, score, Markup(chart)) for c, score, chart in cards],
        "all_columns": [(c, found.columns[c]) for c in columns],
        "maps": [(title, Markup(association_map(matrix, mapped, title, scale))) for title, matrix, scale in maps],
        "mapped": len(mapped),
        "pairs": sorted(((v, a, b) for (a, b), v in found.pairs.items() if not math.isnan(v)))[:PAIRS_SHOWN],
    }


def recognize(real: pd.DataFrame) -> str | None:
    """The published data set with this table as training rows, by columns and number of rows; None if none matches."""
    for name, source in SETS.items():
        named = {*source.categorical, source.target, *(source.columns or ())}
        if len(real) == source.rows[0] and named <= set(real.columns):
            return name
    return None


def set_schema(name: str, real: pd.DataFrame) -> Schema:
    """The schema of a published data set."""
    source = SETS[name]
    numerical = [c for c in real.columns if c not in source.categorical and c != source.target]
    return Schema(
        name=name,
        task=source.task,
        target=source.target,
        numerical=numerical,
        categorical=list(source.categorical),
    )


def _baselines(real: pd.DataFrame, roles: Roles, rows: int, seed: int) -> tuple[dict[str, dict[str, str]], bool]:
    """({baseline: {score: "mean ± sd"}}, whether they were measured here); published ones for a published set."""
    is_published = roles.name in SETS and len(real) == SETS[roles.name].rows[0]
    published = published_baselines(roles.name) if is_published else {}
    if published:
        shown: dict[str, dict[str, str]] = {}
        for name in BASELINES:
            scores = published.get(name, {})
            shown[name] = {k: _mean_sd(scores[k], k) for k in ("shape", "trend", "mle_auc") if k in scores}
        return shown, False
    rng = np.random.default_rng(seed)
    tables = {
        "resample": resample(real, rows, rng),
        "independent_columns": independent(real, rows, rng),
        "gaussian_copula_empirical": gaussian_copula(real, roles, rows, rng),
    }
    measured = {"fresh_rows_estimate": {}}
    for name, table in tables.items():
        found = density(real, table, roles)
        measured[name] = {"shape": percent(found.shape, 2), "trend": percent(found.trend, 2)}
    return measured, True


def _mean_sd(entry: dict, score: str) -> str:
    decimals = 4 if score == "mle_auc" else 2
    sd = f" ± {entry['sd']:.{decimals}f}" if entry.get("sd") else ""
    return f"{entry['mean']:.{decimals}f}{sd}"


def _notes(real: pd.DataFrame, synth: pd.DataFrame, roles: Roles, found: Density, schema: Schema) -> list[str]:
    """Remarks on these tables that are needed to interpret the means."""
    notes = []
    if schema.partial:
        notes.append("This set is a part of the published one: never compare its numbers with published ones.")
    infinite = [c for c in roles.numerical if _has_infinity(real[c]) or _has_infinity(synth[c])]
    if infinite:
        notes.append(f"Infinite values count as missing: {_list(infinite)}.")
    constant = [c for c in roles.numerical if _is_constant(numbers(real[c]))]
    if constant:
        notes.append(f"Constant in the real table, so without correlation and not in Trend: {_list(constant)}.")
    empty = [c for c in roles.columns if math.isnan(found.columns[c])]
    if empty:
        notes.append(f"Without a value in one of the tables, so not in Shape: {_list(empty)}.")
    ranges = {c: _relative_range(numbers(real[c]), numbers(synth[c])) for c in roles.numerical}
    different = [f"{c} ({r:.0%} of the real range)" for c, r in ranges.items() if not 0.9 < r < 1.1]
    if different and roles.categorical:
        notes.append(
            f"Trend bins the numbers of each table by its own range, so another range lowers it: {_list(different)}."
        )
    return notes


def _has_infinity(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and bool(np.isinf(column.to_numpy(float, na_value=np.nan)).any())


def _is_constant(values: np.ndarray) -> bool:
    return len(np.unique(values)) == 1 and not np.isnan(values).any()


def _relative_range(real: np.ndarray, synth: np.ndarray) -> float:
    """The range of the synthetic values over that of the real ones; 1 where there is none."""
    if np.isnan(real).all() or np.isnan(synth).all():
        return 1.0
    span = np.nanmax(real) - np.nanmin(real)
    return (np.nanmax(synth) - np.nanmin(synth)) / span if span > 0 else 1.0


def _list(names: Iterable[str], shown: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
