"""The command line. It parses; bad input ends in one line on standard error and exit code 2.

Values are checked before torch is imported, so help and most errors appear at once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from .bench.commands import app as bench_app
from .bench.table.commands import app as table_app
from .bench.table.commands import require_pandas
from .configs.interruption import handling, raise_interrupted
from .configs.options import (
    CLIP_MODEL,
    METRICS,
    Checkpoint,
    ClipModel,
    CommandInterrupted,
    Commands,
    Device,
    Features,
    Json,
    JsonOut,
    Out,
    Override,
    Precision,
    RunOut,
    SamplingSteps,
    Weights,
    choose_device,
    parse_choices,
    parse_conditions,
    parse_pairs,
    renamed,
    require_path,
)
from .train.data.commands import app as data_app

app = typer.Typer(
    name="anystate",
    cls=Commands,
    help="One diffusion model over any mix of state spaces: train it, sample any part from any other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench", cls=Commands)
app.add_typer(data_app, name="data", cls=Commands)
app.add_typer(table_app, name="table", cls=Commands)
console = Console()


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of training and sampling.")] = 0,
    override: Override = None,
    device: Device = None,
) -> None:
    """Train on real handwritten digits, sample in every direction, measure, and write an HTML report.

    Settings are those of the shipped config digits. The same command resumes an interrupted one.
    """
    from .configs.load import load_config

    load_config("digits", override)
    from .bench.demo.demo import run

    run(out, seed, override or [], choose_device(device), console)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config such as digits.")],
    override: Override = None,
    out: RunOut = None,
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
    screen.print(
        f"resuming {run} at step {trainer.state.step}" if trainer.state.step else trainer.started_from, soft_wrap=True
    )
    trainer.run()
    screen.print(f"trained {trainer.state.step} steps; sample with: anystate sample {run}")
    distributed.stop()


@app.command(cls=renamed({"--given": "--condition", "--level": "--noise-level", "--chunk": "--batch-size"}))
def sample(
    checkpoint: Checkpoint,
    out: Out = Path("samples"),
    n: Annotated[
        int | None,
        typer.Option(
            "-n", "--n", min=1, help="Samples, per condition if there are any; default 16, 1 per prompt or row of data."
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: value of a modality: a caption, in which ▯ is a masked token, a class, numbers, "
            "column=value, …, or the path of an image or an .npy file; repeat for several. NAME alone: taken from "
            "--data."
        ),
    ] = None,
    noise_level: Annotated[
        list[str] | None,
        typer.Option(help="NAME=T: the condition is noised to time T in [0, 1]; default 0, a clean condition."),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH: an image, or a boolean .npy file; white pixels, or true elements, are the condition, the "
            "others are sampled."
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON file of captions, {"text": ["…", …]}.')] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set, as data.source of a config, whose rows are conditions.")
    ] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="Split of --data.")] = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first prompts or rows, at most so many.")
    ] = None,
    context_limit: Annotated[int | None, typer.Option(help="Tokens of a caption that are used, at most.")] = None,
    repeat_text: Annotated[int, typer.Option(min=1, help="Repeat each caption so often, as far as it fits.")] = 1,
    steps: SamplingSteps = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    final_time: Annotated[
        float | None, typer.Option(help="Noise level of the condition in the second evaluation of guidance.")
    ] = None,
    interval: Annotated[tuple[float, float] | None, typer.Option(help="Times between which guidance acts.")] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="NAME=METHOD, e.g. image=dpmpp_2m.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; sample i of a seed is always the same.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples per batch; default the config's.")] = None,
    weights: Weights = "ema",
    precision: Precision = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also write intermediate states of the first samples.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace other samples in the folder.")] = False,
    device: Device = None,
) -> None:
    """Sample a trained model: jointly, any part from any other, or from partly noised conditions.

    CHECKPOINT may also be the id of a model on the Hugging Face hub. The same command resumes an interrupted one; under
    torchrun the ranks share the samples.
    """
    from .configs.locate import is_on_hub
    from .configs.runs import resolve

    require_path("--prompts:", prompts)
    if not is_on_hub(str(checkpoint)):
        resolve(checkpoint)
    conditions = parse_conditions("--condition", condition)
    noise_levels = dict(parse_pairs("--noise-level", noise_level))
    masks, samplers = dict(parse_pairs("--mask", mask)), dict(parse_pairs("--sampler", sampler))

    from .model import distributed
    from .sample.conditions import ConditionSource
    from .sample.generate import SampleRequest, generate
    from .train.data.load import read_rows

    source = ConditionSource(
        conditions,
        noise_level=noise_levels,
        mask=masks,
        prompts=prompts,
        data=data,
        split=split,
        limit=limit,
        context_limit=context_limit,
        repeat_text=repeat_text,
    )
    request = SampleRequest(
        source,
        n=n,
        steps=steps,
        guidance=guidance,
        final_time=final_time,
        interval=interval,
        sampler=samplers,
        seed=seed,
        batch_size=batch_size,
        trajectory=trajectory,
        precision=precision,
    )
    sheet = generate(checkpoint, request, out, weights, choose_device(device), force, read_rows)
    if distributed.is_main():
        console.print(f"wrote {sheet}")
    distributed.stop()


@app.command("import-official")
def import_official(
    source: Annotated[
        str, typer.Argument(help="An official .pt snapshot, a .safetensors file, a folder with one, or a hub id.")
    ],
    override: Annotated[
        list[str] | None, typer.Argument(help="With --table: settings that the weights do not determine.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder.")] = Path("runs/official"),
    vae: Annotated[str | None, typer.Option(help="Autoencoder: folder or hub id; default sd-vae-ft-mse.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="CLIP tokenizer: folder or hub id.")] = None,
    table: Annotated[
        str | None,
        typer.Option(help="SOURCE is of the official tabular code; folder or name of the data set it was trained on."),
    ] = None,
    weights: Annotated[
        Literal["ema", "raw"] | None, typer.Option(help="With --table: use these as both EMA and raw weights.")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads of a network with qk_rmsnorm: false, default 8; others show them."),
    ] = None,
) -> None:
    """Convert weights of the official code to a run folder for `anystate sample` or `anystate table sample`."""
    if table is None and (override or weights is not None):
        raise ValueError("settings and --weights belong to --table")
    if table is not None and heads is not None:
        raise ValueError("--heads is for text and images; with --table, set network.heads=N")
    if table is not None:
        require_pandas()
        from .model.official.import_table import import_table
        from .train.data.bundled import BUNDLED

        report = import_table(Path(source), out, BUNDLED.get(table, table), weights, override or [])
    else:
        from .model.official.import_text_image import import_official as import_text_image

        report = import_text_image(source, out, vae, tokenizer, heads)
    for line in report.lines():
        console.print(line, markup=False, highlight=False)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None, typer.Option(help="Data set, as data.source of a config; default the run's own data.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help=f"Any of {','.join(METRICS)}; auto: those that apply and need no download.")
    ] = "auto",
    n: Annotated[
        int | None, typer.Option("-n", "--n", min=2, help="Samples per direction; default one per held-out example.")
    ] = None,
    steps: SamplingSteps = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of all directions; 1 is none.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples and bounds.")] = 0,
    features: Features = "inception",
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Reference of FID: .npz or .npy statistics, or a folder of images. A missing .npz is computed from "
            "the training data and written."
        ),
    ] = None,
    clip: ClipModel = CLIP_MODEL,
    repeats: Annotated[int, typer.Option(min=2, help="Monte Carlo passes of the likelihood bounds.")] = 8,
    precision: Precision = None,
    weights: Weights = "ema",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Samples, results, report.html; default RUN/eval/STEP, reused.")
    ] = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Measure a trained model in every direction; the same command resumes an interrupted one."""
    from .configs.runs import resolve

    families = parse_choices("--metrics", metrics, (*METRICS, "auto"))
    resolve(checkpoint)
    from .bench.quality.evaluate import EvaluationRequest
    from .bench.quality.evaluate import evaluate as measure
    from .model import distributed

    request = EvaluationRequest(
        data=data,
        metrics=tuple(families),
        n=n,
        steps=steps,
        guidance=guidance,
        seed=seed,
        features=features,
        reference=reference,
        clip=clip,
        repeats=repeats,
        precision=precision,
    )
    results = measure(checkpoint, request, out, weights, choose_device(device), console)
    if json and distributed.is_main():
        _write_json(json, results)
    distributed.stop()


