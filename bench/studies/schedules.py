"""`anystate bench schedules`: ablation of decoupled noise schedules (a time per modality) at equal budget.

Four ways of drawing the training times (t_image, t_text). The network, initial weights, batches, noise and number of
steps are the same:

- decoupled: two independent uniform times, the whole unit square (the paper, arXiv 2506.07903).
- unified: one uniform time for both, the diagonal of the square.
- image_only: half of the samples are on the diagonal; in the other half the image has a uniform time and the caption
  is clean. The model learns to sample jointly and given a caption, but never sees a clean image as a condition.
- text_only: the same with image and text exchanged: joint samples, and captions given clean images.

A schedule in which exactly one of two modalities is decoupled does not exist, because if one time is independent of the
other, both are. What can differ is which points off the diagonal are trained, hence this definition. A clean condition
has no loss, so in the last two variants the caption, or the image, is trained on half of the samples. The paper's
summary of its ablation gives no numbers; `schedule_tables.CLAIMS` lists its statements.

Each model is evaluated only at times at which it was trained: all modalities follow one linear time grid, without
guidance (whose second branch is off the diagonal), and a clean condition is used as such where that was trained.
Elsewhere the condition is noised to the current common time at every step (`ReplacementSpace`), the usual way to
condition a joint diffusion model, which is approximate (arXiv 2011.13456, appendix I).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ...configs.config import Config, TimesConfig
from ...configs.load import dump_config, load_config
from ...configs.runs import latest
from ...diffusion import Space
from ...kernels import Draw, Rng
from ...model.provenance import provenance
from ...model.storage import atomic_write
from ...sample import Sampler, sample
from ...sample.pipeline import Pipeline
from ...train.data.examples import Examples
from ...train.trainer import Trainer
from ..quality.attribute_classifier import AttributeClassifier, fit_classifier
from ..quality.frechet import frechet, moments
from ..quality.roles import image_and_text, images_of, texts_of
from .schedule_tables import VARIANTS, VariantResult, claims_table, results_table


class ReplacementSpace(Space):
    """A space in which the network sees a clean condition noised to the time of the one generated modality.

    For networks that were trained on the diagonal of times only.

    Args:
        condition: the modality that is conditioned on.
        rng: of that noise; every evaluation draws new noise.
    """

    def __init__(self, space: Space, condition: str, rng: Rng):
        super().__init__(space)
        self.condition, self.rng, self.evaluations = condition, rng, 0

    def evaluate(self, net: Callable[..., dict], x: dict[str, Tensor], t: dict[str, Tensor], *args, **options) -> dict:
        condition = self.condition
        (generated,) = set(x) - {condition}
        low, low_condition = self[generated].t_min, self[condition].t_min
        common = low_condition + (1.0 - low_condition) * (t[generated] - low).clamp(min=0.0) / (1.0 - low)
        keys = self.rng.at(self.evaluations).keys(condition, Draw.CONDITION)
        self.evaluations += 1
        noisy = self[condition].perturb(x[condition], common, keys)
        return super().evaluate(net, {**x, condition: noisy}, {**t, condition: common}, *args, **options)


def times_of(variant: str, image: str, text: str) -> TimesConfig:
    """The training times of a variant, see the docstring of this module.

    Raises:
        ValueError: no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    condition_prob = {}
    if variant == "image_only":
        condition_prob = {text: 0.5}
    elif variant == "text_only":
        condition_prob = {image: 0.5}
    return TimesConfig(draw="decoupled" if variant == "decoupled" else "unified", condition_prob=condition_prob)


def config_of(variant: str, seed: int, source: str, overrides: list[str]) -> Config:
    """The config of one run: the shipped one with the times of the variant.

    Raises:
        ValueError: the config does not have exactly one image and one text modality.
    """
    config = load_config(source, [*overrides, f"seed={seed}"])
    images, texts = images_of(config), texts_of(config)
    if len(images) != 1 or len(texts) != 1 or len(config.modalities) != 2:
        raise ValueError("the ablation needs a config with exactly one image and one text modality")
    return config.model_copy(update={"times": times_of(variant, images[0], texts[0]), "init": None})


@dataclasses.dataclass
class Record:
    """The content of rows.json: results with the settings and the environment in which they were measured.

    real: metrics of real held-out pairs. resolved: the config as YAML.
    """

    settings: dict
    rows: list[VariantResult] = dataclasses.field(default_factory=list)
    real: dict[str, float] = dataclasses.field(default_factory=dict)
    environment: dict = dataclasses.field(default_factory=dict)
    resolved: str = ""

    def has(self, variant: str, seed: int) -> bool:
        return any((row.variant, row.seed) == (variant, seed) for row in self.rows)


