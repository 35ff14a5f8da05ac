"""`anystate demo`: train on handwritten digits, sample in every direction, measure, and write a page to look at."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...configs.load import dump_config, load_config
from ...sample import Given
from ...sample.contact_sheet import contact_sheet
from ...sample.pipeline import Pipeline
from ...train.data.digits import digit_of
from ...train.data.pairs import Pairs
from ...train.provenance import origin
from ...train.trainer import Trainer
from ..quality.digits import Judge, Quality, measure

SHOWN = 16
GOALS = {"text_to_image": 0.95, "image_to_text": 0.93, "joint": 0.85}
MEANING = {
    "text_to_image": "caption → picture: the judge sees the digit asked for",
    "image_to_text": "held-out picture → caption: names the right digit",
    "joint": "both drawn together: caption is grammatical and names what the judge sees",
    "nearest_train_ratio": "distance to the nearest training picture, joint samples over held-out pictures",
}


def run(out: Path, seed: int, overrides: list[str], device: torch.device, console: Console) -> Quality:
    """The whole demo; everything it makes lies in `out`. The same command resumes an interrupted run."""
    began = time.perf_counter()
    config = load_config("digits", [f"seed={seed}", *overrides])
    trainer = Trainer(config, out, device)
    parameters = sum(p.numel() for p in trainer.net.parameters())
    console.print(
        f"Training one model of {parameters:,} parameters on {len(trainer.train_data)} digits and their captions "
        f"({config.train.steps} steps, {device})"
    )
    if trainer.step:
        console.print(f"resuming {out} at step {trainer.step}")
    system = trainer.run()
    trained = trainer.seconds
    judge = Judge(trainer.train_data)
    console.print("Sampling in every direction …")
    quality = measure(system, judge, trainer.test_data, seed=seed, progress=console.is_terminal)
    pictures = Showcase(system, trainer.test_data, seed)
    numbers = dataclasses.asdict(quality)
    seconds = time.perf_counter() - began + trained - trainer.seconds_here
    metrics = {**{k: round(v, 4) for k, v in numbers.items()}, "seconds": round(seconds, 1), "seed": seed}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    here = origin(device)
    page = {
        "metrics": [(MEANING[k], GOALS.get(k), v) for k, v in numbers.items()],
        "judge": judge.accuracy(trainer.test_data),
        "seconds": seconds,
        "trained": trained,
        "parameters": parameters,
        "config": dump_config(config),
        "environment": {**here.pop("versions"), **here},
        "curves": loss_curves(out / "metrics.jsonl"),
        "sections": pictures.sections(),
        "train": len(trainer.train_data),
        "test": len(trainer.test_data),
        "seed": seed,
    }
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    (out / "report.html").write_text(templates.get_template("report.html").render(page))
    console.print(_table(quality))
    console.print(f"{seconds:.0f} seconds in all. Open {out / 'report.html'}")
    return quality


@dataclasses.dataclass
class Showcase:
    """The pictures of the report: a few samples of every direction."""

    system: Pipeline
    test: Pairs
    seed: int

    def sections(self) -> list[dict]:
        """Title, text and embedded picture of each section, in the order of the page."""
        (image,), (text,) = self.system.images, self.system.texts
        codec = self.system.codecs[text]
        prompts = ["a zero", "the digit 1", "number two", "three", "the digit 4", "number five", "a six", "seven"]
        prompts += ["an eight", "the digit 9", "number three", "a seven", "five", "the digit 0", "number eight", "two"]
        asked = codec.encode(prompts)
        known = self.test.images[:SHOWN]
        joint, states = self.draw({}, trajectory=True)
        drawn = self.draw({text: asked})
        named = self.draw({image: known})
        noisy = self.draw({text: Given(asked, 0.5)})
        read = [digit_of(caption) for caption in codec.decode(named[text])]
        wrong = sum(r != int(d) for r, d in zip(read, self.test.labels[:SHOWN], strict=True))
        return [
            self.section("Drawn together", "Neither picture nor caption was given.", joint),
            self.section("Caption → picture", "The caption was given.", drawn),
            self.section(
                "Picture → caption",
                f"Held-out pictures the model never saw; it wrote the captions ({SHOWN - wrong} of {SHOWN} right).",
                {image: known, text: named[text]},
            ),
            self.section(
                "Half-noised caption → picture",
                "Each caption was noised to time 0.5, so about half of its characters are hidden (▯), and the model "
                "drew a picture that agrees with what is left.",
                noisy,
            ),
            {
                "title": "From noise to a sample",
                "text": "One joint sample on its way from time 1 to 0: picture and caption, each with its own clock.",
                "picture": self.strip(states, joint),
            },
        ]

    def draw(self, given: dict, trajectory: bool = False):
        return self.system.sample(given, n=SHOWN, seed=self.seed + 1, trajectory=trajectory)

    def section(self, title: str, words: str, samples: dict[str, Tensor]) -> dict:
        (image,), (text,) = self.system.images, self.system.texts
        pictures = self.system.codecs[image].decode(samples[image])
        captions = self.system.codecs[text].decode(samples[text])
        return {"title": title, "text": words, "picture": embed_png(contact_sheet(pictures, captions))}

    def strip(self, states: list[dict[str, Tensor]], final: dict[str, Tensor]) -> str:
        """A film strip of the first joint sample whose caption is in the grammar."""
        (image,), (text,) = self.system.images, self.system.texts
        readable = [digit_of(c) is not None for c in self.system.codecs[text].decode(final[text])]
        row = readable.index(True) if any(readable) else 0
        chosen = np.unique(np.linspace(0, len(states) - 1, 9).round().astype(int))
        film = {m: torch.stack([states[i][m][row] for i in chosen]) for m in (image, text)}
        pictures = self.system.codecs[image].decode(film[image])
        captions = self.system.codecs[text].decode(film[text])
        return embed_png(contact_sheet(pictures, captions, columns=len(chosen)))


def loss_curves(path: Path) -> str:
    """The logged losses per modality as inline SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name in sorted({key for row in rows for key in row if key.startswith("loss/")}):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name.removeprefix("loss/"), linewidth=1.6)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def embed_png(picture) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _table(quality: Quality) -> Table:
    table = Table(box=None, pad_edge=False)
    for column, justify in (("metric", "left"), ("measured", "right"), ("goal", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    for name, value in dataclasses.asdict(quality).items():
        goal = GOALS.get(name)
        table.add_row(name, f"{value:.3f}", f"≥ {goal}" if goal else "≈ 1", MEANING[name])
    return table
