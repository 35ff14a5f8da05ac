"""`anystate table …`: from a CSV to synthetic rows, conditional rows and imputed cells."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from ...configs.options import (
    Checkpoint,
    Device,
    Override,
    RunOut,
    SamplingSteps,
    Weights,
    choose_device,
    require_path,
)

if TYPE_CHECKING:
    from ...model.codecs.table.schema import Schema
    from ...train.synthesizer import TableSynthesizer

app = typer.Typer(help="Synthesize, condition and impute mixed-type tables.", no_args_is_help=True)
console = Console()

Source = Annotated[
    str, typer.Argument(help="A CSV, Parquet, Feather, Excel or JSON file, or the name of a bundled set: adult.")
]
Missing = Annotated[
    list[str] | None,
    typer.Option(help="String that means an empty cell, e.g. '?', beside the empty string; repeat for several."),
]
Sep = Annotated[str | None, typer.Option(help="Separator of a CSV, one character or tab; default guessed.")]
Encoding = Annotated[str | None, typer.Option(help="Encoding of a CSV, e.g. cp1252; default guessed.")]
Decimal = Annotated[str | None, typer.Option(help="Decimal mark of a CSV, . or ,; default guessed.")]
TableOut = Annotated[
    Path,
    typer.Option("-o", "--out", help="File to write: .csv, .tsv, .parquet, .feather, .xlsx, .json or .jsonl."),
]


@app.callback()
def require_pandas() -> None:
    if importlib.util.find_spec("pandas") is None:
        raise ValueError("tables need pandas: pip install anystate[table]")


@app.command()
def schema(
    source: Source,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Write the YAML to this file, or a .json file in the form of SDV's metadata."),
    ] = None,
    missing: Missing = None,
    sep: Sep = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
) -> None:
    """Infer the kinds of the columns; edit the YAML and give it to fit as --schema."""
    from ...train.data.bundled import find_table

    path = find_table(source)
    from ...model.codecs.table.files import TableFile
    from ...model.codecs.table.schema import infer

    file = TableFile.read(path, missing or (), (), sep, encoding, decimal)
    _print_notes(file.notes)
    found = infer(file.table)
    if out is None:
        _say(found, "# ")  # comments of the YAML
        console.print(found.dump(), markup=False, highlight=False, end="", soft_wrap=True)
    else:
        _say(found)
        is_json = out.suffix.lower() == ".json"
        out.write_text(found.to_sdv() if is_json else found.dump(), encoding="utf-8")
        console.print(f"wrote {out}")


@app.command()
def fit(
    source: Source,
    override: Override = None,
    out: RunOut = None,
    config: Annotated[str, typer.Option(help="A YAML file or a shipped config.")] = "table/default",
    schema: Annotated[
        Path | None, typer.Option(help="Kinds of the columns (YAML, or SDV's JSON); default inferred.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and training; default the config's.")] = None,
    missing: Missing = None,
    sep: Sep = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the schema and the config, and stop.")] = False,
) -> None:
    """Train a model of a table; run the same command again to resume."""
    from ...configs.load import dump_config, load_config
    from ...train.data.bundled import find_table

    overrides = list(override or [])
    if missing:
        overrides.append(f"missing={json.dumps(missing)}")
    if seed is not None:
        overrides.append(f"seed={seed}")
    require_path("--schema:", schema)
    path = find_table(source)
    resolved = load_config(config, overrides)
    from ...model.codecs.table.files import TableFile
    from ...model.codecs.table.schema import Schema
    from ...sample.table.config import csv_settings, row_codec, schema_of
    from ...train.synthesizer import TableSynthesizer

    given = {"sep": sep, "encoding": encoding, "decimal": decimal}
    reading = {**csv_settings(resolved), **{key: value for key, value in given.items() if value is not None}}
    if schema is not None:
        reading["text_columns"] = Schema.load(schema).text_columns
    file = TableFile.read(path, **reading)
    table = file.table
    _print_notes(file.notes)
    if file.dialect is not None:
        modality, _ = row_codec(resolved)
        for key, value in file.dialect.settings.items():
            overrides.append(f"modalities.{modality}.csv.{key}={json.dumps(value)}")
        resolved = load_config(config, overrides)
    columns = schema_of(table, resolved, schema)
    if dry_run:
        console.print(columns.dump() + dump_config(resolved), markup=False, highlight=False, end="")
        return
    run = out or Path("runs") / Path(source).name.split(".")[0]
    console.print(f"{len(table):,} rows, {len(table.columns)} columns of {path}")
    if own := {} if file.dialect is None else file.dialect.settings:
        console.print("  read with " + ", ".join(f"{key} {value!r}" for key, value in own.items()), highlight=False)
    _say(columns)
    for column in columns.columns:
        column.warning = None  # it is said
    began = time.perf_counter()
    model = TableSynthesizer(config, overrides, columns, device=choose_device(device), out=run, verbose=True).fit(table)
    parameters = sum(p.numel() for p in model.pipeline_.net.parameters())
    console.print(
        f"trained {parameters:,} parameters in {time.perf_counter() - began:.0f} seconds; "
        f"sample with: anystate table sample {run}"
    )


@app.command()
def sample(
    run: Checkpoint,
    more: Annotated[list[str] | None, typer.Argument(help="Further conditions, as in --where.")] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", min=1, help="Rows; default as many as in training.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="COLUMN=VALUE, COLUMN=LOW..HIGH (either end may be missing), COLUMN>=VALUE (also >, <=, <, !=), "
            "'COLUMN in {A, B}', 'COLUMN not null', or COLUMN= for an empty cell; repeat for several."
        ),
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option(help="Table with the conditions of each row to sample; empty cells are no conditions."),
    ] = None,
    balance: Annotated[
        list[str] | None,
        typer.Option(help="Categorical column whose values are equally frequent; repeat for combinations of several."),
    ] = None,
    out: TableOut = Path("synthetic.csv"),
    steps: SamplingSteps = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the rows; default the config's.")] = None,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Sample new rows, unconditionally or under conditions."""
    texts = [*(where or []), *(more or [])]
    for text in texts:
        if not re.search(r"[=<>]|\b(in|not)\b", text):
            raise ValueError(f"--where {text!r} is not of the form COLUMN=VALUE, COLUMN>VALUE or 'COLUMN in {{A, B}}'")
    require_path("--conditions:", conditions)
    if conditions is not None and texts:
        raise ValueError("--conditions and --where exclude each other: add the conditions of --where to the file")
    _require_run(run)
    from ...model.codecs.table.files import check_output, read_table, write_table

    check_output(out, n or 0)
    model = _load(run, weights, device)
    from ...sample.table.where import parse_where

    began = time.perf_counter()
    given = parse_where(model.columns_, texts)
    if conditions is not None:
        given = read_table(conditions, model.missing_, text_columns=list(model.columns_.columns))
    table = model.sample(n, given, balance or None, seed, steps)
    write_table(table, out, model.missing_[0], model.dialect_)
    console.print(f"wrote {len(table):,} rows to {out} in {time.perf_counter() - began:.1f} seconds")


