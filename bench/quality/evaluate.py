"""`anystate eval`: the quality of a trained model, of any mix of modalities, in every direction.

Families of metrics:

- elbo: bits per token and per dimension of held-out examples, each modality alone and given the others clean.
- labels: for images and captions with an attribute classifier (digits, emoji): captions of held-out images, images of
  held-out captions, and joint pairs, compared by their attributes.
- fid: Fréchet distance of the images of every direction.
- clip: CLIP score of joint pairs, of images with their prompts, of captions generated for real images.
- agreement: for any mix: classes given the rest, and the rest given classes, see `agreement`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...configs.config import Config
from ...configs.runs import WEIGHTS, resolve
from ...model import distributed
from ...model.build import build_samplers
from ...model.provenance import provenance
from ...model.storage import atomic_write
from ...sample.pipeline import Pipeline
from ...train.data.load import load_data, with_data
from .clip import CLIP
from .evaluation import Evaluation
from .fid import INCEPTION
from .metrics import METRICS
from .report import rows, write_report
from .samples import Samples, upgraded

AUTO = "auto"  # the families that apply to the model and its data, of those that need no download


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """Settings of an evaluation; None is the config's own setting or all held-out examples.

    data: as `data.source` of a config. metrics: families, or auto. n: samples per direction. reference: FID statistics
    (.npz, .npy) or a folder of images; a missing .npz is computed from the training images and written.
    """

    data: str | None = None
    metrics: tuple[str, ...] = (AUTO,)
    n: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    features: str = INCEPTION
    reference: Path | None = None
    clip: str = CLIP
    repeats: int = 8
    precision: str | None = None

    def check(self) -> None:
        """Raise ValueError if a value is not allowed."""
        unknown = [family for family in self.metrics if family not in (*METRICS, AUTO)]
        if unknown:
            raise ValueError(f"--metrics {unknown[0]!r} is not one of {', '.join(METRICS)}, {AUTO}")
        if self.n is not None and self.n < 2:
            raise ValueError(f"--n must be at least 2, got {self.n}")


def evaluate(
    checkpoint: Path,
    request: EvaluationRequest,
    out: Path | None = None,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> dict:
    """Measure a checkpoint, and write samples, results.json and report.html into `out`, by default RUN/eval/STEP.

    Returns:
        Settings, environment and results, {family: {metric: {value, error?, ...}}}. Families that were measured before
        with the same settings are kept.

    Raises:
        ValueError: anything wrong with the request, before any sampling.
    """
    console = console or Console()
    request.check()
    if weights not in WEIGHTS:
        raise ValueError(f"--weights must be ema or raw, got {weights!r}")
    device = distributed.start(device)
    folder = resolve(checkpoint)
    pipeline = Pipeline.from_pretrained(folder, weights, device)
    config = pipeline.config if request.data is None else with_data(pipeline, request.data)
    if config.data is None:
        raise ValueError(f"{checkpoint} names no data set of its own: name one with --data")
    settings = _settings(folder, weights, pipeline, config, request)
    train, test = load_data(config, pipeline.codecs)
    out = out or folder.parent / "eval" / folder.name
    samples = Samples(pipeline, test, out, settings, request.guidance, console.is_terminal)
    evaluation = Evaluation(
        pipeline,
        train,
        test,
        samples,
        n=request.n or len(test),
        seed=request.seed,
        repeats=request.repeats,
        features=request.features,
        reference=request.reference,
        clip=request.clip,
    )
    results = _measure(evaluation, request.metrics, settings, console)
    if distributed.is_main():
        console.print(f"wrote {write_report(out, samples, results)}", soft_wrap=True)
    return results


def _measure(evaluation: Evaluation, families: tuple[str, ...], settings: dict, console: Console) -> dict:
    """Check all families, then measure one after the other and write results.json after each."""
    file = evaluation.samples.out / "results.json"
    applying = [family for family in METRICS if AUTO in families and METRICS[family].applies(evaluation)]
    metrics = {family: METRICS[family](evaluation) for family in METRICS if family in (*families, *applying)}
    results = _earlier(file, settings)
    for family, metric in metrics.items():
        values = metric.measure()
        if distributed.is_main():
            results["results"][family] = values
            results["environment"] = provenance(evaluation.device)
            atomic_write(file, json.dumps(results, indent=1) + "\n")
            console.print(table(family, values))
    distributed.barrier()
    return results


def _settings(folder: Path, weights: str, pipeline: Pipeline, config: Config, request: EvaluationRequest) -> dict:
    """Everything that determines the samples. config: with the data of the evaluation."""
    sampling = config.model_dump(mode="json")["sample"]
    samplers = build_samplers(config, pipeline.names)
    return {
        "checkpoint": str(folder.resolve()),
        "weights": weights,
        "data": config.data.model_dump(mode="json", include={"source", "test_share", "split_seed"}),
        "steps": request.steps or config.sample.steps,
        "guidance": request.guidance or sampling["guidance"],
        "joint_guidance": request.guidance or sampling["joint_guidance"],
        "samplers": {k: {"kind": c.method, "grid": c.time_grid} for k, c in samplers.items()},
        "chunk": config.sample.batch_size,
        "precision": pipeline.precision(request.precision),
        "seed": request.seed,
    }


def table(title: str, values: dict[str, dict]) -> Table:
    """A table with one row per metric."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("metric", "value", "±", ""):
        result.add_column(heading, justify="right" if heading in ("value", "±") else "left")
    for row in rows(values):
        result.add_row(*row)
    return result


def _earlier(path: Path, settings: dict) -> dict:
    """The results in the file if they have these settings, else results without values."""
    fresh = {"settings": settings, "environment": {}, "results": {}}
    if not path.exists():
        return fresh
    try:
        stored = json.loads(path.read_text())
        return {**stored, "settings": settings} if upgraded(stored["settings"]) == settings else fresh
    except (ValueError, KeyError):
        raise ValueError(f"{path} does not hold results of anystate eval: choose another --out") from None