def compare_schedules(
    source: str,
    overrides: list[str],
    variants: list[str],
    seeds: int,
    n: int,
    out: Path,
    device: torch.device,
    console: Console | None = None,
) -> list[VariantResult]:
    """Train and measure the models that `out/rows.json` lacks, then print the results and the claims.

    Args:
        source, overrides: the config, as for `anystate train`.
        seeds: runs per variant, seeds 0, 1, …
        n: joint samples per run; conditional ones are as many as there are held-out pairs, at most n.

    Raises:
        ValueError: unknown variant, no attribute classifier for the data set, or `out` holds results of other settings.
    """
    console = console or Console()
    if seeds < 1 or n < 2:
        raise ValueError(f"--seeds must be at least 1 and --n at least 2, got {seeds} and {n}")
    configs = {(v, s): config_of(v, s, source, overrides) for s in range(seeds) for v in variants}
    record = _read(out / "rows.json", {"config": source, "overrides": overrides, "n": n})
    classifier = None
    for (variant, seed), config in configs.items():
        if record.has(variant, seed):
            continue
        trainer = Trainer(config, out / f"{variant}_{seed}", device, quiet=not console.is_terminal)
        image, text = image_and_text(trainer.pipeline)
        classifier = classifier or fit_classifier(trainer.train_data, trainer.test_data, image, text)
        record.real = record.real or real_metrics(trainer, classifier)
        row = train_and_measure(trainer, classifier, variant, n, seed)
        record.rows.append(row)
        record.environment = provenance(device)
        record.resolved = dump_config(config.model_copy(update={"times": TimesConfig(), "seed": 0}))
        atomic_write(out / "rows.json", json.dumps(dataclasses.asdict(record), indent=1) + "\n")
        console.print(str(row), highlight=False)
    console.print(results_table(record.rows, record.real))
    console.print(claims_table(record.rows))
    return record.rows


def train_and_measure(
    trainer: Trainer, classifier: AttributeClassifier, variant: str, n: int, seed: int
) -> VariantResult:
    """Train to the end, save a checkpoint and measure the EMA weights."""
    pipeline = trainer.run()
    if latest(trainer.out) is None:
        trainer.save()
    began = time.perf_counter()
    metrics = measure(pipeline, classifier, trainer.test_data, variant, n, seed)
    seconds = round(trainer.seconds + time.perf_counter() - began, 1)
    return VariantResult(variant, seed, **{m: round(value, 5) for m, value in metrics.items()}, seconds=seconds)


def measure(
    pipeline: Pipeline, classifier: AttributeClassifier, test: Examples, variant: str, n: int, seed: int
) -> dict[str, float]:
    """The metrics of a variant's model: n joint samples, and conditional ones of at most n held-out pairs."""
    image, text = image_and_text(pipeline)
    codec = pipeline.codecs[text]
    few = min(n, len(test))
    held_out = test.batch(0, 0, range(few), few)

    joint = draw(pipeline, {}, variant, n, seed)
    written = classifier.caption_attributes(codec.decode(joint[text]))
    shown = classifier.image_attributes(joint[image])
    truth = classifier.caption_attributes(codec.decode(held_out[text]))
    to_image = draw(pipeline, {text: held_out[text]}, variant, few, seed)
    to_text = draw(pipeline, {image: held_out[image]}, variant, few, seed)
    images = classifier.image_attributes(to_image[image])
    captions = classifier.caption_attributes(codec.decode(to_text[text]))
    real = moments(classifier.features(classifier.train))
    return {
        "image_frechet": frechet(*moments(classifier.features(joint[image])), *real),
        "text_valid": _share(caption is not None for caption in written),
        "agreement": _share(a is not None and a == b for a, b in zip(written, shown, strict=True)),
        "text_to_image": _share(a == b for a, b in zip(truth, images, strict=True)),
        "image_to_text": _share(a == b for a, b in zip(truth, captions, strict=True)),
    }


def draw(pipeline: Pipeline, conditions: dict[str, Tensor], variant: str, n: int, seed: int) -> dict[str, Tensor]:
    """n samples at times at which the variant was trained."""
    space = pipeline.space
    if conditions and not _trains_clean(pipeline, variant, next(iter(conditions))):
        device = next(pipeline.net.parameters()).device
        space = ReplacementSpace(space, next(iter(conditions)), Rng(seed, torch.arange(n, device=device)))
    return sample(
        pipeline.net,
        space,
        conditions,
        n=n,
        batch_size=n,
        steps=pipeline.config.sample.steps,
        seed=seed,
        samplers=linear_samplers(pipeline),
    )


def _trains_clean(pipeline: Pipeline, variant: str, condition: str) -> bool:
    """Whether a variant is trained with this modality as a clean condition."""
    return variant == "decoupled" or variant == (
        "image_only" if condition in texts_of(pipeline.config) else "text_only"
    )


def linear_samplers(pipeline: Pipeline) -> dict[str, Sampler]:
    """The configured samplers on one linear time grid; ancestral replaces first_hitting, which has its own times."""
    samplers = {}
    for m, sampler in pipeline.samplers.items():
        method = None if sampler.method == "first_hitting" else sampler.method
        samplers[m] = Sampler("ancestral" if method is None and pipeline.space[m].discrete else method)
    return samplers


def real_metrics(trainer: Trainer, classifier: AttributeClassifier) -> dict[str, float]:
    """Metrics of real held-out pairs: Fréchet distance to the training images, agreement of images and captions."""
    pipeline, test = trainer.pipeline, trainer.test_data.first(slice(None))
    image, text = image_and_text(pipeline)
    written = classifier.caption_attributes(pipeline.codecs[text].decode(test[text]))
    shown = classifier.image_attributes(test[image])
    real = moments(classifier.features(test[image]))
    return {
        "image_frechet": round(frechet(*real, *moments(classifier.features(classifier.train))), 5),
        "agreement": round(_share(a == b for a, b in zip(written, shown, strict=True)), 5),
    }


def _read(path: Path, settings: dict) -> Record:
    """The results so far.

    Raises:
        ValueError: the file holds something else, or results of other settings.
    """
    if not path.exists():
        return Record(settings)
    try:
        raw = json.loads(path.read_text())
        record = Record(**{**raw, "rows": [VariantResult(**row) for row in raw["rows"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not hold results of this benchmark: {error}") from None
    if record.settings != settings:
        raise ValueError(f"{path} holds results of {record.settings}, requested {settings}: choose another --out")
    return record


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))
