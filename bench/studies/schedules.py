"""`anystate bench schedules`: must every modality have a time of its own? The ablation of decoupled noise schedules.

Four ways of drawing the training times (t_image, t_text), otherwise the same network, weights at the start, batches,
noise and number of steps:

- decoupled: two independent uniform times, the whole square (the paper, arXiv 2506.07903).
- unified: one uniform time for both, the square's diagonal.
- image_only: only the picture may leave the common clock. Half of the samples lie on the diagonal, in the other half
  the picture has a uniform time of its own while the caption is clean. So the model loss_mask to draw jointly and from a
  caption, but a picture never is a clean condition.
- text_only: the mirror image. Joint drawing and captions of clean pictures.

With two modalities "one decoupled" cannot mean that one has a free time and the other has not: two times of which one
is free are free of each other. What can differ is which departures from the diagonal a model has seen, hence the
definition. A held modality has no loss, so in the last two the caption, or the picture, loss_mask from half the samples.
The published summary of the ablation gives marks and no numbers; `CLAIMS` spells out what it asserts.

Each model is only asked where it was trained: all modalities walk one linear grid of times, nothing is guided (the
second branch of guidance lies off the diagonal), and a clean condition is given as such where that was trained. Where
it was not, the condition is noised anew to the current common time at every step (`Replacing`), the usual way of
conditioning a joint diffusion model, which is only approximate (arXiv 2011.13456, appendix I).
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...configs.config import Config, Image, Text, TimesConfig
from ...configs.load import dump_config, load_config
from ...configs.runs import latest
from ...diffusion import Space
from ...kernels import Draw, Rng
from ...model.storage import atomic_write
from ...sample import Sampler, sample
from ...sample.pipeline import Pipeline
from ...train.data.pairs import Pairs
from ...train.provenance import origin
from ...train.trainer import Trainer
from ..quality.frechet import frechet, moments
from ..quality.judges import Judge, judge_of

VARIANTS = ("decoupled", "unified", "image_only", "text_only")
METRICS = {  # name: (heading, whether more is better)
    "image_frechet": ("Fréchet ↓\njoint pictures", False),
    "text_valid": ("valid ↑\njoint captions", True),
    "agreement": ("agree ↑\njoint pairs", True),
    "text_to_image": ("text → image ↑", True),
    "image_to_text": ("image → text ↑", True),
}
CLAIMS = [  # what is claimed, its measure, who should be better, than whom
    ("decoupled is best on pictures", "image_frechet", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("decoupled is best on pictures", "text_to_image", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("decoupled is best on captions", "text_valid", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("decoupled is best on captions", "image_to_text", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("decoupled is best jointly", "agreement", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("unified is poor on pictures", "image_frechet", ["decoupled", "image_only"], ["unified"]),
    ("unified is poor on pictures", "text_to_image", ["decoupled", "image_only"], ["unified"]),
    ("unified is poor on captions", "text_valid", ["decoupled", "text_only"], ["unified"]),
    ("unified is poor on captions", "image_to_text", ["decoupled", "text_only"], ["unified"]),
    ("image_only helps pictures", "image_frechet", ["image_only"], ["unified", "text_only"]),
    ("image_only helps pictures", "text_to_image", ["image_only"], ["unified", "text_only"]),
    ("text_only helps captions", "text_valid", ["text_only"], ["unified", "image_only"]),
    ("text_only helps captions", "image_to_text", ["text_only"], ["unified", "image_only"]),
]


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained model. Shares, not percent.

    image_frechet: Fréchet distance (judge's features) between jointly drawn pictures and the training ones.
    text_valid: jointly drawn captions that the data set could hold. agreement: joint pairs whose picture, to the
    judge, shows what the caption says. text_to_image: the judge sees what was asked for. image_to_text: captions of
    held-out pictures that say the right thing. seconds: training and sampling.
    """

    variant: str
    seed: int
    image_frechet: float
    text_valid: float
    agreement: float
    text_to_image: float
    image_to_text: float
    seconds: float


class Replacing(Space):
    """A space whose clean conditions are noised anew to the time of the one free modality before the network sees them.

    For networks that know the diagonal of times only. rng: the source of that noise, advanced at every evaluation.
    """

    def __init__(self, space: Space, held: str, rng: Rng):
        super().__init__(space)
        self.held, self.rng, self.asked = held, rng, 0

    def evaluate(self, net, x, t, outputs=None):
        (free,) = set(x) - {self.held}
        low, low_held = self[free].t_min, self[self.held].t_min
        common = low_held + (1.0 - low_held) * (t[free] - low).clamp(min=0.0) / (1.0 - low)
        keys = self.rng.at(self.asked).keys(self.held, Draw.CONDITION)
        self.asked += 1
        noisy = self[self.held].perturb(x[self.held], common, keys)
        return super().evaluate(net, {**x, self.held: noisy}, {**t, self.held: common}, outputs)