@app.command()
def score(
    images: Annotated[Path, typer.Argument(help="Folder of images, of anystate sample or any other.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="Compute FID against this: .npz or .npy statistics, or a folder of images."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="Compute the CLIP score with this text file, a caption a line; default those sampled."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the statistics of the images to this .npz.")] = None,
    features: Features = "inception",
    clip: ClipModel = CLIP_MODEL,
    size: Annotated[int | None, typer.Option(min=1, help="Resize all images to this side.")] = None,
    json: JsonOut = None,
    device: Device = None,
) -> None:
    """FID and CLIP score of a folder of images from any source."""
    for what, path in (("folder of images", images), ("--reference:", reference), ("--captions:", captions)):
        require_path(what, path)
    if save is not None and save.suffix != ".npz":
        raise ValueError(f"--save {save}: statistics are written to an .npz file")
    from .bench.quality.evaluate import table
    from .bench.quality.score import ScoreRequest
    from .bench.quality.score import score as measure

    values = measure(ScoreRequest(images, reference, captions, save, features, clip, size), choose_device(device))
    if values:
        console.print(table(str(images), values))
    if json:
        _write_json(json, values)


@app.command()
def verify() -> None:
    """Check every kernel against float64, one line each; exit code 1 if one fails."""
    from .bench.speed.verify import verify as check

    raise typer.Exit(0 if check() else 1)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; user errors become one line and exit code 2."""
    # OpenMP threads spin only briefly while they wait: at the default, training is ten times slower as soon as another
    # process runs on the machine; with 0 it is always 40% slower
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from typer.main import get_command

    try:
        with handling(raise_interrupted, signal.SIGTERM):
            code = get_command(app)(args=argv, prog_name="anystate", standalone_mode=False)
    except CommandInterrupted as error:
        message, code = error.args
        if os.environ.get("RANK", "0") == "0":  # one line, not one of every rank
            print(message, file=sys.stderr, flush=True)
        sys.exit(code)
    except Exception as error:
        message = getattr(error, "format_message", None)  # usage errors of the parser
        if message is not None:
            _fail(message().replace("Value error, ", ""))  # a prefix of pydantic's, which newer typer validates with
        # checkpoint and config errors are ValueErrors, a loss that is not finite a FloatingPointError
        if isinstance(error, (ValueError, FloatingPointError, OSError)):
            _fail(str(error))
        if isinstance(error, ModuleNotFoundError) and error.name == "pandas":
            _fail("tables need pandas: pip install 'anystate[table]'")
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _write_json(path: Path, values: dict) -> None:
    import json

    from .model.storage import atomic_write

    atomic_write(path, json.dumps(values, indent=1) + "\n")
