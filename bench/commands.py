"""`anystate bench …`: speed, memory and quality, measured side by side."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ..configs.options import (
    Compile,
    Device,
    Json,
    JsonOut,
    Out,
    choose_device,
    parse_choices,
    parse_counts,
    renamed,
    require_path,
)

app = typer.Typer(help="Speed, memory and quality, measured side by side.", no_args_is_help=True)
console = Console()

VARIANTS = ("decoupled", "unified", "image_only", "text_only")  # of `anystate bench schedules`

Size = Annotated[Literal["official", "emoji", "digits", "tiny", "wide"], typer.Option(help="Shipped recipe.")]
Trace = Annotated[Path | None, typer.Option(help="Folder for the profiler's table and trace.")]


@app.command("train", cls=renamed({"--batch": "--batch-size"}))
def bench_train(
    size: Size = "digits",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each implementation.")] = 30,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples per step; default the recipe's.")] = None,
    compile: Compile = "always",
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Compare train.precision=fp8 with bf16, speed and losses.")
    ] = False,
    trace: Trace = None,
    json: JsonOut = None,
    device: Device = None,
) -> None:
    """Throughput, step times, MFU and memory of training, compared with the plain reference."""
    from .speed import train as speed
    from .speed.results import ResultLog

    where = choose_device(device)
    if fp8:
        speed.fp8(size, where, ResultLog(where, json), compile, steps, batch_size)
    else:
        speed.train(size, where, ResultLog(where, json), compile, steps, batch_size, trace)


@app.command("sample", cls=renamed({"--batch": "--batch-size"}))
def bench_sample(
    size: Size = "digits",
    batch_size: Annotated[
        str | None, typer.Option(help="Samples per batch, separated by commas; default the recipe's.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Sampling steps, separated by commas.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed samplings of each implementation.")] = 5,
    compile: Compile = "always",
    json: JsonOut = None,
    device: Device = None,
) -> None:
    """Throughput, time per network evaluation, latency and memory of sampling, compared with the plain reference."""
    batches, counts = parse_counts("--batch-size", batch_size), parse_counts("--steps", steps)
    from .speed.results import ResultLog
    from .speed.sample import sampling

    where = choose_device(device)
    sampling(size, where, ResultLog(where, json), compile, batches, counts, rounds)


@app.command("samplers")
@app.command("curves", hidden=True)
def bench_samplers(
    digits: Annotated[Path | None, typer.Option(help="A run of `anystate train digits`.")] = None,
    table: Annotated[Path | None, typer.Option(help="A run of `anystate table fit adult`.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Images, and captions, per point.")] = 300,
    rows: Annotated[int, typer.Option(min=1, help="Table rows per point.")] = 2000,
    out: Out = Path("runs/samplers"),
    device: Device = None,
) -> None:
    """Quality against network evaluations (NFE) of every sampler; the same command resumes an interrupted one."""
    from ..configs.runs import resolve

    runs = [run for run in (digits, table) if run is not None]
    if not runs:
        raise ValueError("nothing to measure: give --digits RUN, --table RUN or both")
    for run in runs:
        resolve(run)
    from .studies.samplers import compare_samplers

    compare_samplers(digits, table, out, n, rows, str(choose_device(device)), console)


@app.command("scaling")
@app.command("growth", hidden=True)
def bench_scaling(
    size: Size = "tiny", out: Out = Path("runs/scaling"), json: Json = None, device: Device = None
) -> None:
    """How time per sample scales with samples, memory with steps, and a τ-leap with the vocabulary; with plots."""
    from .speed.results import ResultLog
    from .speed.scaling import measure_scaling

    where = choose_device(device)
    measure_scaling(size, where, ResultLog(where, json), out)


@app.command("all")
def bench_all(
    json: Annotated[Path, typer.Option("-o", "--out", "--json", help="Write the results to this JSON file.")] = Path(
        "runs/bench/all.json"
    ),
    html: Annotated[Path | None, typer.Option(help="Write an HTML page with plots.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes only, to check that everything runs.")] = False,
    minutes: Annotated[float, typer.Option(help="Start no further benchmark after so many minutes.")] = 8.0,
    device: Device = None,
) -> None:
    """All benchmarks of speed in one run, compared with the plain reference."""
    from .speed.all import run_all

    raise typer.Exit(run_all(choose_device(device), json, html, quick, 60.0 * minutes, console))


@app.command("kernels")
def bench_kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="Operation to measure; repeat for several. Default: all.")
    ] = None,
    size: Annotated[Literal["tiny", "small", "official"], typer.Option(help="Shapes of the tensors.")] = "small",
    json: JsonOut = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar plot of the share of the floor (.png).")] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Registers, shared memory and spills per GPU generation; no GPU.")
    ] = False,
    device: Device = None,
) -> None:
    """Every kernel compared with its floor, PyTorch eager, torch.compile and kernels of other packages."""
    from .speed.kernels import run

    raise typer.Exit(run(op, size, json, plot, compile_only, device))


@app.command("counts")
def bench_counts(
    json: Json = None,
    before: Annotated[
        Path | None, typer.Option(help="Counts of an earlier commit, written by this command, to compare with.")
    ] = None,
) -> None:
    """Memory traffic of the official blocks, kernels of a table's step, launches and registers, without a GPU."""
    require_path("--before:", before)
    from .speed.counts import run

    run(json, before)


