"""`anystate bench curves`: quality against network evaluations for every sampler, on digits and Adult.

Evaluations are counted per sample, guided ones once (both branches are one batch). Digits: the Fréchet distance of
pictures drawn from captions, in pixels after principal components of the real ones, and how many captions of held-out
pictures name the right digit. Adult: 1 − Shape and 1 − Trend of new rows. Real held-out data is the dotted line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ...model.storage import atomic_write
from ...sample import KINDS, Sampler, sample
from ...sample.pipeline import Pipeline
from ...sample.table.rows import Generator
from ...train.data import digits
from ...train.data.bundled import load_bundled
from ...train.provenance import origin
from ...train.synthesizer import TableSynthesizer
from ..quality.frechet import frechet, moments
from ..table.columns import roles_of
from ..table.metrics import density

STEPS = (2, 4, 6, 10, 20, 40)
TABLE_STEPS = (5, 10, 20, 50)
COMPONENTS = 16
TABLE_PAIRS = (  # samplers of numbers and of tokens; without guidance, euler draws the tokens that ancestral draws
    ("dpmpp_2m", "first_hitting"),
    ("dpmpp_2m", "ancestral"),
    ("heun", "ancestral"),
    ("euler", "euler"),
    ("euler_sde", "tau_leap"),
)


class Counted:
    """A network that counts how often it is asked."""

    def __init__(self, net):
        self.net, self.asked = net, 0
        self.selects_rows = getattr(net, "selects_rows", False)

    def __call__(self, *args, **options):
        self.asked += 1
        return self.net(*args, **options)


def curves(
    digits_run: Path | None,
    table_run: Path | None,
    out: Path,
    n: int = 300,
    rows: int = 2000,
    device: str = "cpu",
    console: Console | None = None,
) -> None:
    """Write curves.json and curves.png into `out`; what the JSON holds already is not measured again.

    Args:
        digits_run, table_run: trained runs of `anystate train digits` and `anystate table fit adult`; None leaves
            that part out.
        n: pictures, and captions, per point. rows: rows per point.
    """
    out.mkdir(parents=True, exist_ok=True)
    console, file = console or Console(), out / "curves.json"
    points = json.loads(file.read_text())["points"] if file.is_file() else []
    known = {(p["panel"], p["sampler"], p["steps"]) for p in points}
    parts: list[Iterable[dict]] = []
    if digits_run is not None:
        parts.append(digit_points(digits_run, n, device, known))
    if table_run is not None:
        parts.append(table_points(table_run, rows, device, known))
    for part in parts:
        for point in part:
            points.append(point)
            atomic_write(file, json.dumps({**origin(device), "points": points}, indent=1) + "\n")
            where = f"{point['panel']}: {point['sampler']}, {point['evaluations']} evaluations"
            console.print(f"{where}: {point['value']:.4f}", highlight=False)
    draw(points, out / "curves.png")
    console.print(f"wrote {file} and {out / 'curves.png'}")


def digit_points(run: Path, n: int, device: str, known: set) -> Iterable[dict]:
    """Pictures for captions by every Gaussian sampler, captions for pictures by every masked one."""
    system = Pipeline.from_pretrained(run, device=device)
    config = system.config.data
    (image,), (text,) = system.images, system.texts
    codecs = system.codecs
    train, test = digits.load(codecs[image].encode, codecs[text].encode, config.test_share, config.split_seed)
    asked = codecs[text].encode([digits.captions_of(d)[0] for d in np.arange(n) % 10])
    space, guidance = system.space, system.guidance(True)

    def run_one(given, samplers, steps):
        net = Counted(system.net)
        drawn = sample(
            net,
            space,
            given,
            steps=steps,
            guidance=guidance,
            samplers={**system.samplers, **samplers},
            chunk=n,
            device=device,
        )
        return drawn, net.asked

    judge = Features(train.images)
    panel = "digits: Fréchet distance of (guided) pictures given captions"
    if (panel, "real", 0) not in known:
        yield point(panel, "real", 0, 0, judge.distance(test.images, train.images))
    for kind in KINDS[type(space[image])]:
        for grid in ("linear", "logsnr"):
            for steps in STEPS:
                label = f"{kind}, {grid}"
                if (panel, label, steps) in known:
                    continue
                drawn, asked_times = run_one({text: asked}, {image: Sampler(kind, grid)}, steps)
                yield point(panel, label, steps, asked_times, judge.distance(drawn[image], train.images))
    panel = "digits: captions of held-out pictures that are wrong"
    labels = test.labels[:n].numpy()
    for kind in KINDS[type(space[text])]:
        for steps in STEPS:
            if (panel, kind, steps) in known:
                continue
            drawn, asked_times = run_one({image: test.images[:n]}, {text: Sampler(kind)}, steps)
            read = [digits.digit_of(caption) for caption in codecs[text].decode(drawn[text])]
            wrong = float(np.mean([r != int(d) for r, d in zip(read, labels, strict=True)]))
            yield point(panel, kind, steps, asked_times, wrong)


class Features:
    """Principal components of real pictures, in which Gaussians are fitted."""

    def __init__(self, real: torch.Tensor):
        flat = real.flatten(1).double()
        self.mean = flat.mean(0)
        _, _, v = torch.linalg.svd(flat - self.mean, full_matrices=False)
        self.axes = v[:COMPONENTS].T

    def distance(self, images: torch.Tensor, real: torch.Tensor) -> float:
        a, b = ((x.clamp(-1, 1).flatten(1).double().cpu() - self.mean) @ self.axes for x in (images, real))
        return frechet(*moments(a.numpy()), *moments(b.numpy()))


def table_points(run: Path, n: int, device: str, known: set) -> Iterable[dict]:
    """New rows by pairs of samplers."""
    model = TableSynthesizer.load(run, device=device)
    train, test = load_bundled()
    roles = roles_of(train)
    panels = {name: f"Adult: 1 − {name.title()} of {n:,} new rows" for name in ("shape", "trend")}
    if (panels["shape"], "real", 0) not in known:
        real = density(train, test.sample(n, random_state=0), roles)
        for name, panel in panels.items():
            yield point(panel, "real", 0, 0, 1.0 - getattr(real, name))
    for numbers, tokens in TABLE_PAIRS:
        for steps in TABLE_STEPS:
            label = f"{numbers} + {tokens}"
            if (panels["shape"], label, steps) in known:
                continue
            evaluations, table = table_rows(model, {"num": Sampler(numbers), "cat": Sampler(tokens)}, n, steps)
            near = density(train, table, roles)
            for name, panel in panels.items():
                yield point(panel, label, steps, evaluations, 1.0 - getattr(near, name))


def table_rows(model: TableSynthesizer, samplers: dict[str, Sampler], n: int, steps: int):
    """(evaluations per row, n new rows) by given samplers."""
    system = model.system_
    counted = Counted(system.net)
    drawn = sample(
        counted,
        system.space,
        n=n,
        steps=steps,
        samplers={m: s for m, s in samplers.items() if m in system.space},
        chunk=n,
        device=Generator(system).device,
    )
    tokens = drawn.get("cat", torch.zeros(n, 0, dtype=torch.int64)).cpu()
    scores = drawn.get("num", torch.zeros(n, 0)).cpu()
    return counted.asked, system.codec.decode(tokens, scores, 0)


def point(panel: str, sampler: str, steps: int, evaluations: int, value: float) -> dict:
    return {"panel": panel, "sampler": sampler, "steps": steps, "evaluations": evaluations, "value": value}


def draw(points: list[dict], file: Path) -> None:
    """A panel per measure, a line per sampler."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(p["panel"] for p in points))
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.9 * rows), layout="constrained", squeeze=False)
    plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, panel in zip(axes.flat, panels, strict=False):
        mine = [p for p in points if p["panel"] == panel]
        for label in dict.fromkeys(p["sampler"] for p in mine):
            line = sorted((p["evaluations"], p["value"]) for p in mine if p["sampler"] == label)
            if label == "real":
                ax.axhline(line[0][1], color="black", linestyle=":", linewidth=1, label="real held-out data")
            else:
                dashed = {"linestyle": "--"} if label.endswith("linear") else {}
                ax.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1.4, label=label, **dashed)
        ax.set(title=panel, xlabel="network evaluations a sample", xscale="log", yscale="log")
        ax.set_xticks([t for t in (2, 4, 6, 10, 20, 40, 80) if t <= max(p["evaluations"] for p in mine)])
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(plain)
        ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        ax.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 3, 5, 7)))
        ax.yaxis.set_minor_formatter(plain)
        ax.tick_params(which="minor", labelsize=7)
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
