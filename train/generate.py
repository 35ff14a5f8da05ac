"""`anystate sample`: from a checkpoint and raw conditions to files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..model.codecs import PixelCodec
from ..sample import KINDS, Given, Sampler, sample
from ..sample.pictures import contact_sheet, enlarge
from .build import System
from .checkpoint import load_system, resolve


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample; None is the config's own setting.

    given: (modality, raw value) pairs, a caption or the path of a picture; several of one modality are several
    conditions, and each gets `n` samples.
    """

    given: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    level: dict[str, str] = dataclasses.field(default_factory=dict)
    n: int = 16
    steps: int | None = None
    guidance: float | None = None
    final_time: float | None = None
    interval: tuple[float, float] | None = None
    sampler: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    trajectory: bool = False


def generate(
    checkpoint: Path, request: Request, out: Path, weights: str = "ema", device="cpu", force: bool = False
) -> Path:
    """Sample and write pictures, captions, manifest.json and a contact sheet, whose path is returned.

    Raises:
        ValueError: anything wrong with the request, before any work; `out` is not empty and not `force`.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"--weights must be ema or raw, got {weights!r}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another --out")
    if not force and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or --force to write into it")
    system = load_system(checkpoint, weights, device)
    given, n = _conditions(system, request)
    guidance = dataclasses.replace(
        system.guidance(bool(given)),
        **{
            name: value
            for name, value in (
                ("scale", request.guidance),
                ("final_time", request.final_time),
                ("interval", request.interval),
            )
            if value is not None
        },
    )
    settings = system.config.sample
    steps = settings.steps if request.steps is None else request.steps
    result = sample(
        system.net,
        system.space,
        given,
        n=n,
        steps=steps,
        guidance=guidance,
        seed=request.seed,
        samplers=_samplers(system, request.sampler),
        engine=system.config.engine,
        chunk=settings.chunk,
        trajectory=request.trajectory,
        progress=True,
    )
    samples, states = result if request.trajectory else (result, [])
    out.mkdir(parents=True, exist_ok=True)
    sheet = write(system, samples, out)
    for i, state in enumerate(states):
        write_sheet(system, state, out / "trajectory" / f"{i:04d}.png")
    manifest = {
        "checkpoint": str(resolve(checkpoint)),
        "weights": weights,
        "samples": n,
        "steps": steps,
        "guidance": dataclasses.asdict(guidance),
        **{name: getattr(request, name) for name in ("given", "level", "sampler", "seed")},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return sheet


def write(system: System, samples: dict[str, Tensor], out: Path) -> Path:
    """Every sample as files in `out`: NAME/0000.png, NAME.txt with a caption a line, and the contact sheet."""
    for m in system.images:
        (out / m).mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(system.codecs[m].decode(samples[m])):
            enlarge(pixels, pixels.shape[0]).save(out / m / f"{i:04d}.png")
    for m in system.texts:
        (out / f"{m}.txt").write_text("".join(c + "\n" for c in system.codecs[m].decode(samples[m])))
    return write_sheet(system, samples, out / "sheet.png")


def write_sheet(system: System, samples: dict[str, Tensor], path: Path) -> Path:
    """A contact sheet of the first picture and the first text modality."""
    captions = system.codecs[system.texts[0]].decode(samples[system.texts[0]]) if system.texts else None
    n = len(next(iter(samples.values())))
    pictures = np.full((n, 1, 1, 1), 255, np.uint8)
    if system.images:
        pictures = system.codecs[system.images[0]].decode(samples[system.images[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, captions).save(path)
    return path


def _conditions(system: System, request: Request) -> tuple[dict[str, Given], int]:
    """The given modalities, encoded and repeated n times each, and the number of samples."""
    if request.n < 1:
        raise ValueError(f"--n must be at least 1, got {request.n}")
    values: dict[str, list[str]] = {}
    for m, value in request.given:
        _known(system, "--given", m)
        values.setdefault(m, []).append(value)
    if len({len(v) for v in values.values()}) > 1:
        counts = ", ".join(f"{len(v)} of {m}" for m, v in values.items())
        raise ValueError(f"--given: give equally many values of each modality, got {counts}")
    levels = {m: _level(system, values, m, text) for m, text in request.level.items()}
    given = {}
    for m, raw in values.items():
        codec = system.codecs[m]
        x = torch.cat([codec.read(path) for path in raw]) if isinstance(codec, PixelCodec) else codec.encode(raw)
        given[m] = Given(x.repeat_interleave(request.n, 0), levels.get(m, 0.0))
    return given, request.n * (len(next(iter(values.values()))) if values else 1)


def _level(system: System, values: dict, m: str, text: str) -> float:
    _known(system, "--level", m)
    if m not in values:
        raise ValueError(f"--level {m}: nothing of that modality is given, add --given {m}=…")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--level {m}: {text!r} is not a number") from None


def _samplers(system: System, kinds: dict[str, str]) -> dict[str, Sampler]:
    samplers = system.samplers
    for m, kind in kinds.items():
        _known(system, "--sampler", m)
        if kind not in KINDS[type(system.space[m])]:
            allowed = ", ".join(KINDS[type(system.space[m])])
            raise ValueError(f"--sampler {m}: must be one of {allowed}, got {kind!r}")
        samplers[m] = dataclasses.replace(samplers[m], kind=kind)
    return samplers


def _known(system: System, option: str, m: str) -> None:
    if m not in system.space:
        raise ValueError(f"{option}: this model has no modality {m!r}; it has {', '.join(system.space)}")
