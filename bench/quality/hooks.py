"""Sample galleries and evaluations of the EMA weights during training."""

from __future__ import annotations

import dataclasses
import functools

import torch

from ...kernels import Rng
from ...sample.folder import write_sheet
from ...sample.pipeline import Pipeline
from ...train.trainer import Trainer
from .attribute_classifier import AttributeClassifier, fit_classifier, has_classifier
from .digits import DigitClassifier, measure
from .metrics import Evaluation, LabelAgreement
from .samples import Samples

MAX_LABEL_SAMPLES = 128  # of every direction in an evaluation during training


def save_galleries(trainer: Trainer) -> None:
    """Write joint samples and samples conditioned on each modality of held-out data to OUT/samples/."""
    pipeline = trainer.ema_pipeline()
    held_out = trainer.test_data.batch(trainer.config.seed, 0, range(16), 16)
    cases = {"joint": {}}
    for m, x in held_out.items():
        cases[f"given_{m}"] = {m: x}
    for name, conditions in cases.items():
        sampled = set(held_out) - set(conditions)
        if not sampled <= set(trainer.learned()):
            continue  # stage 1 trains images only, so captions have to be a condition
        sheet = trainer.out / "samples" / f"{trainer.state.step:08d}_{name}.png"
        write_sheet(pipeline, pipeline.sample(conditions, n=16), sheet)


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Losses on held-out data, with the same times and noise at every step, and sample metrics where there are any.

    Digits: `digits.measure`. Data with the arrays base and modifier (emoji): `metrics.LabelAgreement`.
    """
    pipeline, data = trainer.ema_pipeline(), trainer.test_data
    values = _held_out_losses(trainer, pipeline)
    if data.labels is not None:
        classifier = DigitClassifier(trainer.train_data)
        quality = measure(pipeline, classifier, data, n=200, seed=trainer.config.seed)
        for name, value in dataclasses.asdict(quality).items():
            values[f"quality/{name}"] = value
    elif has_classifier(data) and pipeline.texts:
        values |= _labels(trainer, pipeline)
    return values


def _held_out_losses(trainer: Trainer, pipeline: Pipeline) -> dict[str, float]:
    """Mean loss of every modality over whole batches of held-out data."""
    data = trainer.test_data
    size = min(trainer.config.train.batch, len(data))
    batches = len(data) // size
    times = dataclasses.replace(trainer.state.times, condition_prob={})
    means: dict[str, float] = {}
    for step in range(batches):
        x0 = {m: x.to(trainer.device) for m, x in data.batch(0, step, range(size), size).items()}
        rng = Rng(trainer.config.seed, torch.arange(size, device=trainer.device), step)
        t, _ = times(pipeline.space, rng)
        for m, loss in pipeline.space.losses(pipeline.net, x0, t, rng, list(pipeline.net.head)).items():
            means[f"held_out/{m}"] = means.get(f"held_out/{m}", 0.0) + float(loss.mean()) / batches
    return means


def _labels(trainer: Trainer, pipeline: Pipeline) -> dict[str, float]:
    """The metrics `labels` of `anystate eval` on a few samples of every direction; none for latents."""
    n, seed = min(len(trainer.test_data), MAX_LABEL_SAMPLES), trainer.config.seed
    settings = {"seed": seed, "steps": trainer.config.sample.steps, "precision": pipeline.precision()}
    samples = Samples(pipeline, trainer.test_data, None, settings)
    evaluation = Evaluation(pipeline, trainer.train_data, trainer.test_data, samples, n)
    if not evaluation.in_pixels:
        return {}
    values = LabelAgreement(evaluation, _classifier(trainer)).measure()
    return {f"labels/{name}": entry["value"] for name, entry in values.items()}


@functools.lru_cache(maxsize=1)
def _classifier(trainer: Trainer) -> AttributeClassifier:
    return fit_classifier(trainer.train_data, trainer.test_data)
