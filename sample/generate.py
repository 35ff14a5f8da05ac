"""`anystate sample`: from a checkpoint and raw conditions to files, batch by batch, on any number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..configs.runs import WEIGHTS, resolve
from ..diffusion import Guidance
from ..model import distributed
from ..model.storage import sha256
from .background import BackgroundWriter
from .conditions import Conditions, ConditionSource, ReadRows, check_modality, read_conditions
from .folder import SampleFolder
from .pipeline import Pipeline
from .progress import progress_bar
from .sampler import sample
from .steppers import SAMPLERS, Sampler


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """Settings of `anystate sample`; None is the config's own setting.

    Args:
        source: the conditions.
        n: samples of each condition (see `read_conditions`).
        sampler: {modality: method}.
        batch_size: samples per batch; decides rounding.
        trajectory: also write the intermediate states of the first batch.
    """

    source: ConditionSource = dataclasses.field(default_factory=ConditionSource)
    n: int | None = None
    steps: int | None = None
    guidance: float | None = None
    final_time: float | None = None
    interval: tuple[float, float] | None = None
    sampler: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    batch_size: int | None = None
    trajectory: bool = False
    precision: str | None = None

    def __post_init__(self):
        for option, value in (("-n", self.n), ("--steps", self.steps), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")


def generate(
    checkpoint: Path,
    request: SampleRequest,
    out: Path,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    force: bool = False,
    read_rows: ReadRows | None = None,
) -> Path:
    """Sample into the folder `out` (see `SampleFolder`) and return the path of its contact sheet.

    The same request continues where it stopped. Under torchrun every rank computes a part of the batches; sample i is
    the same on any number of ranks.

    Args:
        read_rows: reads the rows of a data set whose rows are conditions, see `read_conditions`.

    Raises:
        ValueError: anything wrong with the request, before any work; `out` holds something else and not `force`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"--weights must be ema or raw, got {weights!r}")
    device = distributed.start(device)
    pipeline = Pipeline.from_pretrained(checkpoint, weights, device)
    conditions = read_conditions(pipeline, request.source, request.n, read_rows)
    whole = [m for m, c in conditions.conditions.items() if c.mask is None]
    if without_head := [m for m in pipeline.space if m not in whole and m not in pipeline.net.head]:
        m = without_head[0]
        raise ValueError(f"this model does not generate {m!r}: make it a condition, --condition {m}=…")
    settings = pipeline.config.sample
    steps = settings.steps if request.steps is None else request.steps
    batch_size = settings.batch_size if request.batch_size is None else request.batch_size
    options = {
        "steps": steps,
        "guidance": _guidance(pipeline, request, bool(conditions.conditions)),
        "samplers": _samplers(pipeline, request.sampler),
        "precision": pipeline.precision(request.precision),
        "seed": request.seed,
        "batch_size": batch_size,
    }
    pipeline.compile_for(conditions.total * steps)
    folder = SampleFolder(
        out,
        pipeline,
        _identity(resolve(checkpoint), weights, request, conditions, options),
        {"checkpoint": str(resolve(checkpoint).resolve()), "weights": weights, "source": request.source.as_dict()},
        conditions.total,
        batch_size,
    )
    if distributed.is_main():
        folder.begin(force)
    distributed.barrier()
    missing = folder.missing()
    distributed.barrier()  # no rank writes before all have listed the missing batches
    _write(
        pipeline, folder, missing[distributed.rank() :: distributed.world()], conditions, options, request.trajectory
    )
    distributed.barrier()
    sheet = folder.finish() if distributed.is_main() else out
    distributed.barrier()
    return sheet


def _write(
    pipeline: Pipeline,
    folder: SampleFolder,
    batches: list[range],
    conditions: Conditions,
    options: dict,
    trajectory: bool,
) -> None:
    """Sample these batches and write them while the next one is sampled."""
    device = next(pipeline.net.parameters()).device
    total = len(batches) * (options["steps"] + 1)
    with BackgroundWriter(device) as write, progress_bar(distributed.is_main(), total) as advance:
        for samples in batches:
            film = trajectory and samples.start == 0
            result = sample(
                pipeline.net,
                pipeline.space,
                conditions.of_samples(samples),
                n=len(samples),
                start_index=samples.start,
                trajectory=film,
                progress=advance,
                **options,
            )
            values, states = result if film else (result, [])
            write(folder.write_trajectory, states)
            write(folder.write, samples, values)


def _identity(path: Path, weights: str, request: SampleRequest, conditions: Conditions, options: dict) -> dict:
    """All settings that determine the samples, as JSON values with the keys of the manifest."""
    files = (
        {"weights": WEIGHTS[weights], "config": "config.yaml"} if distributed.is_main() else {}
    )  # not used on other ranks
    return {
        **{name: sha256(path / file) for name, file in files.items()},
        "samples": conditions.total,
        "steps": options["steps"],
        "guidance": options["guidance"].model_dump(),
        "samplers": {m: dataclasses.asdict(s) for m, s in options["samplers"].items()},
        "seed": options["seed"],
        "batch_size": options["batch_size"],
        "trajectory": request.trajectory,
        "precision": options["precision"],
        "conditions": conditions.digest(),
        "noise_level": {m: c.t for m, c in conditions.conditions.items()},
    }


def _guidance(pipeline: Pipeline, request: SampleRequest, conditional: bool) -> Guidance:
    """The configured guidance with what the request changes."""
    changes = {"scale": request.guidance, "final_time": request.final_time, "interval": request.interval}
    changes = {name: value for name, value in changes.items() if value is not None}
    return Guidance(**{**pipeline.guidance(conditional).model_dump(), **changes})


def _samplers(pipeline: Pipeline, methods: dict[str, str]) -> dict[str, Sampler]:
    """The configured samplers with other methods."""
    samplers = pipeline.samplers
    for m, method in methods.items():
        check_modality(pipeline, "--sampler", m)
        allowed = SAMPLERS[type(pipeline.space[m])]
        if method not in allowed:
            raise ValueError(f"--sampler {m}: must be one of {', '.join(allowed)}, got {method!r}")
        samplers[m] = dataclasses.replace(samplers[m], method=method)
    return samplers
