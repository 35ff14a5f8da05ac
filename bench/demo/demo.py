"""`anystate demo`: train on handwritten digits, sample in every direction, measure, and write an HTML report."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...configs.load import dump_config, load_config
from ...sample import Condition
from ...sample.contact_sheet import contact_sheet
from ...sample.pipeline import Pipeline
from ...train.data.digits import digit_of
from ...train.data.examples import Examples
from ...train.trainer import Trainer
from ..quality.digits import DigitClassifier, Quality, measure
from ..quality.report import count_parameters, embed_png, environment, render
from ..quality.roles import images_of, texts_of

N_SHOWN = 16
GOALS = {"text_to_image": 0.95, "image_to_text": 0.93, "joint": 0.85}
MEANING = {
    "text_to_image": "caption → image: the classifier sees the digit of the caption",
    "image_to_text": "held-out image → caption: the caption names the right digit",
    "joint": "joint samples: the caption is in the grammar and names the digit that the classifier sees",
    "nearest_train_ratio": "distance to the nearest training image, joint samples divided by held-out images",
}
PROMPTS = (
    *("a zero", "the digit 1", "number two", "three", "the digit 4", "number five", "a six", "seven"),
    *("an eight", "the digit 9", "number three", "a seven", "five", "the digit 0", "number eight", "two"),
)


def run(out: Path, seed: int, overrides: list[str], device: torch.device, console: Console) -> Quality:
    """Run the whole demo and write everything into `out`. The same command resumes an interrupted run."""
    began = time.perf_counter()
    config = load_config("digits", [f"seed={seed}", *overrides])
    trainer = Trainer(config, out, device)
    console.print(
        f"Training one model of {count_parameters(trainer.state.net):,} parameters on {len(trainer.train_data)} digits "
        f"and their captions ({config.train.steps} steps, {device})"
    )
    if trainer.state.step:
        console.print(f"resuming {out} at step {trainer.state.step}")
    pipeline = trainer.run()
    trained = trainer.seconds
    (image,) = images_of(config)
    classifier = DigitClassifier(trainer.train_data, image)
    console.print("Sampling in every direction …")
    quality = measure(pipeline, classifier, trainer.test_data, seed=seed, progress=console.is_terminal)
    sections = Showcase(pipeline, trainer.test_data, seed).sections()
    seconds = time.perf_counter() - began + trained - trainer.seconds_here
    metrics = {name: round(value, 4) for name, value in dataclasses.asdict(quality).items()}
    metrics |= {"seconds": round(seconds, 1), "seed": seed}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    report = {
        "metrics": [(MEANING[name], GOALS.get(name), value) for name, value in dataclasses.asdict(quality).items()],
        "accuracy": classifier.accuracy(trainer.test_data),
        "sections": sections,
        "seconds": seconds,
        "trained": trained,
        "seed": seed,
    }
    write_report(out, trainer, report)
    console.print(_table(quality))
    console.print(f"{seconds:.0f} seconds in all. Open {out / 'report.html'}")
    return quality


def write_report(out: Path, trainer: Trainer, values: dict) -> None:
    """Write report.html from its template, with the values and the facts of the run."""
    page = {
        **values,
        "parameters": count_parameters(trainer.state.net),
        "config": dump_config(trainer.config),
        "environment": environment(trainer.device),
        "loss_curves": loss_curves(out / "metrics.jsonl"),
        "train": len(trainer.train_data),
        "test": len(trainer.test_data),
    }
    (out / "report.html").write_text(render(Path(__file__).parent, "report.html", page), encoding="utf-8")


@dataclasses.dataclass
class Showcase:
    """The images of the report: a few samples of every direction."""

    pipeline: Pipeline
    test: Examples
    seed: int

    def __post_init__(self):
        (self.image,), (self.text,) = images_of(self.pipeline.config), texts_of(self.pipeline.config)

    def sections(self) -> list[dict]:
        """Title, text and embedded image of each section, in the order of the page."""
        image, text = self.image, self.text
        codec = self.pipeline.codecs[text]
        prompts = codec.encode(list(PROMPTS))
        held_out = self.test.first(slice(0, N_SHOWN))[image]
        joint, states = self.sample({}, trajectory=True)
        images = self.sample({text: prompts})
        captions = self.sample({image: held_out})
        partial = self.sample({text: Condition(prompts, 0.5)})
        named = [digit_of(caption) for caption in codec.decode(captions[text])]
        correct = sum(
            name == int(digit) for name, digit in zip(named, self.test.labels["digit"][:N_SHOWN], strict=True)
        )
        return [
            self.section("Joint samples", "Image and caption are sampled together.", joint),
            self.section("Caption → image", "Images sampled given the captions.", images),
            self.section(
                "Image → caption",
                f"Captions sampled given held-out images ({correct} of {N_SHOWN} name the right digit).",
                {image: held_out, text: captions[text]},
            ),
            self.section(
                "Half-noised caption → image",
                "Each caption was noised to time 0.5, which masks about half of its characters (▯). The images are "
                "sampled given the rest.",
                partial,
            ),
            {
                "title": "From noise to a sample",
                "text": "States of one joint sample from time 1 to time 0; image and caption have their own times.",
                "image": self.trajectory_sheet(states, joint),
            },
        ]

    def sample(self, conditions: dict, trajectory: bool = False):
        return self.pipeline.sample(conditions, n=N_SHOWN, seed=self.seed + 1, trajectory=trajectory)

    def section(self, title: str, description: str, samples: dict[str, Tensor]) -> dict:
        return {"title": title, "text": description, "image": self._sheet(samples, columns=8)}

    def trajectory_sheet(self, states: list[dict[str, Tensor]], final: dict[str, Tensor]) -> str:
        """States of the first joint sample whose caption is in the grammar."""
        captions = self.pipeline.codecs[self.text].decode(final[self.text])
        valid = [digit_of(caption) is not None for caption in captions]
        index = valid.index(True) if any(valid) else 0
        shown = np.unique(np.linspace(0, len(states) - 1, 9).round().astype(int))
        samples = {m: torch.stack([states[i][m][index] for i in shown]) for m in (self.image, self.text)}
        return self._sheet(samples, columns=len(shown))

    def _sheet(self, samples: dict[str, Tensor], columns: int) -> str:
        images = self.pipeline.codecs[self.image].decode(samples[self.image])
        captions = self.pipeline.codecs[self.text].decode(samples[self.text])
        return embed_png(contact_sheet(images, captions, columns=columns))


def loss_curves(path: Path) -> str:
    """The logged losses of each modality as inline SVG."""
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


def _table(quality: Quality) -> Table:
    table = Table(box=None, pad_edge=False)
    for column, justify in (("metric", "left"), ("measured", "right"), ("goal", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    for name, value in dataclasses.asdict(quality).items():
        goal = GOALS.get(name)
        table.add_row(name, f"{value:.3f}", f"≥ {goal}" if goal else "≈ 1", MEANING[name])
    return table
