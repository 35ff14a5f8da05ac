"""`anystate sample`: from a checkpoint and raw conditions to files, batch by batch, on any number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..configs.runs import WEIGHTS
from ..diffusion import Guidance
from ..model import distributed
from ..model.storage import sha256
from .background import BackgroundWriter
from .conditions import ConditionSource, ReadRows, processes_of, read_conditions
from .folder import SampleFolder
from .hub import find_checkpoint
from .pipeline import BATCH_SIZE, Pipeline, weights_file
from .progress import progress_bar
from .raw_conditions import Conditions
from .sampler import sample
from .steppers import SAMPLERS, Sampler


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """Settings of `anystate sample`; None is the config's own setting.

    Args:
        source: the conditions.
        n: samples of each condition (see `read_conditions`).
        sampler: {modality or one of its processes: method}; of a modality, for those of its processes that have it.
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
    checkpoint: str | Path,
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
        checkpoint: a run folder, a checkpoint folder, or the id of a model on the Hugging Face hub.
        read_rows: reads the rows of a data set whose rows are conditions, see `read_conditions`.

    Raises:
        ValueError: anything wrong with the request, before any work; `out` holds something else and not `force`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"--weights must be ema or raw, got {weights!r}")
    device = distributed.start(device)
    checkpoint = find_checkpoint(checkpoint)
    pipeline = Pipeline.from_pretrained(checkpoint, weights, device)
    conditions = read_conditions(pipeline, request.source, request.n, read_rows)
    settings = pipeline.config.sample
    steps = settings.steps if request.steps is None else request.steps
    batch_size = request.batch_size or settings.batch_size or min(BATCH_SIZE, conditions.total)
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
        _identity(checkpoint, weights, request, conditions, options),
        {"checkpoint": str(checkpoint.resolve()), "weights": weights, "source": request.source.as_dict()},
        conditions,
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
                uniforms=pipeline.uniforms(options["seed"], samples.start, len(samples)),
                trajectory=film,
                progress=advance,
                **options,
            )
            values, states = result if film else (result, [])
            write(folder.write_trajectory, states)
            write(folder.write, samples, values)


def _identity(path: Path, weights: str, request: SampleRequest, conditions: Conditions, options: dict) -> dict:
    """All settings that determine the samples, as JSON values with the keys of the manifest."""
    files = {"weights": weights_file(path, weights), "config": path / "config.yaml"}
    files = files if distributed.is_main() else {}  # not used on other ranks
    return {
        **{name: sha256(file) for name, file in files.items()},
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
    changes = {"final_time": request.final_time, "interval": request.interval}
    changes = {name: value for name, value in changes.items() if value is not None}
    return Guidance(**{**pipeline.guidance(conditional, request.guidance).model_dump(), **changes})


def _samplers(pipeline: Pipeline, methods: dict[str, str]) -> dict[str, Sampler]:
    """The configured samplers with other methods."""
    samplers = pipeline.samplers
    for name, method in methods.items():
        allowed = {k: SAMPLERS[type(pipeline.space[k])] for k in processes_of(pipeline, "--sampler", name)}
        if not any(method in own for own in allowed.values()):
            listed = dict.fromkeys(own for methods in allowed.values() for own in methods)
            raise ValueError(f"--sampler {name}: must be one of {', '.join(listed)}, got {method!r}")
        own = {k: dataclasses.replace(samplers[k], method=method) for k in allowed if method in allowed[k]}
        samplers |= own
    return samplers
