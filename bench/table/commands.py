"""`anystate table …`: from a CSV to synthetic rows, conditional rows and filled-in cells."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...configs.options import choose_device, parse_pairs

app = typer.Typer(help="Synthesize, condition and impute mixed-type tables.", no_args_is_help=True)
console = Console()

Source = Annotated[str, typer.Argument(help="A CSV (also .gz) or Parquet file, or the name of a bundled set: adult.")]
Run = Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if there is one.")]
Weights = Annotated[str, typer.Option(help="ema or raw.")]
Missing = Annotated[list[str] | None, typer.Option(help="Text that means an empty cell, e.g. '?'; repeat for several.")]


@app.callback()
def needs_pandas() -> None:
    if importlib.util.find_spec("pandas") is None:
        raise ValueError("tables need pandas: pip install anystate[table]")


@app.command()
def schema(
    source: Source,
    out: Annotated[Path | None, typer.Option(help="Write the YAML here instead of printing it.")] = None,
    missing: Missing = None,
) -> None:
    """Infer what the columns are; edit the YAML and give it to fit as --schema."""
    from ...model.codecs.table.columns import infer
    from ...model.codecs.table.files import read_table
    from ...train.data.bundled import find_table

    text = infer(read_table(find_table(source), missing or [""])).dump()
    if out is None:
        console.print(text, markup=False, highlight=False, end="")
    else:
        out.write_text(text, encoding="utf-8")
        console.print(f"wrote {out}")


@app.command()
def fit(
    source: Source,
    override: Annotated[list[str] | None, typer.Argument(help="Settings, key=value, e.g. train.steps=2000.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; the same folder resumes. Default runs/NAME.")] = None,
    config: Annotated[str, typer.Option(help="A YAML file or a shipped config.")] = "table/default",
    schema: Annotated[Path | None, typer.Option(help="Kinds of the columns; default inferred.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and training; default the config's.")] = None,
    missing: Missing = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the schema and the config, and stop.")] = False,
) -> None:
    """Learn a table; run the same command again to resume."""
    from ...configs.load import dump_config, load_config
    from ...configs.table import TableConfig
    from ...model.codecs.table.columns import Schema, infer
    from ...model.codecs.table.files import describe, read_table
    from ...train.data.bundled import find_table
    from ...train.synthesizer import TableSynthesizer

    overrides = [*(override or []), *([f"missing={json.dumps(missing)}"] if missing else [])]
    overrides += [] if seed is None else [f"seed={seed}"]
    resolved = load_config(config, overrides, TableConfig)
    path = find_table(source)
    table = read_table(path, resolved.missing)
    columns = infer(table) if schema is None else Schema.load(schema)
    if dry_run:
        console.print(columns.dump() + dump_config(resolved), markup=False, highlight=False, end="")
        return
    run = out or Path("runs") / Path(source).name.split(".")[0]
    console.print(f"{len(table):,} rows, {len(table.columns)} columns of {path}")
    for name, kind in describe(columns):
        console.print(f"  {name}: {kind}", markup=False, highlight=False)
    began = time.perf_counter()
    model = TableSynthesizer(config, overrides, columns, device=choose_device(device), out=run, verbose=True).fit(table)
    parameters = sum(p.numel() for p in model.system_.net.parameters())
    console.print(
        f"trained {parameters:,} parameters in {time.perf_counter() - began:.0f} seconds; "
        f"sample with: anystate table sample {run}"
    )


@app.command()
def sample(
    run: Run,
    more: Annotated[list[str] | None, typer.Argument(help="Further conditions, as in --where.")] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Rows; default as many as in training.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=VALUE, COLUMN=LOW..HIGH (an end may be left open), or COLUMN= for an empty cell."),
    ] = None,
    balance: Annotated[str | None, typer.Option(help="Column all of whose values come equally often.")] = None,
    out: Annotated[Path, typer.Option(help="File to write, .csv, .csv.gz or .parquet.")] = Path("synthetic.csv"),
    steps: Annotated[int | None, typer.Option(help="Network evaluations per row; default the config's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the rows; default the config's.")] = None,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Draw new rows, all or under conditions."""
    from ...model.codecs.table.files import write_table

    model = _load(run, weights, device)
    conditions = parse_where(model.system_.codec, parse_pairs("--where", [*(where or []), *(more or [])]))
    began = time.perf_counter()
    table = model.sample(n, conditions, balance, seed, steps)
    write_table(table, out, model.system_.config.missing[0])
    console.print(f"wrote {len(table):,} rows to {out} in {time.perf_counter() - began:.1f} seconds")