def times_of(variant: str, image: str, text: str) -> TimesConfig:
    """How a variant draws its training times; see the module's text.

    Raises:
        ValueError: no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    hold = {"image_only": {text: 0.5}, "text_only": {image: 0.5}}.get(variant, {})
    return TimesConfig(draw="decoupled" if variant == "decoupled" else "unified", hold=hold)


def config_of(variant: str, seed: int, source: str, overrides: list[str]) -> Config:
    """The config of one run: the shipped one with this variant's times and one grid of times for all modalities.

    Raises:
        ValueError: it does not have exactly one picture and one text modality.
    """
    config = load_config(source, [*overrides, f"seed={seed}"])
    images, texts = ([m for m, c in config.modalities.items() if isinstance(c, kind)] for kind in (Image, Text))
    if len(images) != 1 or len(texts) != 1:
        raise ValueError("the ablation needs a config with exactly one picture and one text modality")
    return config.model_copy(update={"times": times_of(variant, images[0], texts[0]), "init": None})


def schedules(
    source: str,
    overrides: list[str],
    variants: list[str],
    seeds: int,
    n: int,
    out: Path,
    device: torch.device,
    console: Console | None = None,
) -> list[Row]:
    """Train and measure what `out/rows.json` lacks, then print the table and the claims.

    Args:
        source, overrides: the config, as for `anystate train`.
        seeds: runs per variant, seeds 0, 1, …
        n: joint samples per run; conditional ones are as many as there are held-out pairs, at most n.

    Raises:
        ValueError: unknown variant, no judge for the data set, or `out` holds rows of other settings.
    """
    console = console or Console()
    if seeds < 1 or n < 2:
        raise ValueError(f"--seeds must be at least 1 and --n at least 2, got {seeds} and {n}")
    configs = {(v, s): config_of(v, s, source, overrides) for s in range(seeds) for v in variants}
    settings = {"config": source, "overrides": overrides, "n": n}
    record = _read(out / "rows.json", settings)
    judge = None
    for (variant, seed), config in configs.items():
        if any((row.variant, row.seed) == (variant, seed) for row in record.rows):
            continue
        trainer = Trainer(config, out / f"{variant}_{seed}", device, quiet=not console.is_terminal)
        judge = judge or judge_of(trainer.train_data, trainer.test_data)
        record.real = record.real or floor(trainer.system, judge, trainer.test_data)
        system = trainer.run()
        if latest(trainer.out) is None:
            trainer.save()
        began = time.perf_counter()
        scores = measure(system, judge, trainer.test_data, variant, n, seed)
        seconds = round(trainer.seconds + time.perf_counter() - began, 1)
        row = Row(variant, seed, **{name: round(value, 5) for name, value in scores.items()}, seconds=seconds)
        record.rows.append(row)
        record.environment = origin(device)
        record.resolved = dump_config(config.model_copy(update={"times": TimesConfig(), "seed": 0}))
        atomic_write(out / "rows.json", json.dumps(dataclasses.asdict(record), indent=1) + "\n")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        console.print(f"{variant} seed {seed}: {shown}, {seconds:.0f} s", highlight=False)
    console.print(table(record.rows, record.real))
    console.print(verdicts(record.rows))
    return record.rows


def measure(system: Pipeline, judge: Judge, test: Pairs, variant: str, n: int, seed: int) -> dict[str, float]:
    """Sample a variant's model in all three directions, in the way that suits it, and judge."""
    (image,), (text,) = system.images, system.texts
    codec = system.codecs[text]
    common = {"steps": system.config.sample.steps, "seed": seed, "samplers": one_clock(system)}
    few = min(n, len(test))
    held_out = test.batch(0, 0, range(few), few)

    def draw(given: dict[str, Tensor]) -> dict[str, Tensor]:
        size = few if given else n
        space = system.space
        if given and variant not in ("decoupled", {text: "image_only", image: "text_only"}[next(iter(given))]):
            device = next(system.net.parameters()).device
            space = Replacing(space, next(iter(given)), Rng(seed, torch.arange(size, device=device)))
        return sample(system.net, space, given, n=size, chunk=size, **common)

    joint = draw({})
    said, shown = judge.captions(codec.decode(joint[text])), judge.pictures(joint[image])
    asked = judge.captions(codec.decode(held_out[text]))
    drawn = judge.pictures(draw({text: held_out[text]})[image])
    named = judge.captions(codec.decode(draw({image: held_out[image]})[text]))
    return {
        "image_frechet": frechet(*moments(judge.features(joint[image])), *moments(judge.features(judge.train.images))),
        "text_valid": _share([s is not None for s in said]),
        "agreement": _share([s is not None and s == p for s, p in zip(said, shown, strict=True)]),
        "text_to_image": _share([a == d for a, d in zip(asked, drawn, strict=True)]),
        "image_to_text": _share([a == r for a, r in zip(asked, named, strict=True)]),
    }


