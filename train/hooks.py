"""What a run does with its averaged weights while it trains: galleries and evaluations."""

from __future__ import annotations

import dataclasses

import torch

from ..kernels import Rng
from ..sample import sample
from .loop import Trainer
from .quality import Judge, measure
from .sample_files import write_sheet


def save_galleries(trainer: Trainer) -> None:
    """Write joint samples and samples given each modality of held-out data to OUT/samples/."""
    system, settings = trainer.averaged(), trainer.config.sample
    known = trainer.test_data.batch(trainer.config.seed, 0, range(16), 16)
    cases = {"joint": {}, **{f"given_{m}": {m: x} for m, x in known.items()}}
    for name, given in cases.items():
        if not set(known) - set(given) <= set(trainer.learned()):
            continue  # the first stage learns pictures alone: captions must be given
        drawn = sample(
            system.net,
            system.space,
            given,
            n=16,
            steps=settings.steps,
            guidance=system.guidance(bool(given)),
            samplers=system.samplers,
            engine=system.config.engine,
        )
        write_sheet(system, drawn, trainer.out / "samples" / f"{trainer.step:08d}_{name}.png")


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Losses on held-out data, at the same times and noise at every step; for digits also `quality.measure`."""
    system, data = trainer.averaged(), trainer.test_data
    size = min(trainer.config.train.batch, len(data))
    sums: dict[str, float] = {}
    batches = len(data) // size
    for step in range(batches):
        x0 = {m: x.to(trainer.device) for m, x in data.batch(0, step, range(size), size).items()}
        rng = Rng(trainer.config.seed, torch.arange(size, device=trainer.device), step)
        t, _ = dataclasses.replace(trainer.times, hold={})(system.space, rng)
        for m, loss in system.space.losses(system.net, x0, t, rng, list(system.net.head)).items():
            sums[f"held_out/{m}"] = sums.get(f"held_out/{m}", 0.0) + float(loss.mean()) / batches
    if data.labels is None:
        return sums
    quality = measure(system, Judge(trainer.train_data), data, n=200, seed=trainer.config.seed)
    return {**sums, **{f"quality/{name}": value for name, value in dataclasses.asdict(quality).items()}}
