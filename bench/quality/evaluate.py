"""`anystate eval`: how good a trained text-image model is, in every direction, with what it was measured by.

Families of measures, see `train.metrics`:

- elbo: bits per token and per dimension of the held-out pairs, each modality alone and given the other clean.
- labels: for data with a judge (digits, emoji): captions of held-out pictures, pictures of held-out captions, and
  joint pairs, judged by their attributes.
- fid: Fréchet distance of jointly drawn pictures and of pictures of held-out captions.
- clip: CLIP score of joint pairs, of pictures with their prompts, of captions written for real pictures.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...configs.runs import WEIGHTS, resolve
from ...model import distributed
from ...model.codecs.pixels import PixelCodec
from ...model.storage import atomic_write
from ...sample.pipeline import Pipeline
from ...train.data.load import load_data, with_data
from ...train.data.packed.packed import Packed
from ...train.data.pairs import Pairs
from ...train.provenance import origin
from . import captions as reading
from .clip import DEFAULT as CLIP
from .clip import ClipScore
from .elbo import bound
from .fid import INCEPTION, FrechetDistance, Statistics
from .frechet import frechet, moments
from .judges import Judge, judge_of
from .pictures import Pictures
from .samples import DIRECTIONS, Samples

FAMILIES = ("elbo", "labels", "fid", "clip")
REFERENCE = 10_000  # training pictures that reference statistics are made of, at most


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure; None is the config's own setting or the whole held-out part.

    data: digits, an .npz, or a packed folder. metrics: families. n: samples per direction. reference: statistics
    (.npz, .npy) or a folder of pictures; a missing .npz is computed from the training pictures and written.
    """

    data: str | None = None
    metrics: tuple[str, ...] = ("elbo", "labels")
    n: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    features: str = INCEPTION
    reference: Path | None = None
    clip: str = CLIP
    repeats: int = 8
    precision: str | None = None


