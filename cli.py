"""The command line. Bad input ends in one line on standard error and exit code 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .bench.commands import app as bench_app
from .bench.table.commands import app as table_app
from .configs.options import choose_device, parse_pairs
from .train.data.commands import app as data_app

app = typer.Typer(
    name="anystate",
    help="One diffusion model over any mix of state spaces: train it, sample any part from any other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
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
    from .bench.demo.demo import run

    run(out, seed, override or [], choose_device(device), console)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config such as digits.")],
    override: Annotated[list[str] | None, typer.Argument(help="Settings, key=value, e.g. train.lr=1e-3.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; the same folder resumes. Default runs/NAME.")] = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")] = False,
) -> None:
    """Train a model; run the same command again to resume."""
    from .configs.load import dump_config, load_config

    settings = load_config(config, override)
    if dry_run:
        console.print(dump_config(settings), markup=False, highlight=False, end="")
        return
    from .bench.quality.hooks import evaluate, save_galleries
    from .model import distributed
    from .train.trainer import Trainer

    run = out or Path("runs") / settings.name
    trainer = Trainer(settings, run, choose_device(device), on_sample=save_galleries, on_evaluate=evaluate)
    screen = console if distributed.is_main() else Console(quiet=True)
    screen.print(f"resuming {run} at step {trainer.step}" if trainer.step else trainer.started_from, soft_wrap=True)
    trainer.run()
    screen.print(f"trained {trainer.step} steps; sample with: anystate sample {run}")
    distributed.stop()


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")],
    out: Out = Path("samples"),
    n: Annotated[
        int | None,
        typer.Option(
            "-n", "--n", help="Samples, of each condition if one is given; default 16, of prompts and rows 1."
        ),
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE that is known: a caption or a picture's path; repeat for several. NAME alone: from --data."
        ),
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="NAME=T: the given part is known only up to noise level T in [0, 1].")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON file of captions, {"text": ["…", …]}.')] = None,
    data: Annotated[
        str | None, typer.Option(help="Packed data set, .npz of pairs or digits whose rows are conditions.")
    ] = None,
    split: Annotated[str, typer.Option(help="Part of --data: train or test.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Use the first so many prompts or rows.")] = None,
    context_limit: Annotated[int | None, typer.Option(help="Give at most so many tokens of a caption.")] = None,
    repeat_text: Annotated[int, typer.Option(help="Write each caption so often, as far as it fits.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps; default the config's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    final_time: Annotated[float | None, typer.Option(help="Noise level of guidance's second branch.")] = None,
    interval: Annotated[tuple[float, float] | None, typer.Option(help="Times between which guidance acts.")] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="NAME=KIND, e.g. image=dpmpp_2m.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; sample i of a seed is always the same.")] = 0,
    chunk: Annotated[int | None, typer.Option(help="Samples per batch; default the config's.")] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    precision: Annotated[
        str | None, typer.Option(help="Of the network: fp32, bf16, or auto; default the config's.")
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also write the first samples' way from noise.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace other samples in the folder.")] = False,
    device: Device = None,
) -> None:
    """Sample a trained model: jointly, any part from any other, or from partly noised conditions.

    The same command goes on where it stopped; under torchrun the ranks share the work.
    """
    from .model import distributed
    from .sample.conditions import Source
    from .sample.generate import Request, generate
    from .train.data.load import read_rows

    known = [(m, value if separator else None) for m, separator, value in (g.partition("=") for g in given or [])]
    source = Source(known, dict(parse_pairs("--level", level)), prompts, data, split, limit, context_limit, repeat_text)
    kinds = dict(parse_pairs("--sampler", sampler))
    request = Request(source, n, steps, guidance, final_time, interval, kinds, seed, chunk, trajectory, precision)
    sheet = generate(checkpoint, request, out, weights, choose_device(device), force, read_rows)
    if distributed.is_main():
        console.print(f"wrote {sheet}")
    distributed.stop()


@app.command("import-official")
def import_official(
    source: Annotated[
        str, typer.Argument(help="An official .pt snapshot, a .safetensors file, a folder with one, or a hub id.")
    ],
    override: Annotated[list[str] | None, typer.Argument(help="With --table: settings weights do not tell.")] = None,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/official"),
    vae: Annotated[str | None, typer.Option(help="Folder or hub id of the autoencoder; default sd-vae-ft-mse.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id of the CLIP tokenizer.")] = None,
    table: Annotated[
        str | None, typer.Option(help="SOURCE is of the tabular code; folder or name of the set it was trained on.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="With --table: take ema or raw for both; default each.")] = None,
) -> None:
    """Read weights of the official code; `anystate sample`, or `table sample`, takes the result like any other."""
    if table is not None:
        from .bench.table.commands import needs_pandas

        needs_pandas()
        from .model.official.import_table import import_table
        from .train.data.bundled import BUNDLED

        report = import_table(Path(source), out, BUNDLED.get(table, table), weights, override or [])
    else:
        from .model.official.import_text_image import import_official as read

        if override or weights is not None:
            raise ValueError("settings and --weights belong to --table")
        report = read(source, out, vae, tokenizer)
    for line in report.lines():
        console.print(line, markup=False, highlight=False)


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")],
    data: Annotated[
        str | None, typer.Option(help="digits, an .npz, or a packed folder; default what the run was trained on.")
    ] = None,
    metrics: Annotated[str, typer.Option(help="Any of elbo,labels,fid,clip.")] = "elbo,labels",
    n: Annotated[
        int | None,
        typer.Option("-n", "--n", help="Samples per direction; default one per held-out pair."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default the config's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of all directions; 1 is none.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples and bounds.")] = 0,
    features: Annotated[
        str, typer.Option(help="FID's network: inception, a TorchScript file, or module:function.")
    ] = "inception",
    reference: Annotated[
        Path | None,
        typer.Option(help="FID's reference: .npz or .npy statistics, or a folder of pictures. A missing .npz is made."),
    ] = None,
    clip: Annotated[str, typer.Option(help="CLIP model: folder or hub id.")] = "openai/clip-vit-large-patch14",
    repeats: Annotated[int, typer.Option(help="Monte Carlo passes of the bounds.")] = 8,
    precision: Annotated[
        str | None, typer.Option(help="Of the network while it draws: fp32, bf16, or auto; default the config's.")
    ] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    out: Annotated[Path | None, typer.Option(help="Samples and results; default RUN/eval/STEP, reused.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    device: Device = None,
) -> None:
    """Measure a trained model in every direction; the same command goes on where it stopped."""
    from json import dumps

    from .bench.quality.evaluate import Request
    from .bench.quality.evaluate import evaluate as measure
    from .model import distributed
    from .model.storage import atomic_write

    families = tuple(metrics.split(","))
    request = Request(data, families, n, steps, guidance, seed, features, reference, clip, repeats, precision)
    results = measure(checkpoint, request, out, weights, choose_device(device), console)
    if json and distributed.is_main():
        atomic_write(json, dumps(results, indent=1) + "\n")
    distributed.stop()


@app.command()
def score(
    pictures: Annotated[Path, typer.Argument(help="Folder of pictures, of anystate sample or of anything else.")],
    reference: Annotated[
        Path | None, typer.Option(help="FID against this: .npz or .npy statistics, or a folder of pictures.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="CLIP score with these: a text file, a caption a line; default those sampled.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the pictures' statistics in this .npz.")] = None,
    features: Annotated[
        str, typer.Option(help="FID's network: inception, a TorchScript file, or module:function.")
    ] = "inception",
    clip: Annotated[str, typer.Option(help="CLIP model: folder or hub id.")] = "openai/clip-vit-large-patch14",
    size: Annotated[int | None, typer.Option(help="Bring all pictures to this side; default: all have one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    device: Device = None,
) -> None:
    """FID and CLIP score of a folder of pictures, whatever made them."""
    from json import dumps

    from .bench.quality.evaluate import table
    from .bench.quality.score import Request
    from .bench.quality.score import score as measure
    from .model.storage import atomic_write

    request = Request(pictures, reference, captions, save, features, clip, size)
    values = measure(request, choose_device(device))
    if values:
        console.print(table(str(pictures), values))
    if json:
        atomic_write(json, dumps(values, indent=1) + "\n")


@app.command()
def verify() -> None:
    """Check every kernel against float64: one line each, exit code 1 if one fails."""
    from .bench.speed.verify import verify as check

    raise typer.Exit(0 if check() else 1)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; user errors become one line and exit code 2."""
    # OpenMP threads that soon stop spinning while they wait: at the default, training slows tenfold as soon as
    # anything else runs on the machine; at 0 it always loses 40%
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from typer.main import get_command

    from .configs.runs import CheckpointError
    from .train.trainer import NonFiniteLoss

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
