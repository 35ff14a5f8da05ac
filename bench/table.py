"""`anystate bench table`: training and sampling of a table by both engines, and our sampler against the official one.

Sampling is measured twice: engine against engine with the shipped sampler, draw for draw; and the shipped sampler of
the fast engine against what the papers do, the plain engine with Euler–Maruyama and τ-leaping over 1000 steps. Quality
at either is measured by `bench curves` and `bench table --quality`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ..configs import schema
from ..configs.table_schema import TableConfig
from ..model.compiling import compile_net
from ..model.table_codec import Encoding, TableCodec
from ..model.table_schema import infer
from ..sample import Sampler, sample
from ..train.engine import ENGINES
from ..train.synthesizer import load_bundled
from ..train.table import TableTrainer
from ..train.table_generate import Generator
from .rows import Rows, in_turns, quantile, workers
from .systems import shaken
from .train import measure

OFFICIAL = {"num": Sampler("euler_sde"), "cat": Sampler("tau_leap")}
OFFICIAL_STEPS = 1000


def speed(
    device: torch.device,
    rows: Rows,
    recipe: str = "default",
    compile: str = "auto",
    steps: int = 30,
    n: int | None = None,
    official_steps: int = OFFICIAL_STEPS,
    trace: Path | None = None,
) -> None:
    """Measure a shipped table recipe on Adult.

    Args:
        n: rows sampled; by default 512 on the CPU and all 32,561 on a GPU.
        official_steps: of the official sampler.
    """
    settings = [f"compile={compile}"]
    measure(f"table {recipe}: train", trainer, (recipe, settings), device, rows, steps, trace)
    sampling(device, rows, recipe, compile, n or (512 if device.type == "cpu" else 32561), official_steps)


def trainer(device: torch.device, engine: str, settings: list[str], recipe: str) -> TableTrainer:
    """A trainer on the bundled training rows of Adult."""
    table, _ = load_bundled()
    config = schema.load(f"table/{recipe}", [*settings, f"engine={engine}"], TableConfig)
    codec = TableCodec.fit(table, infer(table), Encoding(**config.encoding.model_dump()), config.seed)
    folder = Path(tempfile.mkdtemp(prefix="anystate-bench-"))  # nothing is written there: no step saves
    return TableTrainer(config, folder, codec, *codec.encode(table, config.seed), device=device, quiet=True)


def sampling(device: torch.device, rows: Rows, recipe: str, compile: str, n: int, official_steps: int) -> None:
    each = {engine: (device, engine, recipe, compile, n, official_steps) for engine in ("plain", "fast")}
    drawn, seconds, official = {}, {}, None
    with workers(calls, each, together=device.type == "cpu") as groups:
        for group in groups:
            drawn |= {engine: worker("draw").result for engine, worker in group.items()}
            seconds |= {e: quantile(times, 0.5) for e, times in in_turns(group, "time", 5).items()}
            if "plain" in group:
                official = group["plain"]("official").seconds
    for m, fast in drawn["fast"].items():
        equal = float((abs(fast - drawn["plain"][m]) < 0.05).mean())
        if equal < 0.995:
            raise ValueError(f"table {recipe}: only {equal:.1%} of the engines' {m} cells agree")
    name, about = f"table {recipe}: sample {n:,} rows", {"rows": n}
    rows.add(f"{name}, same steps", {e: n / s for e, s in seconds.items()}, "rows/s", **about)
    values = {"plain": n / official, "fast": n / seconds["fast"]}
    rows.add(f"{name}, plain takes the official {official_steps} steps", values, "rows/s", **about)


def calls(device: torch.device, engine: str, recipe: str, compile: str, n: int, official_steps: int):
    """What a measuring process can do with an untrained model of the recipe."""
    system = shaken(trainer(device, engine, ["compile=never"], recipe).system)
    net = system.net.to(device).eval().requires_grad_(False)
    ENGINES[engine].settle(device)
    settings, chunk = system.config.sample, Generator(system).batch_rows(n)
    if engine == "fast" and compile == "always":
        compile_net(net, device, demanded=True, dynamic=True)

    def draw(samplers, steps: int) -> dict:
        return sample(net, system.space, n=n, steps=steps, samplers=samplers, chunk=chunk, engine=engine)

    functions = {
        "draw": lambda: {m: x.cpu().numpy() for m, x in draw(system.samplers, settings.steps).items()},
        "time": lambda: draw(system.samplers, settings.steps) and None,
        "official": lambda: draw({m: OFFICIAL[m] for m in system.space}, official_steps) and None,
    }
    return functions, device
