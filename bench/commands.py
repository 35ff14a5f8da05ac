"""`anystate bench …`: speed, memory and quality, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..configs.options import choose_device

app = typer.Typer(help="Speed, memory and quality, measured side by side.", no_args_is_help=True)
console = Console()

Out = Annotated[Path, typer.Option(help="Folder for everything that is written.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if there is one.")]
Size = Annotated[str, typer.Option(help="official, emoji, digits, tiny or wide.")]
Json = Annotated[Path | None, typer.Option(help="Write the rows here, after each measurement.")]
Compile = Annotated[str, typer.Option(help="torch.compile of the fast engine: always or never.")]
Trace = Annotated[Path | None, typer.Option(help="Folder for the profiler's table and trace.")]


@app.command("train")
def bench_train(
    size: Size = "digits",
    steps: Annotated[int, typer.Option(help="Timed steps of each engine.")] = 30,
    batch: Annotated[int | None, typer.Option(help="Samples a step; default the recipe's.")] = None,
    compile: Compile = "always",
    fp8: Annotated[bool, typer.Option("--fp8", help="train.precision=fp8 beside bf16, speed and losses.")] = False,
    trace: Trace = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Samples per second, step times, MFU and memory of training, beside the plain engine."""
    from .speed import train as of_training
    from .speed.rows import Rows

    where = _bench_device(device, compile, steps=steps)
    if fp8:
        of_training.fp8(size, where, Rows(where, json), compile, steps, batch)
        return
    of_training.train(size, where, Rows(where, json), compile, steps, batch, trace)


@app.command("sample")
def bench_sample(
    size: Size = "digits",
    batch: Annotated[
        str | None, typer.Option(help="Samples at once, separated by commas; default the recipe's.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Steps, separated by commas.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed samplings of each engine.")] = 5,
    compile: Compile = "always",
    json: Json = None,
    device: Device = None,
) -> None:
    """Samples per second, time of an evaluation, latency and memory of sampling, beside the plain engine."""
    from .speed.rows import Rows
    from .speed.sample import sampling

    where = _bench_device(device, compile, rounds=rounds)
    sampling(size, where, Rows(where, json), compile, _numbers("--batch", batch), _numbers("--steps", steps), rounds)


@app.command("curves")
def bench_curves(
    digits: Annotated[Path | None, typer.Option(help="A run of `anystate train digits`.")] = None,
    table: Annotated[Path | None, typer.Option(help="A run of `anystate table fit adult`.")] = None,
    n: Annotated[int, typer.Option(help="Pictures, and captions, a point.")] = 300,
    rows: Annotated[int, typer.Option(help="Rows of a table a point.")] = 2000,
    out: Out = Path("runs/curves"),
    device: Device = None,
) -> None:
    """Quality against network evaluations of every sampler; the same command goes on where it stopped."""
    from .studies.samplers import curves

    if digits is None and table is None:
        raise ValueError("nothing to measure: give --digits RUN, --table RUN or both")
    curves(digits, table, out, n, rows, str(choose_device(device)), console)


@app.command("growth")
def bench_growth(out: Out = Path("runs/growth"), size: Size = "tiny", json: Json = None, device: Device = None) -> None:
    """How cost grows: time a sample with their number, memory with steps, a jump with the vocabulary; with plots."""
    from .speed.rows import Rows
    from .speed.scaling import growth

    where = choose_device(device)
    growth(size, where, Rows(where, json), out)


@app.command("all")
def bench_all(
    json: Annotated[Path, typer.Option(help="Write all rows here.")] = Path("runs/bench/all.json"),
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes only: does everything run?")] = False,
    minutes: Annotated[float, typer.Option(help="Begin no further part after so many minutes.")] = 8.0,
    device: Device = None,
) -> None:
    """Everything above in one run, plain engine beside it, as rows and as a page."""
    from .speed.all import everything

    raise typer.Exit(everything(choose_device(device), json, html, quick, 60.0 * minutes, console))


@app.command("kernels")
def bench_kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="Operation to measure; repeat for several. Default: all.")
    ] = None,
    size: Annotated[str, typer.Option(help="tiny, small or official.")] = "small",
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write bars of the share of the floor here (.png).")] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Registers, shared memory and spills per GPU generation; no GPU.")
    ] = False,
    device: Device = None,
) -> None:
    """Every kernel against its floor, PyTorch eager, torch.compile and well-kept peers."""
    from .speed.kernels import run

    raise typer.Exit(run(op, size, json, plot, compile_only, device))


