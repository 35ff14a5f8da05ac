"""`anystate bench table`: training and sampling of a table, ours ("fast" in results) and the reference ("plain").

Sampling is measured twice: both with the shipped sampler and the same random numbers; and ours with the shipped sampler
against the reference with that of the papers, Euler–Maruyama and τ-leaping over 1000 steps. The quality of either is
measured by `bench samplers` and `bench table --quality`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ...configs.load import load_config
from ...diffusion import Space
from ...model.compilation import compile_net
from ...sample import Sampler, sample
from ...sample.table.rows import TableSampler
from ...train.data.bundled import load_bundled
from ...train.data.dataset import InMemory
from ...train.trainer import Trainer
from ..reference import sample as reference
from .results import ResultLog
from .systems import randomize_weights
from .train import ORDER, measure
from .workers import interleave, quantile, workers

OFFICIAL = {"num": Sampler("euler_sde"), "cat": Sampler("tau_leap")}
EQUAL_CELLS = {"cpu": 0.995, "cuda": 0.9}
OFFICIAL_STEPS = 1000


def speed(
    device: torch.device,
    log: ResultLog,
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
    training(device, log, recipe, compile, steps, trace)
    sampling(device, log, recipe, compile, n or (512 if device.type == "cpu" else 32561), official_steps)


def training(
    device: torch.device,
    log: ResultLog,
    recipe: str,
    compile: str = "auto",
    steps: int = 30,
    trace: Path | None = None,
) -> None:
    measure(f"table {recipe}: train", trainer, (recipe, [f"compile={compile}"]), device, log, steps, trace)


def trainer(device: torch.device, settings: list[str], recipe: str, folder: Path | None = None) -> Trainer:
    """A trainer on the bundled training rows of Adult; folder: of its run, default a temporary one."""
    table, _ = load_bundled()
    config = load_config(f"table/{recipe}", settings)
    data = InMemory({next(iter(config.modalities)): table})
    folder = folder or Path(tempfile.mkdtemp(prefix="anystate-bench-"))  # stays empty: these steps write no checkpoint
    return Trainer(config, folder, device, (data, data), quiet=True)


def sampling(
    device: torch.device,
    log: ResultLog,
    recipe: str,
    compile: str,
    n: int,
    official_steps: int = OFFICIAL_STEPS,
    rounds: int = 5,
    steps: int | None = None,
) -> None:
    """Measure sampling n rows.

    Args:
        official_steps: of the official sampler, which only the reference runs.
        steps: of the shipped sampler; default the recipe's.
    """
    each = {e: (device, e, recipe, compile, n, official_steps, steps) for e in ORDER}
    name, about, drawn = f"table {recipe}: sample {n:,} rows", {"rows": n}, {}
    official = f"{name}, plain takes the official {official_steps} steps"
    with workers(calls, each, together=device.type == "cpu") as groups:
        for group in groups:
            drawn |= {implementation: worker("draw").result for implementation, worker in group.items()}
            if set(drawn) == set(ORDER):
                about["equal_cells"] = equal_cells(f"table {recipe}", drawn, device)
            seconds = {e: quantile(times, 0.5) for e, times in interleave(group, "time", rounds).items()}
            rates = {e: n / s for e, s in seconds.items()}
            log.add(f"{name}, same steps", rates, "rows/s", **about)
            log.add(official, {e: rate for e, rate in rates.items() if e == "fast"}, "rows/s", **about)
            if "plain" in group:
                log.add(official, {"plain": n / group["plain"]("official").seconds}, "rows/s", **about)


def equal_cells(name: str, drawn: dict[str, dict], device: torch.device) -> float:
    """The share of cells that agree, the smallest of all parts; ValueError if ours and the reference differ.

    Many stochastic steps of an untrained network amplify rounding: on the CPU, 1,000 steps of the reference agree in
    99.5% of the numbers with themselves after a change of the weights by 6e-8. Compiled code on a GPU rounds otherwise.
    """
    shares = {m: float((abs(fast - drawn["plain"][m]) < 0.05).mean()) for m, fast in drawn["fast"].items()}
    m = min(shares, key=shares.__getitem__)
    if shares[m] < EQUAL_CELLS[device.type]:
        raise ValueError(f"{name}: only {shares[m]:.1%} of the {m} cells agree with the reference")
    return shares[m]


def calls(
    device: torch.device, implementation: str, recipe: str, compile: str, n: int, official_steps: int, steps: int | None
) -> tuple[dict[str, Callable], torch.device]:
    """The functions of a measuring process, with an untrained model of the recipe."""
    pipeline = randomize_weights(trainer(device, ["compile=never"], recipe).pipeline)
    net = pipeline.net.to(device).eval().requires_grad_(False)
    steps, batch_size = steps or pipeline.config.sample.steps, TableSampler(pipeline).batch_rows(n)
    if implementation == "fast" and compile == "always":
        compile_net(net, device, demanded=True, dynamic=True)

    def draw(samplers: dict[str, Sampler], steps: int) -> dict:
        if implementation == "fast":
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
    """Samples 0, …, n − 1 of the reference, in batches."""
    parts = []
    for start in range(0, n, batch_size):
        own = {m: (s.method_of(space[m]), s.time_grid) for m, s in samplers.items()}
        parts.append(reference.sample(net, space, {}, batch_size, steps, own, device=device, start_index=start))
    return {m: torch.cat([part[m] for part in parts])[:n] for m in space}