@app.command()
def impute(
    run: Run,
    source: Annotated[Path, typer.Argument(help="The table with empty cells; CSV (also .gz) or Parquet.")],
    out: Annotated[Path, typer.Option(help="File to write; several draws go to NAME.1.csv, NAME.2.csv, …")] = Path(
        "filled.csv"
    ),
    draws: Annotated[
        int | None,
        typer.Option(help="How many draws; default 1; with --expected 20, of the numbers that need drawing."),
    ] = None,
    expected: Annotated[
        bool, typer.Option("--expected", help="Fill with the mean of numbers and the mode of categories.")
    ] = False,
    spread: Annotated[
        Path | None, typer.Option(help="With --expected: standard deviations and shares of other values, as CSV.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; default the config's.")] = None,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Fill the empty cells of a table; every other byte of a CSV stays."""
    from ...model.codecs.table.columns import NUMERIC
    from ...model.codecs.table.files import parse_csv, read_table, read_text

    if spread is not None and not expected:
        raise ValueError("--spread belongs to --expected")
    model = _load(run, weights, device)
    missing, codec = model.system_.config.missing, model.system_.codec
    text = None
    if source.suffix in (".parquet", ".pq"):
        table = read_table(source)
    elif source.is_file():
        text = read_text(source)
        words = [c.name for c in codec.columns.values() if c.column.kind not in NUMERIC or c.column.format]
        table = parse_csv(text, str(source), missing, words)
    else:
        raise ValueError(f"table {str(source)!r} not found")
    known = table[[name for name in table.columns if name in codec.columns]]
    if expected:
        filled, deviation = model.impute(known, "expected", draws, seed)
        tables = [filled]
    else:
        tables = model.impute(known, "draw", draws or 1, seed)
    written = []
    for i, filled in enumerate(tables):
        path = out if len(tables) == 1 else out.with_name(out.name.replace(".", f".{i + 1}.", 1))
        _write_filled(path, text, table, filled, missing)
        written.append(str(path))
    if spread is not None:
        deviation.to_csv(spread, index=False)
        written.append(str(spread))
    console.print(f"filled {int(known.isna().sum().sum()):,} cells; wrote {', '.join(written)}")


@app.command()
def report(
    real: Annotated[Path, typer.Argument(help="The real rows that the generator was trained on.")],
    synth: Annotated[Path, typer.Argument(help="The synthetic rows.")],
    test: Annotated[
        Path | None, typer.Option(help="Real rows it never saw: adds MLE and the level of privacy.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path("report.html"),
    schema: Annotated[Path | None, typer.Option(help="Roles of the columns (YAML); known sets are recognized.")] = None,
    target: Annotated[str | None, typer.Option(help="Column that models should predict.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Fit 4 settings instead of 36 for MLE.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the judges.")] = 0,
) -> None:
    """Compare synthetic with real rows: marginals, correlations, scores beside yardsticks, privacy; one page."""
    from .report import report as write

    for name, value in write(real, synth, test, out, schema, target, fast, seed).items():
        console.print(f"{name:28} {value:.4f}", highlight=False)
    console.print(f"wrote {out}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="adult, default, shoppers, magic, beijing or news.")],
    out: Annotated[Path, typer.Option(help="Folder that gets a folder of that name.")] = Path("data"),
    url: Annotated[str | None, typer.Option(help="Another address of the archive.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Download a finished set again.")] = False,
) -> None:
    """Download one of the paper's six tables from UCI, checked and split as the literature does."""
    from ...train.data.table_sets import fetch as get

    console.print(f"{name}: {get(name, out, url, force)}")


def parse_where(codec, pairs: list[tuple[str, str]]) -> dict:
    """{column: condition} of COLUMN=VALUE texts; see `TableSynthesizer.sample`."""
    conditions = {}
    for name, value in pairs:
        numeric = name in codec.columns and codec.columns[name].numeric
        if name in conditions:
            raise ValueError(f"--where gives column {name!r} twice")
        if value == "":
            conditions[name] = None
        elif numeric and ".." in value:
            low, _, high = value.partition("..")
            conditions[name] = (low or None, high or None)
        else:
            conditions[name] = value
    return conditions


def _write_filled(path: Path, text: str | None, table, filled, missing: list[str]) -> None:
    import gzip

    from ...model.codecs.table.files import fill_csv, write_table
    from ...model.storage import atomic_write

    whole = table.assign(**{str(name): filled[name] for name in filled.columns})
    if text is None or path.suffix in (".parquet", ".pq"):
        write_table(whole, path, missing[0])
        return
    data = fill_csv(text, table, whole, missing).encode("utf-8")
    atomic_write(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _load(run: Path, weights: str, device: str | None):
    from ...train.synthesizer import TableSynthesizer

    if weights not in ("ema", "raw"):
        raise ValueError(f"--weights must be ema or raw, got {weights!r}")
    return TableSynthesizer.load(run, weights, choose_device(device))