@app.command("data")
def bench_data(
    samples: Annotated[int, typer.Option(help="In the made-up data set.")] = 8192,
    batch: Annotated[int, typer.Option(help="Samples per batch.")] = 256,
    batches: Annotated[int, typer.Option(help="Measured per way and round.")] = 96,
    rounds: Annotated[int, typer.Option(help="Rounds; the table shows medians.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; default for temporary files.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """The packed loader, DALI and webdataset, against single .npy files behind a PyTorch DataLoader."""
    from .speed.data import run

    run(samples, batch, batches, rounds, folder, json, console)


@app.command("table")
def bench_table(
    quality: Annotated[bool, typer.Option("--quality", help="Trend and MLE as in the paper's Tables 2 and 3.")] = False,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Rows under conditions against unconditional rows filtered to them.")
    ] = False,
    imputation: Annotated[
        bool, typer.Option("--imputation", help="Removed cells filled, against scikit-learn and mean or mode.")
    ] = False,
    sets: Annotated[str, typer.Option(help="Tables, separated by commas.")] = "adult",
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    recipe: Annotated[str, typer.Option(help="Shipped table configs, separated by commas.")] = "default",
    one_fit: Annotated[
        bool, typer.Option("--one-fit", help="Fit once; the seeds are samplings, as in the paper.")
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Fit 4 settings instead of 36 for MLE.")] = False,
    given: Annotated[
        list[str] | None,
        typer.Option(help="--conditional: columns given, separated by commas; repeat for several. Default Adult's."),
    ] = None,
    rows: Annotated[int, typer.Option(help="--conditional: rows wanted under every condition.")] = 200,
    pool: Annotated[int, typer.Option(help="--conditional: unconditional rows to filter.")] = 40_000,
    draws: Annotated[int, typer.Option(help="--imputation: draws of a cell that needs drawing.")] = 20,
    share: Annotated[float, typer.Option(help="--imputation: share of cells removed.")] = 0.2,
    limit: Annotated[int | None, typer.Option(help="--imputation: only so many test rows.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the tables; default ANYSTATE_DATA/tabular.")] = None,
    out: Out = Path("runs/table_quality"),
    steps: Annotated[int, typer.Option(help="Speed: timed steps of each engine.")] = 30,
    n: Annotated[int | None, typer.Option(help="Speed: rows to sample; default 512, on a GPU 32,561.")] = None,
    official_steps: Annotated[int, typer.Option(help="Speed: steps of the official sampler.")] = 1000,
    compile: Compile = "always",
    trace: Trace = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Speed beside the plain engine; or quality: tables × recipes × seeds beside the published numbers, conditions,
    imputation, where the same command goes on where it stopped."""
    if not (quality or conditional or imputation):
        from .speed.rows import Rows
        from .speed.table import speed

        where = _bench_device(device, compile, steps=steps, official_steps=official_steps)
        speed(where, Rows(where, json), recipe, compile, steps, n, official_steps, trace)
        return
    from .table.quality import quality as run
    from .table.recipes import fits, recipes
    from .table.tasks import Tasks

    names, kinds = sets.split(","), recipe.split(",")
    if quality:
        grid = "fast" if fast else "official"
        run(names, range(seeds), kinds, recipes(out, one_fit, device), data, out / "rows.json", grid, console)
    for kind in kinds:
        tasks = Tasks(names, range(seeds), kind, fits(out, device), out, data, console)
        if conditional:
            columns = given or ["education,sex", "education,sex,race"]
            tasks.conditional([part.split(",") for part in columns], rows, pool)
        if imputation:
            tasks.imputation(draws, share, limit)


@app.command("schedules")
def bench_schedules(
    override: Annotated[list[str] | None, typer.Argument(help="Settings of the config, key=value.")] = None,
    config: Annotated[str, typer.Option(help="A config with one picture and one text modality.")] = "schedules/digits",
    seeds: Annotated[int, typer.Option(help="Runs per variant.")] = 3,
    n: Annotated[int, typer.Option("-n", "--n", help="Joint samples per run.")] = 500,
    variants: Annotated[
        str, typer.Option(help="Which, separated by commas.")
    ] = "decoupled,unified,image_only,text_only",
    out: Out = Path("runs/schedules"),
    device: Device = None,
) -> None:
    """Decoupled against tied noise schedules at equal budget; the same command goes on where it stopped."""
    from .studies.schedules import schedules

    schedules(config, override or [], variants.split(","), seeds, n, out, choose_device(device), console)


def _bench_device(name: str | None, compile: str, **counts: int):
    """The device, once the options make sense."""

    if compile not in ("always", "never"):
        raise ValueError(f"--compile must be always or never, got {compile!r}")
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"--{option} must be at least 1, got {count}")
    return choose_device(None if name == "auto" else name)


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers separated by commas, got {text!r}") from None
    if min(numbers) < 1:
        raise ValueError(f"{option} must be at least 1, got {text!r}")
    return numbers
