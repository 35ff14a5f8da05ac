"""`anystate bench samplers`: sample quality against the number of function evaluations (NFE) of every sampler.

NFE is counted per sample; a guided evaluation counts once, because both of its branches are one batch. Digits: the
Fréchet distance of images sampled given captions, in principal components of the real images, and the share of captions
of held-out images that name a wrong digit. Adult: 1 − Shape and 1 − Trend of synthetic rows. The dotted line is real
held-out data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from ...model.provenance import provenance
from ...model.storage import atomic_write
from ...sample import SAMPLERS, Sampler, sample
from ...sample.pipeline import Pipeline
from ...train.data import digits
from ...train.data.bundled import load_bundled
from ...train.data.load import load_data, with_data
from ...train.synthesizer import TableSynthesizer
from ..quality.frechet import frechet, moments
from ..quality.roles import images_of, texts_of
from ..table.columns import roles_of
from ..table.metrics import density
from .sampler_figure import plot, title_of

STEPS = (2, 4, 6, 10, 20, 40)
TABLE_STEPS = (5, 10, 20, 50)
COMPONENTS = 16
TABLE_SAMPLERS = (  # (numerical, categorical); without guidance, categorical euler and ancestral give the same samples
    ("dpmpp_2m", "first_hitting"),
    ("dpmpp_2m", "ancestral"),
    ("heun", "ancestral"),
    ("euler", "euler"),
    ("euler_sde", "tau_leap"),
)
IMAGE_PANEL = "digits: Fréchet distance of (guided) pictures given captions"  # as stored in results
TEXT_PANEL = "digits: captions of held-out pictures that are wrong"
MeasuredPoints = set[tuple[str, str, int]]  # (panel, sampler, steps) of points measured before


class CountingNet:
    """A network that counts its evaluations in `nfe`."""

    def __init__(self, net: Callable[..., dict]):
        self.net, self.nfe = net, 0
        self.partial_outputs = getattr(net, "partial_outputs", False)
        self.observes = getattr(net, "observes", ())

    def __call__(self, *args, **options) -> dict:
        self.nfe += 1
        return self.net(*args, **options)


def compare_samplers(
    digits_run: Path | None,
    table_run: Path | None,
    out: Path,
    n: int = 300,
    rows: int = 2000,
    device: str = "cpu",
    console: Console | None = None,
) -> None:
    """Write samplers.json and samplers.png into `out`; points that the JSON file holds are not measured again.

    Args:
        digits_run, table_run: trained runs of `anystate train digits` and `anystate table fit adult`; None leaves
            that part out.
        n: images, and captions, per point. rows: table rows per point.
    """
    out.mkdir(parents=True, exist_ok=True)
    console, file = console or Console(), out / "samplers.json"
    points = _measured(file)
    measured = {(p["panel"], p["sampler"], p["steps"]) for p in points}
    parts: list[Iterable[dict]] = []
    if digits_run is not None:
        parts.append(DigitStudy(digits_run, n, device, measured).points())
    if table_run is not None:
        parts.append(table_points(table_run, rows, device, measured))
    for part in parts:
        for new in part:
            points.append(new)
            atomic_write(file, json.dumps({**provenance(device), "points": points}, indent=1) + "\n")
            line = f"{title_of(new['panel'])}: {new['sampler']}, NFE {new['evaluations']}: {new['value']:.4f}"
            console.print(line, highlight=False)
    plot(points, out / "samplers.png")
    console.print(f"wrote {file} and {out / 'samplers.png'}")


def _measured(file: Path) -> list[dict]:
    """The points of an earlier call, also of a version that named the file curves.json."""
    earlier = file if file.is_file() else file.with_name("curves.json")
    return json.loads(earlier.read_text())["points"] if earlier.is_file() else []


def point(panel: str, sampler: str, steps: int, nfe: int, value: float) -> dict:
    """A point of the figure, as it is stored."""
    return {"panel": panel, "sampler": sampler, "steps": steps, "evaluations": nfe, "value": value}


class DigitStudy:
    """Images given captions by every Gaussian sampler, captions given images by every masked one."""

    def __init__(self, run: Path, n: int, device: str, measured: MeasuredPoints):
        self.pipeline = Pipeline.from_pretrained(run, device=device)
        self.n, self.device, self.measured = n, device, measured
        config = self.pipeline.config
        (self.image,), (self.text,) = images_of(config), texts_of(config)
        self.codec = self.pipeline.codecs[self.text]
        train, test = load_data(with_data(self.pipeline, "digits"), self.pipeline.codecs)
        self.train, self.test = (part.first(slice(None))[self.image] for part in (train, test))
        self.labels = test.labels["digit"]

    def points(self) -> Iterator[dict]:
        yield from self.image_points()
        yield from self.text_points()

    def image_points(self) -> Iterator[dict]:
        space, train = self.pipeline.space, self.train
        prompts = self.codec.encode([digits.captions_of(digit)[0] for digit in np.arange(self.n) % 10])
        features = PrincipalComponents(train)
        if (IMAGE_PANEL, "real", 0) not in self.measured:
            yield point(IMAGE_PANEL, "real", 0, 0, features.distance(self.test, train))
        for method in SAMPLERS[type(space[self.image])]:
            for grid in ("linear", "logsnr"):
                for steps in self._missing(IMAGE_PANEL, f"{method}, {grid}"):
                    samples, nfe = self._sample({self.text: prompts}, {self.image: Sampler(method, grid)}, steps)
                    distance = features.distance(samples[self.image], train)
                    yield point(IMAGE_PANEL, f"{method}, {grid}", steps, nfe, distance)

    def text_points(self) -> Iterator[dict]:
        images, labels = self.test[: self.n], self.labels[: self.n]
        for method in SAMPLERS[type(self.pipeline.space[self.text])]:
            for steps in self._missing(TEXT_PANEL, method):
                samples, nfe = self._sample({self.image: images}, {self.text: Sampler(method)}, steps)
                named = [digits.digit_of(caption) for caption in self.codec.decode(samples[self.text])]
                wrong = float(np.mean([name != int(d) for name, d in zip(named, labels, strict=True)]))
                yield point(TEXT_PANEL, method, steps, nfe, wrong)

    def _missing(self, panel: str, label: str) -> list[int]:
        return [steps for steps in STEPS if (panel, label, steps) not in self.measured]

    def _sample(self, conditions: dict, samplers: dict[str, Sampler], steps: int) -> tuple[dict[str, Tensor], int]:
        """(samples, NFE); `samplers` replace the configured ones."""
        net = CountingNet(self.pipeline.net)
        samples = sample(
            net,
            self.pipeline.space,
            conditions,
            steps=steps,
            guidance=self.pipeline.guidance(True),
            samplers={**self.pipeline.samplers, **samplers},
            batch_size=self.n,
            device=self.device,
        )
        return samples, net.nfe


class PrincipalComponents:
    """Principal components of real images, the features of the Fréchet distance."""

    def __init__(self, real: Tensor):
        flat = real.flatten(1).double()
        self.mean = flat.mean(0)
        _, _, v = torch.linalg.svd(flat - self.mean, full_matrices=False)
        self.axes = v[:COMPONENTS].T

    def project(self, images: Tensor) -> np.ndarray:
        return ((images.clamp(-1, 1).flatten(1).double().cpu() - self.mean) @ self.axes).numpy()

    def distance(self, images: Tensor, real: Tensor) -> float:
        return frechet(*moments(self.project(images)), *moments(self.project(real)))


def table_points(run: Path, n: int, device: str, measured: MeasuredPoints) -> Iterator[dict]:
    """Synthetic rows by every pair of samplers."""
    model = TableSynthesizer.load(run, device=device)
    train, test = load_bundled()
    roles = roles_of(train)
    panels = {name: f"Adult: 1 − {name.title()} of {n:,} new rows" for name in ("shape", "trend")}
    if (panels["shape"], "real", 0) not in measured:
        real = density(train, test.sample(n, random_state=0), roles)
        for name, panel in panels.items():
            yield point(panel, "real", 0, 0, 1.0 - getattr(real, name))
    for numerical, categorical in TABLE_SAMPLERS:
        label = f"{numerical} + {categorical}"
        samplers = {"num": Sampler(numerical), "cat": Sampler(categorical)}
        for steps in TABLE_STEPS:
            if (panels["shape"], label, steps) in measured:
                continue
            table, nfe = synthetic_rows(model, samplers, n, steps)
            quality = density(train, table, roles)
            for name, panel in panels.items():
                yield point(panel, label, steps, nfe, 1.0 - getattr(quality, name))


def synthetic_rows(
    model: TableSynthesizer, samplers: dict[str, Sampler], n: int, steps: int
) -> tuple[pd.DataFrame, int]:
    """(n synthetic rows, NFE per row)."""
    pipeline = model.pipeline_
    net = CountingNet(pipeline.net)
    samples = sample(
        net,
        pipeline.space,
        n=n,
        steps=steps,
        samplers={m: s for m, s in samplers.items() if m in pipeline.space},
        batch_size=n,
        device=next(pipeline.net.parameters()).device,
    )
    (rows,) = pipeline.decode({name: x.cpu() for name, x in samples.items()}).values()
    return rows, net.nfe
