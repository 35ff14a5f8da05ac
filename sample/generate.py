"""`anystate sample`: from a checkpoint and raw conditions to files, chunk by chunk, on any number of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..configs.runs import WEIGHTS, resolve
from ..diffusion import Guidance
from ..model import distributed
from ..model.storage import sha256
from . import KINDS, Sampler, sample
from .background import Behind
from .conditions import ReadRows, Source, conditions, known
from .folder import SampleFolder
from .pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample; None is the config's own setting.

    source: what is given; n: samples of each condition (see `conditions`); chunk: samples per batch, decides rounding.
    """

    source: Source = dataclasses.field(default_factory=Source)
    n: int | None = None
    steps: int | None = None
    guidance: float | None = None
    final_time: float | None = None
    interval: tuple[float, float] | None = None
    sampler: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    chunk: int | None = None
    trajectory: bool = False
    precision: str | None = None


def generate(
    checkpoint: Path,
    request: Request,
    out: Path,
    weights: str = "ema",
    device="cpu",
    force: bool = False,
    read_rows: ReadRows | None = None,
) -> Path:
    """Sample into the folder `out` (see `SampleFolder`) and return the path of its contact sheet.

    The same request goes on where it stopped. Under torchrun every rank makes a share of the chunks; sample i is the
    same on any number of ranks.

    Raises:
        ValueError: anything wrong with the request, before any work; `out` holds something else and not `force`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"--weights must be ema or raw, got {weights!r}")
    device = distributed.start(device)
    system = Pipeline.from_pretrained(checkpoint, weights, device)
    given = conditions(system, request.source, request.n, read_rows)
    if silent := [m for m in system.space if m not in given.given and m not in system.net.head]:
        raise ValueError(f"this model does not generate {silent[0]!r}: give it, --given {silent[0]}=…")
    settings = system.config.sample
    steps = settings.steps if request.steps is None else request.steps
    chunk = settings.batch_size if request.chunk is None else request.chunk
    for option, value in (("--steps: steps", steps), ("--chunk", chunk)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    guidance, samplers = _guidance(system, request, bool(given.given)), _samplers(system, request.sampler)
    path, precision = resolve(checkpoint), system.precision(request.precision)
    files = {"weights": WEIGHTS[weights], "config": "config.yaml"} if distributed.is_main() else {}  # others never look
    identity = {
        **{name: sha256(path / file) for name, file in files.items()},
        "samples": given.total,
        "steps": steps,
        "guidance": dataclasses.asdict(guidance),
        "samplers": {m: dataclasses.asdict(s) for m, s in samplers.items()},
        "seed": request.seed,
        "chunk": chunk,
        "trajectory": request.trajectory,
        "precision": precision,
        "given": given.digest(),
        "level": {m: g.level for m, g in given.given.items()},
    }
    about = {"checkpoint": str(path.resolve()), "weights": weights, "source": dataclasses.asdict(request.source)}
    system.compile_for(given.total * steps)
    folder = SampleFolder(out, system, identity, about, given.total, chunk)
    if distributed.is_main():
        folder.begin(force)
    distributed.barrier()
    missing = folder.missing()
    distributed.barrier()  # nobody writes before everybody has looked
    mine = missing[distributed.rank() :: distributed.world()]

    def keep(samples: range, states: list, values: dict) -> None:
        folder.write_trajectory(states)
        folder.write(samples, values)

    with Behind(device) as behind, _bar(len(mine) * (steps + 1)) as advance:
        for samples in mine:
            film = request.trajectory and samples.start == 0
            result = sample(
                system.net,
                system.space,
                given.rows(samples),
                n=len(samples),
                steps=steps,
                guidance=guidance,
                seed=request.seed,
                samplers=samplers,
                engine=system.config.engine,
                first=samples.start,
                chunk=chunk,
                trajectory=film,
                progress=advance,
                precision=precision,
            )
            values, states = result if film else (result, [])
            behind(keep, samples, states, values)
    distributed.barrier()
    sheet = folder.finish() if distributed.is_main() else out
    distributed.barrier()
    return sheet


def _guidance(system: Pipeline, request: Request, given: bool) -> Guidance:
    """The configured guidance with what the request changes."""
    changes = {"scale": request.guidance, "final_time": request.final_time, "interval": request.interval}
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(system.guidance(given), **changes)


def _samplers(system: Pipeline, kinds: dict[str, str]) -> dict[str, Sampler]:
    samplers = system.samplers
    for m, kind in kinds.items():
        known(system, "--sampler", m)
        if kind not in KINDS[type(system.space[m])]:
            allowed = ", ".join(KINDS[type(system.space[m])])
            raise ValueError(f"--sampler {m}: must be one of {allowed}, got {kind!r}")
        samplers[m] = dataclasses.replace(samplers[m], kind=kind)
    return samplers


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A function to call after every network update, which moves the main rank's progress bar."""
    if not distributed.is_main() or not total:
        yield lambda: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)