@app.command()
def impute(
    run: Checkpoint,
    source: Annotated[
        Path,
        typer.Argument(help="Table with empty cells, in any of the formats of fit."),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="File to write; several draws go to NAME.1.csv, NAME.2.csv, …")
    ] = Path("filled.csv"),
    draws: Annotated[
        int | None,
        typer.Option(min=1, help="Number of draws; default 1, with --expected 20 for numbers that are sampled."),
    ] = None,
    expected: Annotated[
        bool, typer.Option("--expected", help="Fill with the mean of numbers and the most probable category.")
    ] = False,
    spread: Annotated[
        Path | None,
        typer.Option(help="With --expected: standard deviations and probabilities of other values, as CSV."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; default the config's.")] = None,
    sep: Sep = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Fill the empty cells of a table; every other byte of a CSV stays."""
    if spread is not None and not expected:
        raise ValueError("--spread belongs to --expected")
    require_path("table", source)
    _require_run(run)
    from ...model.codecs.table.files import check_output

    check_output(out)
    model = _load(run, weights, device)
    from ...train.table_files import impute_file

    reading = {"sep": sep, "encoding": encoding, "decimal": decimal}
    what, written, notes = impute_file(model, source, out, draws, expected, spread, seed, reading)
    _print_notes(notes)
    console.print(f"{what}; wrote {', '.join(map(str, written))}", markup=False, highlight=False)


@app.command()
def report(
    real: Annotated[Path, typer.Argument(help="The real rows that the model was trained on.")],
    synth: Annotated[Path, typer.Argument(help="The synthetic rows.")],
    test: Annotated[
        Path | None,
        typer.Option(help="Held-out real rows: adds MLE and a reference for privacy."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML page to write.")] = Path("report.html"),
    schema: Annotated[
        Path | None,
        typer.Option(help="Columns and their roles (YAML); known sets are recognized."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Column that models predict in MLE.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="MLE: fit 4 hyper-parameter settings instead of 36.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the evaluation models.")] = 0,
    missing: Missing = None,
    sep: Sep = None,
    encoding: Encoding = None,
    decimal: Decimal = None,
) -> None:
    """Compare synthetic with real rows on one page: marginals, correlations, scores beside baselines, privacy."""
    for what, path in (("table", real), ("table", synth), ("--test:", test), ("--schema:", schema)):
        require_path(what, path)
    from .report import report as write

    reading = {"missing": missing or (), "sep": sep, "encoding": encoding, "decimal": decimal}
    for name, value in write(real, synth, test, out, schema, target, fast, seed, reading).items():
        console.print(f"{name:28} {value:.4f}", highlight=False)
    console.print(f"wrote {out}")


@app.command()
def fetch(
    name: Annotated[
        Literal["adult", "default", "shoppers", "magic", "beijing", "news"], typer.Argument(help="Data set.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder in which a folder of that name is made.")] = Path(
        "data"
    ),
    url: Annotated[str | None, typer.Option(help="Another address of the archive.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Download a finished set again.")] = False,
) -> None:
    """Download one of the paper's six tables from UCI, checked and split as in the literature.

    The same command resumes an interrupted download.
    """
    from .fetch import fetch as download

    console.print(f"{name}: {download(name, out, url, force)}")


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        Console(stderr=True).print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _say(schema: Schema, start: str = "") -> None:
    """Print what was assumed of the columns, then what they are and why."""
    from ...model.codecs.table.schema import describe, warnings_of

    for line in warnings_of(schema):
        Console(stderr=True).print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    for name, kind, reason in describe(schema):
        line = f"{start}  {name}: {kind}" + (f" ({reason})" if reason else "")
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _require_run(run: Path) -> None:
    """Raise an error if there is no such run, before anything is imported that is slow to import."""
    from ...configs.runs import resolve

    resolve(run)


def _load(run: Path, weights: str, device: str | None) -> TableSynthesizer:
    from ...train.synthesizer import TableSynthesizer

    return TableSynthesizer.load(run, weights, choose_device(device))
