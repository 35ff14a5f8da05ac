"""What a run does with its averaged weights while it trains: galleries and evaluations."""

from __future__ import annotations

import dataclasses
import functools

import torch

from ...kernels import Rng
from ...model.codecs.pixels import PixelCodec
from ...sample.folder import write_sheet
from ...sample.pipeline import Pipeline
from ...train.trainer import Trainer
from .digits import Judge as DigitJudge
from .digits import measure
from .evaluate import Measure, Request
from .judges import Judge, has_judge, judge_of
from .samples import Samples

JUDGED = 128  # samples of every direction that an evaluation within training judges, at most


def save_galleries(trainer: Trainer) -> None:
    """Write joint samples and samples given each modality of held-out data to OUT/samples/."""
    system = trainer.averaged()
    known = trainer.test_data.batch(trainer.config.seed, 0, range(16), 16)
    cases = {"joint": {}, **{f"given_{m}": {m: x} for m, x in known.items()}}
    for name, given in cases.items():
        if not set(known) - set(given) <= set(trainer.learned()):
            continue  # the first stage loss_mask pictures alone: captions must be given
        write_sheet(system, system.sample(given, n=16), trainer.out / "samples" / f"{trainer.step:08d}_{name}.png")


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Losses on held-out data, at the same times and noise at every step; for data with a judge also its measures.

    Digits: `quality.measure`. Sets with the labels base and modifier (emoji): the family `labels` of `evaluate`.
    """
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
        return {**sums, **(_labels(trainer, system) if has_judge(data) and _pixels(system) else {})}
    quality = measure(system, DigitJudge(trainer.train_data), data, n=200, seed=trainer.config.seed)
    return {**sums, **{f"quality/{name}": value for name, value in dataclasses.asdict(quality).items()}}


def _labels(trainer: Trainer, system: Pipeline) -> dict[str, float]:
    """The family `labels` of `evaluate` on a few samples of every direction."""
    n, seed = min(len(trainer.test_data), JUDGED), trainer.config.seed
    settings = {"seed": seed, "steps": trainer.config.sample.steps, "precision": system.precision()}
    samples = Samples(system, trainer.test_data, None, settings)
    measure = Measure(system, trainer.train_data, trainer.test_data, samples, Request(), n, _judge(trainer))
    return {f"labels/{name}": entry["value"] for name, entry in measure.labels()().items()}


@functools.lru_cache(maxsize=1)
def _judge(trainer: Trainer) -> Judge:
    return judge_of(trainer.train_data, trainer.test_data)


def _pixels(system: Pipeline) -> bool:
    return isinstance(system.codecs[system.images[0]], PixelCodec) and bool(system.texts)
