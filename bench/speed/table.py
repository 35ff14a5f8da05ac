"""`anystate bench table`: training and sampling of a table by both engines, and our sampler against the official one.

Sampling is measured twice: engine against engine with the shipped sampler, draw for draw; and the shipped sampler of
the fast engine against what the papers do, the plain engine with Euler–Maruyama and τ-leaping over 1000 steps. Quality
at either is measured by `bench samplers` and `bench table --quality`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ...configs.load import load_config
from ...configs.table import TableConfig
from ...diffusion import Space
from ...model.codecs.table.codec import TableCodec
from ...model.codecs.table.schema import infer
from ...model.compilation import compile_net
from ...sample import Sampler, sample
from ...sample.table.rows import TableSampler
from ...train.data.bundled import load_bundled
from ...train.table_trainer import TableTrainer
from ..reference import sample as reference
from .results import ResultLog
from .systems import shaken
from .train import ORDER, measure
from .workers import interleave, quantile, workers

OFFICIAL = {"num": Sampler("euler_sde"), "cat": Sampler("tau_leap")}
OFFICIAL_STEPS = 1000


def speed(
    device: torch.device,
    rows: ResultLog,
    recipe: str = "default",
    compile: str = "auto",
    steps: int = 30,
    n: int | None = None,
    official_steps: int = OFFICIAL_STEPS,
    trace: Path | None = None,
) -> None:
    """Measure training and sampling of a shipped table recipe on Adult.

    Args:
        n: rows sampled; by default 512 on the CPU and all 32,561 on a GPU.
        official_steps: of the official sampler.
    """
    training(device, rows, recipe, compile, steps, trace)
    sampling(device, rows, recipe, compile, n or (512 if device.type == "cpu" else 32561), official_steps)


def training(
    device: torch.device,
    rows: ResultLog,
    recipe: str,
    compile: str = "auto",
    steps: int = 30,
    trace: Path | None = None,
) -> None:
    measure(f"table {recipe}: train", trainer, (recipe, [f"compile={compile}"]), device, rows, steps, trace)


def trainer(device: torch.device, settings: list[str], recipe: str, folder: Path | None = None) -> TableTrainer:
    """A trainer on the bundled training rows of Adult; folder: of its run, default a temporary one."""
    table, _ = load_bundled()
    config = load_config(f"table/{recipe}", settings, TableConfig)
    codec = TableCodec.fit(table, infer(table), config.encoding, config.seed)
    folder = folder or Path(tempfile.mkdtemp(prefix="anystate-bench-"))  # nothing is written there: no step saves
    return TableTrainer(config, folder, codec, *codec.encode(table, config.seed), device=device, quiet=True)


def sampling(
    device: torch.device,
    rows: ResultLog,
    recipe: str,
    compile: str,
    n: int,
    official_steps: int = OFFICIAL_STEPS,
    rounds: int = 5,
    steps: int | None = None,
) -> None:
    """Measure sampling n rows.

    Args:
        official_steps: of the official sampler, which only the plain engine runs.
        steps: of the shipped sampler; default the recipe's.
    """
    each = {e: (device, e, recipe, compile, n, official_steps, steps) for e in ORDER}
    name, about, drawn = f"table {recipe}: sample {n:,} rows", {"rows": n}, {}
    official = f"{name}, plain takes the official {official_steps} steps"
    with workers(calls, each, together=device.type == "cpu") as groups:
        for group in groups:
            drawn |= {engine: worker("draw").result for engine, worker in group.items()}
            if set(drawn) == set(ORDER):
                check_cells(f"table {recipe}", drawn)
            seconds = {e: quantile(times, 0.5) for e, times in interleave(group, "time", rounds).items()}
            rates = {e: n / s for e, s in seconds.items()}
            rows.add(f"{name}, same steps", rates, "rows/s", **about)
            rows.add(official, {e: rate for e, rate in rates.items() if e == "fast"}, "rows/s", **about)
            if "plain" in group:
                rows.add(official, {"plain": n / group["plain"]("official").seconds}, "rows/s", **about)


def check_cells(name: str, drawn: dict[str, dict]) -> None:
    """Raise ValueError unless nearly all cells of both engines are equal."""
    for m, fast in drawn["fast"].items():
        equal = float((abs(fast - drawn["plain"][m]) < 0.05).mean())
        if equal < 0.995:
            raise ValueError(f"{name}: only {equal:.1%} of the engines' {m} cells agree")


def calls(
    device: torch.device, engine: str, recipe: str, compile: str, n: int, official_steps: int, steps: int | None
) -> tuple[dict[str, Callable], torch.device]:
    """The functions of a measuring process, with an untrained model of the recipe."""
    pipeline = shaken(trainer(device, ["compile=never"], recipe).pipeline)
    net = pipeline.net.to(device).eval().requires_grad_(False)
    steps, batch_size = steps or pipeline.config.sample.steps, TableSampler(pipeline).batch_rows(n)
    if engine == "fast" and compile == "always":
        compile_net(net, device, demanded=True, dynamic=True)

    def draw(samplers: dict[str, Sampler], steps: int) -> dict:
        if engine == "fast":
            return sample(net, pipeline.space, n=n, steps=steps, samplers=samplers, batch_size=batch_size)
        return reference_batches(net, pipeline.space, n, steps, samplers, batch_size, device)

    official = {m: OFFICIAL[m] for m in pipeline.space}
    functions = {
        "draw": lambda: {m: x.cpu().numpy() for m, x in draw(pipeline.samplers, steps).items()},
        "time": lambda: draw(pipeline.samplers, steps) and None,
        "official": lambda: draw(official, official_steps) and None,
    }
    return functions, device


def reference_batches(
    net: torch.nn.Module,
    space: Space,
    n: int,
    steps: int,
    samplers: dict[str, Sampler],
    batch_size: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Samples 0, …, n − 1 of the reference, batch by batch."""
    parts = []
    for start in range(0, n, batch_size):
        own = {m: (s.method, s.time_grid) for m, s in samplers.items()}
        parts.append(reference.sample(net, space, {}, batch_size, steps, own, device=device, start_index=start))
    return {m: torch.cat([part[m] for part in parts])[:n] for m in space}