@app.command("data", cls=renamed({"--samples": "--n", "--batch": "--batch-size"}))
def bench_data(
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Samples of the synthetic data set.")] = 8192,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 256,
    batches: Annotated[int, typer.Option(min=1, help="Timed batches per loader and round.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the table shows medians.")] = 5,
    folder: Annotated[
        Path | None,
        typer.Option(help="On the disk to measure; default the temporary one."),
    ] = None,
    json: JsonOut = None,
) -> None:
    """The packed loader, DALI and webdataset, compared with single .npy files behind a PyTorch DataLoader."""
    require_path("--folder:", folder)
    from .speed.data import run

    run(n, batch_size, batches, rounds, folder, json, console)


@app.command("table", cls=renamed({"--given": "--condition", "--rows": "--n"}))
def bench_table(
    quality: Annotated[bool, typer.Option("--quality", help="Trend and MLE as in the paper's Tables 2 and 3.")] = False,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Conditional rows compared with filtered unconditional ones.")
    ] = False,
    imputation: Annotated[
        bool, typer.Option("--imputation", help="Imputed cells compared with scikit-learn and with mean or mode.")
    ] = False,
    sets: Annotated[str, typer.Option(help="Data sets, separated by commas.")] = "adult",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    recipe: Annotated[str, typer.Option(help="Shipped table configs, separated by commas.")] = "default",
    one_fit: Annotated[
        bool, typer.Option("--one-fit", help="Fit once; the seeds are those of sampling, as in the paper.")
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", help="MLE: fit 4 hyper-parameter settings instead of 36.")] = False,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--n",
            min=1,
            help="Rows: --conditional, per condition, default 200; speed, default 512, on a GPU 32,561.",
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="--conditional: conditioned columns, separated by commas; repeat for several sets of them."),
    ] = None,
    pool: Annotated[int, typer.Option(min=1, help="--conditional: unconditional rows to filter.")] = 40_000,
    draws: Annotated[int, typer.Option(min=1, help="--imputation: samples that a mean is taken over.")] = 20,
    share: Annotated[float, typer.Option(min=0, max=1, help="--imputation: share of cells removed.")] = 0.2,
    limit: Annotated[int | None, typer.Option(min=1, help="--imputation: test rows, at most.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets; default ANYSTATE_DATA/tabular.")] = None,
    out: Out = Path("runs/table_quality"),
    steps: Annotated[int, typer.Option(min=1, help="Speed: timed steps of each implementation.")] = 30,
    official_steps: Annotated[int, typer.Option(min=1, help="Speed: steps of the official sampler.")] = 1000,
    compile: Compile = "always",
    trace: Trace = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Speed compared with the plain reference; or quality beside published numbers, conditional sampling, imputation.

    Measurements of quality are kept in --out: the same command resumes an interrupted one.
    """
    if not (quality or conditional or imputation):
        from .speed.results import ResultLog
        from .speed.table import speed

        where = choose_device(device)
        speed(where, ResultLog(where, json), recipe, compile, steps, n, official_steps, trace)
        return
    from .table.quality import quality as run
    from .table.recipes import fits, recipes
    from .table.tasks import Tasks

    names, kinds = sets.split(","), recipe.split(",")
    if quality:
        grid = "fast" if fast else "official"
        run(names, range(seeds), kinds, recipes(out, one_fit, device), data, out / "rows.json", grid, console)
    columns = [part.split(",") for part in condition or ["education,sex", "education,sex,race"]]
    for kind in kinds:
        tasks = Tasks(names, range(seeds), kind, fits(out, device), out, data, console)
        if conditional:
            tasks.conditional(columns, n or 200, pool)
        if imputation:
            tasks.imputation(draws, share, limit)


@app.command("schedules")
def bench_schedules(
    override: Annotated[list[str] | None, typer.Argument(help="Settings of the config, key=value.")] = None,
    config: Annotated[str, typer.Option(help="A config with one image and one text modality.")] = "schedules/digits",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant.")] = 3,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Joint samples per run.")] = 500,
    variants: Annotated[str, typer.Option(help="Variants, separated by commas.")] = ",".join(VARIANTS),
    out: Out = Path("runs/schedules"),
    device: Device = None,
) -> None:
    """Decoupled and tied noise times at equal training budget; the same command resumes an interrupted one."""
    from ..configs.load import load_config

    names = parse_choices("--variants", variants, VARIANTS)
    load_config(config, override)
    from .studies.schedules import compare_schedules

    compare_schedules(config, override or [], names, seeds, n, out, choose_device(device), console)


@app.command("precisions")
def bench_precisions(
    override: Annotated[list[str] | None, typer.Argument(help="Settings of the config, key=value.")] = None,
    config: Annotated[str, typer.Option(help="A config with network.kind: mmdit.")] = "digits",
    steps: Annotated[int, typer.Option(min=10, help="Training steps.")] = 800,
    precisions: Annotated[str, typer.Option(help="Precisions, separated by commas.")] = "fp32,bf16,fp8",
    json: JsonOut = None,
    device: Device = None,
) -> None:
    """Training in fp8 beside bf16 and fp32, all else equal: losses, and quality of samples."""
    from .speed.results import ResultLog
    from .studies.precisions import PRECISIONS, compare_precisions

    names, where = parse_choices("--precisions", precisions, PRECISIONS), choose_device(device)
    with tempfile.TemporaryDirectory() as out:
        compare_precisions(config, override or [], steps, names, Path(out), ResultLog(where, json), where)