def evaluate(
    checkpoint: Path,
    request: Request,
    out: Path | None = None,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> dict:
    """Measure a checkpoint; samples and results.json lie in `out`, by default RUN/eval/STEP.

    Results are {family: {measure: {value, error?, ...}}} beside settings, data and environment; families measured
    before with the same settings are kept.

    Raises:
        ValueError: anything wrong with the request, before any sampling.
    """
    console = console or Console()
    if unknown := [m for m in request.metrics if m not in FAMILIES]:
        raise ValueError(f"--metrics {unknown[0]!r} is not one of {', '.join(FAMILIES)}")
    if request.n is not None and request.n < 2:
        raise ValueError(f"--n must be at least 2, got {request.n}")
    if weights not in WEIGHTS:
        raise ValueError(f"--weights must be ema or raw, got {weights!r}")
    device = distributed.start(device)
    folder = resolve(checkpoint)
    system = Pipeline.from_pretrained(folder, weights, device)
    if len(system.images) != 1 or len(system.texts) != 1:
        raise ValueError("anystate eval measures models of one picture and one text modality")
    measured = system if request.data is None else with_data(system, request.data)
    config, (train, test) = measured.config, load_data(measured)
    n = request.n or len(test)
    out = out or folder.parent / "eval" / folder.name
    settings = {
        "checkpoint": str(folder.resolve()),
        "weights": weights,
        "data": config.data.model_dump(mode="json", include={"name", "path", "test_share", "split_seed"}),
        "steps": request.steps or config.sample.steps,
        "guidance": request.guidance or config.sample.guidance.model_dump(mode="json"),
        "joint_guidance": request.guidance or config.model_dump(mode="json")["sample"]["joint_guidance"],
        "samplers": {m: c.sampler.model_dump() for m, c in config.modalities.items()},
        "chunk": config.sample.batch_size,
        "precision": system.precision(request.precision),
        "seed": request.seed,
    }
    samples = Samples(system, test, out, settings, request.guidance, console.is_terminal)
    measure = Measure(system, train, test, samples, request, n)
    steps = {"elbo": measure.elbo, "labels": measure.labels, "fid": measure.fid, "clip": measure.clip}
    prepared = {family: steps[family]() for family in FAMILIES if family in request.metrics}
    results = _earlier(out / "results.json", settings)
    for family, run in prepared.items():
        values = run()
        if distributed.is_main():
            results["results"][family] = values
            results["environment"] = origin(device)
            atomic_write(out / "results.json", json.dumps(results, indent=1) + "\n")
            console.print(table(family, values))
    distributed.barrier()
    return results


class Measure:
    """One method per family: it checks what it needs, and returns the function that measures.

    Args:
        n: samples per direction.
        judge: of the data set; default: fitted when needed.
    """

    def __init__(
        self,
        system: Pipeline,
        train: Pairs | Packed,
        test: Pairs,
        samples: Samples,
        request: Request,
        n: int,
        judge: Judge | None = None,
    ):
        self.system, self.train, self.test, self.samples = system, train, test, samples
        self.request, self.n, self.judge = request, n, judge
        self.image, self.text = system.images[0], system.texts[0]
        self.device = next(system.net.parameters()).device

    def elbo(self):
        few = min(self.n, len(self.test))
        data = self.test.batch(self.request.seed, 0, range(few), few)
        pixels = isinstance(self.system.codecs[self.image], PixelCodec)
        levels = {self.image: int(self.system.config.modalities[self.image].pixel_max) + 1 if pixels else None}

        def run() -> dict:
            if not distributed.is_main():
                return {}
            net, space, values = self.system.net, self.system.space, {}
            for name in self.system.net.head:
                for given in (False, True):
                    args = (given, self.request.repeats, self.request.seed, levels.get(name))
                    got = bound(net, space, data, name, *args, chunk=self.system.config.sample.batch_size)
                    key = f"{name}_given" if given else f"{name}_alone"
                    values[key] = {"value": got.bits, "error": got.error, "unit": got.unit}
                    values[key]["per_sample"] = got.per_sample
            return {"pairs": {"value": few}, **values}

        return run

    def labels(self):
        if not isinstance(self.system.codecs[self.image], PixelCodec):
            raise ValueError("--metrics labels: the judges look at pixels, this model draws latents")
        judge = self.judge or judge_of(self.train, self.test)

        def run() -> dict:
            drawn = {direction: self.samples.draw(direction, self.n) for direction in DIRECTIONS}
            return self._labels(judge, drawn) if distributed.is_main() else {}

        return run

    def _labels(self, judge: Judge, drawn: dict[str, dict[str, Tensor]]) -> dict:
        codec, rows = self.system.codecs[self.text], self.samples.pairs(self.n)
        texts = self.test.texts or [codec.decode(choices) for choices in self.test.captions]
        truth = judge.captions([texts[row][0] for row in rows.tolist()])
        written = codec.decode(drawn["image_to_text"][self.text])
        shown = {d: judge.pictures(drawn[d][self.image]) for d in ("joint", "text_to_image")}
        said = judge.captions(codec.decode(drawn["joint"][self.text]))
        real = reading.agreement(judge.pictures(self.test.images), judge.captions([t[0] for t in texts]))
        values = {
            "image_to_text exact": reading.exact_match(written, [texts[row] for row in rows.tolist()]),
            **_named("image_to_text", reading.agreement(judge.read(written), truth)),
            **_named("text_to_image", reading.agreement(shown["text_to_image"], truth)),
            **judge.nearest(drawn["text_to_image"][self.image], self.test.images[rows]),
            "joint valid": float(np.mean([s is not None for s in said])),
            "joint agree": float(np.mean([s == p for s, p in zip(said, shown["joint"], strict=True)])),
            "joint frechet": frechet(
                *moments(judge.features(drawn["joint"][self.image])), *moments(judge.features(judge.train.images))
            ),
            **_named("judge on real pictures", real),
        }
        return {name: {"value": value} for name, value in values.items()}

    def fid(self):
        shape = self._decode(self.test.images[:1]).shape[1:]
        distance = FrechetDistance(self.request.features, (shape[2], *shape[:2]), self.device)
        reference = self._reference(distance, shape)

        def run() -> dict:
            values = {}
            for direction in ("joint", "text_to_image"):
                drawn = self.samples.draw(direction, self.n)
                if drawn:
                    value = distance(self._decode(drawn[self.image]), reference)
                    values[direction] = {"value": value, "samples": self.n, "reference": reference.n}
            if distributed.is_main():
                real = self._decode(self.test.images)
                values["real held-out pictures"] = {"value": distance(real, reference), "samples": len(real)}
            return values

        return run

    def clip(self):
        score = ClipScore(self.request.clip, self.device)
        codec = self.system.codecs[self.text]

        def run() -> dict:
            values = {}
            for direction in DIRECTIONS:
                if drawn := self.samples.draw(direction, self.n):
                    pictures = self._decode(drawn[self.image])
                    values[direction] = {"value": score(pictures, codec.decode(drawn[self.text])), "samples": self.n}
            if distributed.is_main():
                real = score(self._decode(self.test.images), codec.decode(self.test.captions[:, 0]))
                values["real held-out pairs"] = {"value": real, "samples": len(self.test)}
            return values

        return run

    def _decode(self, x: Tensor) -> np.ndarray:
        """uint8 (n, S, S, C) pictures."""
        return self.system.codecs[self.image].decode(x)

    def _reference(self, distance: FrechetDistance, shape: tuple[int, ...]) -> Statistics:
        """The statistics asked for: read, or computed and kept."""
        name = re.sub(r"[^a-zA-Z0-9.-]+", "_", distance.name)
        path = self.request.reference or self.samples.out / f"reference-{name}.npz"
        if path.is_dir():
            return distance.statistics(Pictures(path, shape))
        if path.exists() or path.suffix != ".npz":
            return Statistics.load(path)
        train = self.train.pairs(REFERENCE) if isinstance(self.train, Packed) else self.train
        statistics = distance.statistics(self._decode(train.images))
        if distributed.is_main():
            statistics.save(path)
        return statistics


def table(family: str, values: dict) -> Table:
    """A row per measure."""
    result = Table(title=family, title_justify="left", box=None, pad_edge=False)
    for heading in ("measure", "value", "±", ""):
        result.add_column(heading, justify="right" if heading in ("value", "±") else "left")
    for name, entry in values.items():
        error = f"{entry['error']:.4f}" if "error" in entry else ""
        value = f"{entry['value']:.4f}" if isinstance(entry["value"], float) else str(entry["value"])
        rest = [entry["unit"]] if "unit" in entry else []
        rest += [f"{entry[key]} {key}" for key in ("samples",) if key in entry]
        result.add_row(name, value, error, ", ".join(rest))
    return result


def _named(prefix: str, shares: dict[str, float]) -> dict[str, float]:
    """Shares of `agreement` as measures: all attributes, their mean, and each."""
    names = {"all": "all attributes", "mean": "attributes"}
    return {f"{prefix} {names.get(name, name)}": value for name, value in shares.items()}


def _earlier(path: Path, settings: dict) -> dict:
    """What was measured before in this folder with these settings."""
    fresh = {"settings": settings, "environment": {}, "results": {}}
    if not path.exists():
        return fresh
    try:
        known = json.loads(path.read_text())
        return known if known["settings"] == settings else fresh
    except (ValueError, KeyError):
        raise ValueError(f"{path} does not hold results of anystate eval: choose another --out") from None