def one_clock(system: Pipeline) -> dict[str, Sampler]:
    """The configured samplers, brought to one linear grid of times for all modalities."""
    kinds = {m: None if s.kind == "first_hitting" else s.kind for m, s in system.samplers.items()}
    return {m: Sampler("ancestral" if kinds[m] is None and m in system.texts else kinds[m]) for m in kinds}


def floor(system: Pipeline, judge: Judge, test: Pairs) -> dict[str, float]:
    """What real held-out pairs score: Fréchet distance to the training pictures, agreement of pictures and captions."""
    said = judge.captions(system.codecs[system.texts[0]].decode(test.captions[:, 0]))
    real = moments(judge.features(test.images))
    return {
        "image_frechet": round(frechet(*real, *moments(judge.features(judge.train.images))), 5),
        "agreement": round(_share([s == p for s, p in zip(said, judge.pictures(test.images), strict=True)]), 5),
    }


def table(rows: list[Row], real: dict[str, float]) -> Table:
    """Mean ± standard deviation over seeds, a row per variant."""
    table = Table(title="Noise schedules at equal budget", title_justify="left", box=None, pad_edge=False)
    table.add_column("times")
    for heading, _ in METRICS.values():
        table.add_column(heading, justify="right")
    table.add_column("seeds", justify="right")
    table.add_column("seconds", justify="right")
    for variant in VARIANTS:
        mine = [row for row in rows if row.variant == variant]
        if not mine:
            continue
        cells = []
        for name in METRICS:
            mean, spread = summary(mine, name)
            cells.append(f"{mean:.3f}" + (f" ± {spread:.3f}" if len(mine) > 1 else ""))
        table.add_row(variant, *cells, str(len(mine)), f"{np.mean([row.seconds for row in mine]):.0f}")
    real = {name: f"{value:.3f}" for name, value in real.items()}
    table.add_row("real held-out pairs", *(real.get(name, "–") for name in METRICS), "", "")
    return table


def verdicts(rows: list[Row]) -> Table:
    """Each claim of the published summary: the weaker of the better group against the stronger of the other group.

    "holds" and "fails" need a difference of the means beyond two standard errors; "open" is within them.
    """
    table = Table(title="Published summary, here", title_justify="left", box=None, pad_edge=False)
    for heading in ("claim", "measure", "", "by", "± 2 s.e.", "closest pair"):
        table.add_column(heading, justify="right" if heading in ("by", "± 2 s.e.") else "left")
    for claim, name, better, worse in CLAIMS:
        by = {v: [row for row in rows if row.variant == v] for v in (*better, *worse)}
        if not all(len(mine) > 1 for mine in by.values()):
            continue
        stats = {v: (*summary(mine, name), len(mine)) for v, mine in by.items()}
        word, difference, error, pair = verdict(stats, name, better)
        table.add_row(claim, name, word, f"{difference:+.3f}", f"{error:.3f}", " vs ".join(pair))
    table.caption = None if table.row_count else "needs two seeds of every variant"
    return table


def verdict(stats: dict[str, tuple[float, float, int]], name: str, better: list[str]) -> tuple:
    """(word, difference of means counted so that positive supports the claim, two standard errors of it, the pair).

    stats: {variant: (mean, standard deviation, seeds)}, the closest pair across the two groups decides.
    """
    sign = 1.0 if METRICS[name][1] else -1.0
    found = []
    for b in better:
        for w in stats.keys() - set(better):
            error = 2.0 * float(np.hypot(*(stats[v][1] / stats[v][2] ** 0.5 for v in (b, w))))
            found.append((sign * (stats[b][0] - stats[w][0]), error, (b, w)))
    difference, error, pair = min(found)
    word = "open" if abs(difference) <= error else "holds" if difference > 0 else "fails"
    return word, difference, error, pair


def summary(rows: list[Row], name: str) -> tuple[float, float]:
    """Mean and standard deviation (n − 1) over runs; 0 for a single one."""
    values = [getattr(row, name) for row in rows]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


@dataclasses.dataclass
class Record:
    """What rows.json holds: where and when it was measured beside the rows."""

    settings: dict
    rows: list[Row] = dataclasses.field(default_factory=list)
    real: dict[str, float] = dataclasses.field(default_factory=dict)
    environment: dict = dataclasses.field(default_factory=dict)
    resolved: str = ""


def _read(path: Path, settings: dict) -> Record:
    """The rows so far.

    Raises:
        ValueError: the file is of something else, or of other settings.
    """
    if not path.exists():
        return Record(settings)
    try:
        raw = json.loads(path.read_text())
        record = Record(**{**raw, "rows": [Row(**row) for row in raw["rows"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not hold rows of this benchmark: {error}") from None
    if record.settings != settings:
        raise ValueError(f"{path} holds rows of {record.settings}, asked for {settings}: choose another --out")
    return record


def _share(values: list[bool]) -> float:
    return float(np.mean(values))
