"""The command line. Bad input ends in one line on standard error and exit code 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .cli_data import app as data_app
from .cli_table import app as table_app

app = typer.Typer(
    name="anystate",
    help="One diffusion model over any mix of state spaces: train it, sample any part from any other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Speed, memory and quality, measured side by side.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(table_app, name="table")
console = Console()

Out = Annotated[Path, typer.Option(help="Folder for everything that is written.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if there is one.")]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the whole run.")] = 0,
    override: Annotated[list[str] | None, typer.Argument(help="Settings of configs/digits.yaml, key=value.")] = None,
    device: Device = None,
) -> None:
    """Train on real handwritten digits, sample in every direction, measure, and write a page to look at."""
    from .train.demo import run

    run(out, seed, override or [], _device(device), console)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config such as digits.")],
    override: Annotated[list[str] | None, typer.Argument(help="Settings, key=value, e.g. train.lr=1e-3.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; the same folder resumes. Default runs/NAME.")] = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")] = False,
) -> None:
    """Train a model; run the same command again to resume."""
    from .configs import schema

    settings = schema.load(config, override)
    if dry_run:
        console.print(schema.dump(settings), markup=False, highlight=False, end="")
        return
    from .train import distributed
    from .train.hooks import evaluate, save_galleries
    from .train.loop import Trainer

    run = out or Path("runs") / settings.name
    trainer = Trainer(settings, run, _device(device), on_sample=save_galleries, on_evaluate=evaluate)
    screen = console if distributed.is_main() else Console(quiet=True)
    screen.print(f"resuming {run} at step {trainer.step}" if trainer.step else trainer.started_from)
    trainer.run()
    screen.print(f"trained {trainer.step} steps; sample with: anystate sample {run}")
    distributed.stop()


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")],
    out: Out = Path("samples"),
    n: Annotated[int, typer.Option(help="Samples; per given value if something is given.")] = 16,
    given: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE that is known: a caption, or a picture's path. Repeat for several."),
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="NAME=T: the given part is known only up to noise level T in [0, 1].")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; default the config's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    final_time: Annotated[float | None, typer.Option(help="Noise level of guidance's second branch.")] = None,
    interval: Annotated[tuple[float, float] | None, typer.Option(help="Times between which guidance acts.")] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="NAME=KIND, e.g. image=dpmpp_2m.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; sample i of a seed is always the same.")] = 0,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    trajectory: Annotated[bool, typer.Option("--trajectory", help="Also write each sample's way from noise.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    device: Device = None,
) -> None:
    """Sample a trained model: jointly, any part from any other, or from partly noised conditions."""
    from .train.generate import Request, generate

    request = Request(
        given=_pairs("--given", given),
        level=dict(_pairs("--level", level)),
        n=n,
        steps=steps,
        guidance=guidance,
        final_time=final_time,
        interval=interval,
        sampler=dict(_pairs("--sampler", sampler)),
        seed=seed,
        trajectory=trajectory,
    )
    sheet = generate(checkpoint, request, out, weights, _device(device), force)
    console.print(f"wrote {sheet}")


@app.command()
def verify() -> None:
    """Check every kernel against float64: one line each, exit code 1 if one fails."""
    from .bench.verify import verify as check

    raise typer.Exit(0 if check() else 1)


@bench.command("kernels")
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
    from .bench.kernels import run

    raise typer.Exit(run(op, size, json, plot, compile_only, device))


@bench.command("table")
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
    device: Device = None,
) -> None:
    """Tables × recipes × seeds beside the published numbers; the same command goes on where it stopped."""
    from .bench.table_quality import quality as run
    from .bench.table_recipes import fits, recipes
    from .bench.table_tasks import Tasks

    if not (quality or conditional or imputation):
        raise ValueError("bench table needs at least one of --quality, --conditional and --imputation")
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


def main(argv: list[str] | None = None) -> None:
    """Run the command line; user errors become one line and exit code 2."""
    # OpenMP threads that soon stop spinning while they wait: at the default, training slows tenfold as soon as
    # anything else runs on the machine; at 0 it always loses 40%
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from typer.main import get_command

    from .train.checkpoint import CheckpointError
    from .train.loop import NonFiniteLoss

    try:
        code = get_command(app)(args=argv, prog_name="anystate", standalone_mode=False)
    except Exception as error:
        message = getattr(error, "format_message", None)  # usage errors of the parser
        if message is not None:
            _fail(message())
        if isinstance(error, (ValueError, NonFiniteLoss, CheckpointError, OSError)):
            _fail(str(error))
        if type(error).__name__ == "Abort":
            _fail("interrupted")
        raise
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to resume")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _device(name: str | None):
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def _pairs(option: str, values: list[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for value in values or []:
        name, separator, rest = value.partition("=")
        if not separator or not name:
            raise ValueError(f"{option} {value!r} is not of the form NAME=VALUE")
        pairs.append((name, rest))
    return pairs
