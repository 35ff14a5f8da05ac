"""The HTML report of an evaluation, and the parts that it shares with the report of the demo."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image

from ...configs.load import dump_config
from ...model.provenance import provenance
from ...sample.folder import write_sheet
from ...sample.pipeline import Pipeline
from .samples import Samples

HERE = Path(__file__).parent
REPORT, SHEETS, N_SHOWN = "report.html", "sheets", 16
ABOUT = {
    "elbo": "Bits per token and per dimension, upper bounds; alone and given the other modalities.",
    "labels": "Shares of samples in which an attribute of image and caption agrees.",
    "fid": "Fréchet distance of images to the reference; lower is better.",
    "clip": "100 times the cosine of the CLIP embeddings of image and caption.",
    "agreement": "Shares of held-out examples, or of joint samples, in which classes agree. Compare generated with "
    "the classifier on real data, the most that can be expected, and with the majority class.",
}


def render(folder: Path, template: str, values: dict[str, Any]) -> str:
    """A page from a template of this folder or of `folder`; both extend page.html."""
    templates = Environment(loader=FileSystemLoader([folder, HERE]), autoescape=select_autoescape())
    return templates.get_template(template).render(values)


def write_report(out: Path, samples: Samples, results: dict) -> Path:
    """Write report.html with the tables of results and a contact sheet of every direction that was sampled."""
    pipeline = samples.pipeline
    page = {
        "name": pipeline.config.name,
        "modalities": list(pipeline.modalities),
        "parameters": count_parameters(pipeline.net),
        "test": len(samples.test),
        "settings": results["settings"],
        "tables": [
            {"title": family, "text": ABOUT.get(family, ""), "rows": rows(values)}
            for family, values in results["results"].items()
        ],
        "sections": _galleries(out, samples),
        "config": dump_config(pipeline.config),
        "environment": environment(pipeline.device),
    }
    path = out / REPORT
    path.write_text(render(HERE, "report.html", page), encoding="utf-8")
    return path


def rows(values: dict[str, dict]) -> list[tuple[str, str, str, str]]:
    """(metric, value, error, notes) of every result, as shown."""
    shown = []
    for name, entry in values.items():
        value = f"{entry['value']:.4f}" if isinstance(entry["value"], float) else str(entry["value"])
        notes = [entry["unit"]] if "unit" in entry else []
        if "samples" in entry:
            notes.append(f"{entry['samples']} samples")
        shown.append((name, value, f"{entry['error']:.4f}" if "error" in entry else "", ", ".join(notes)))
    return shown


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and the rest of the provenance in one flat dictionary."""
    here = provenance(device)
    versions = here.pop("versions")
    return {**versions, **here}


def count_parameters(net: torch.nn.Module) -> int:
    """The number of weights."""
    return sum(p.numel() for p in net.parameters())


def embed_png(image: Image.Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _galleries(out: Path, samples: Samples) -> list[dict[str, str]]:
    """Title, text and embedded contact sheet of every direction that was sampled."""
    sections = []
    for direction, conditions in samples.directions.items():
        batch = samples.first_batch(direction)
        if batch is not None:
            first = {name: x[:N_SHOWN] for name, x in batch.items()}
            sheet = write_sheet(samples.pipeline, first, out / SHEETS / f"{direction}.png")
            sections.append(
                {"title": _title(conditions), "text": _text(samples.pipeline, conditions), "image": _embed(sheet)}
            )
    return sections


def _embed(path: Path) -> str:
    with Image.open(path) as image:
        return embed_png(image)


def _title(conditions: tuple[str, ...]) -> str:
    return f"Given {' and '.join(conditions)}" if conditions else "Joint samples"


def _text(pipeline: Pipeline, conditions: tuple[str, ...]) -> str:
    generated = " and ".join(m for m in pipeline.modalities if m not in conditions)
    if not conditions:
        return f"{generated}, sampled together."
    return f"{generated}, sampled given held-out values of {' and '.join(conditions)}."
