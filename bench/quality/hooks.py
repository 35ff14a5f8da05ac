"""Sample galleries and evaluations of the EMA weights during training."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ...kernels import Rng
from ...sample.folder import write_sheet
from ...sample.pipeline import Pipeline
from ...train.data.examples import presence
from ...train.trainer import Trainer
from .agreement import Agreement, Judges
from .attribute_classifier import AttributeClassifier, fit_classifier
from .digits import DigitClassifier, is_digits, measure
from .evaluation import Evaluation
from .metrics import LabelAgreement
from .roles import has_pixels, image_and_text, images_of
from .samples import Samples

N_SHOWN = 16  # samples of a gallery
MAX_SAMPLES = 128  # of every direction in an evaluation during training


def save_galleries(trainer: Trainer) -> None:
    """Write joint samples and samples conditioned on each modality of held-out data to OUT/samples/."""
    pipeline = trainer.ema_pipeline()
    held_out = trainer.test_data.batch(trainer.config.seed, 0, range(N_SHOWN), N_SHOWN)
    cases: dict[str, dict[str, Tensor]] = {"joint": {}}
    for m, parts in pipeline.names.items():
        has = torch.stack(
            [held_out.get(presence(k), torch.ones(N_SHOWN, dtype=torch.bool)).cpu() for k in parts.values()]
        )
        cases[f"given_{m}"] = {k: held_out[k].cpu()[has.all(0)] for k in parts.values()}
    for name, conditions in cases.items():
        sampled, n = set(pipeline.space) - set(conditions), min([N_SHOWN, *map(len, conditions.values())])
        if n and sampled and sampled <= set(trainer.learned()):  # what is never learned has to be a condition
            sheet = trainer.out / "samples" / f"{trainer.state.step:08d}_{name}.png"
            write_sheet(pipeline, pipeline.sample(conditions, n=n), sheet)


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Losses on held-out data, with the same times and noise at every step, and sample metrics where there are any.

    Images and captions of digits: `digits.measure`; with the arrays base and modifier (emoji):
    `metrics.LabelAgreement`; any other mix, but for latents of images: `Agreement`.
    """
    pipeline = trainer.ema_pipeline()
    values = _held_out_losses(trainer, pipeline)
    evaluation = _evaluation(trainer, pipeline)
    pair = image_and_text(pipeline) if len(pipeline.modalities) == 2 else None
    if pair and LabelAgreement.applies(evaluation):
        return values | (_digits if is_digits(trainer.test_data, pair[1]) else _labels)(trainer, evaluation, pair)
    decodes_quickly = all(has_pixels(pipeline, m) for m in images_of(pipeline.config))  # not latents
    if decodes_quickly and Agreement.applies(evaluation):
        found = Agreement(evaluation, _judges(trainer)).measure()
        values |= {f"agreement/{name}": entry["value"] for name, entry in found.items()}
    return values


def _held_out_losses(trainer: Trainer, pipeline: Pipeline) -> dict[str, float]:
    """Mean loss of every process over whole batches of held-out data, where examples have it."""
    data = trainer.test_data
    size = min(trainer.config.train.batch, len(data))
    batches = len(data) // size
    times = trainer.state.times.without_conditions()
    means: dict[str, list[float]] = {m: [] for m in pipeline.net.outputs}
    for step in range(batches):
        x0 = {m: x.to(trainer.device) for m, x in data.batch(0, step, range(size), size).items()}
        present = {m: x0.pop(presence(m)) for m in pipeline.space if presence(m) in x0}
        rng = Rng(trainer.config.seed, torch.arange(size, device=trainer.device), step)
        t, _ = times(pipeline.space, rng)
        t |= {m: torch.where(has, t[m], 1.0) for m, has in present.items()}
        for m, loss in pipeline.space.losses(pipeline.net, x0, t, rng, list(means)).items():
            loss = loss[present[m]] if m in present else loss
            means[m] += [float(loss.mean())] if len(loss) else []
    return {f"held_out/{m}": sum(mean / len(own) for mean in own) for m, own in means.items() if own}


def _evaluation(trainer: Trainer, pipeline: Pipeline) -> Evaluation:
    """A few samples of every direction."""
    test, seed = trainer.test_data, trainer.config.seed
    settings = {"seed": seed, "steps": trainer.config.sample.steps, "precision": pipeline.precision()}
    samples = Samples(pipeline, test, None, settings)
    return Evaluation(pipeline, trainer.train_data, test, samples, min(len(test), MAX_SAMPLES), seed)


def _digits(trainer: Trainer, evaluation: Evaluation, pair: tuple[str, str]) -> dict[str, float]:
    """The metrics of the demo."""
    classifier = DigitClassifier(trainer.train_data, pair[0])
    quality = measure(evaluation.pipeline, classifier, evaluation.test, n=200, seed=trainer.config.seed)
    return {f"quality/{name}": value for name, value in dataclasses.asdict(quality).items()}


def _labels(trainer: Trainer, evaluation: Evaluation, pair: tuple[str, str]) -> dict[str, float]:
    """The metrics `labels` of `anystate eval`."""
    values = LabelAgreement(evaluation, _classifier(trainer, *pair)).measure()
    return {f"labels/{name}": entry["value"] for name, entry in values.items()}


@functools.lru_cache(maxsize=1)
def _classifier(trainer: Trainer, image: str, text: str) -> AttributeClassifier:
    return fit_classifier(trainer.train_data, trainer.test_data, image, text)


@functools.lru_cache(maxsize=1)
def _judges(trainer: Trainer) -> Judges:
    return Judges(trainer.pipeline, trainer.train_data, trainer.test_data, trainer.config.seed)
