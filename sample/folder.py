"""A folder of samples that grows chunk by chunk and can be left and taken up again at any chunk.

image/000000.png …   text.txt, a caption a line   sheet.png   manifest.json   trajectory/0000.png …
.chunks/00000000.json: samples 0 … are written; gone when all are
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..model.storage import atomic_write
from .contact_sheet import contact_sheet, enlarge
from .pipeline import Pipeline

MANIFEST, CHUNKS, SHEET, TRAJECTORY = "manifest.json", ".chunks", "sheet.png", "trajectory"
SHOWN = 64  # samples on a contact sheet


class SampleFolder:
    """Where the samples of one request go.

    Args:
        request: everything that decides what the samples are, as JSON values; a folder takes one request only.
        about: what else the manifest tells the reader.
        total, chunk: number of samples, and how many are written at a time.
    """

    def __init__(self, out: Path, system: Pipeline, request: dict, about: dict, total: int, chunk: int):
        self.out, self.system, self.about, self.total, self.chunk = out, system, about, total, chunk
        self.request = json.loads(json.dumps(request))

    def begin(self, force: bool) -> None:
        """Make the folder, or go on in it. The main rank calls this, before any other method.

        Raises:
            ValueError: it holds something else, and not `force`.
        """
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file; choose another --out")
        there = self._manifest()
        if there is None:
            if not force and self.out.is_dir() and any(self.out.iterdir()):
                raise ValueError(f"{self.out} is not empty: choose another --out, or --force to write into it")
        elif force:
            self._clear()
        elif (key := _difference(there.get("request", {}), self.request)) is not None:
            if any((self.out / CHUNKS).glob("*.json")) or there.get("complete"):
                raise ValueError(
                    f"{self.out} holds samples of another request ({key} differs): choose another --out, "
                    "or --force to replace them"
                )
        elif there.get("complete"):
            return
        (self.out / CHUNKS).mkdir(parents=True, exist_ok=True)
        self._write_manifest(complete=False)

    def missing(self) -> list[range]:
        """The chunks that are not written yet."""
        if (self._manifest() or {}).get("complete"):
            return []
        starts = range(0, self.total, self.chunk)
        chunks = [range(start, min(start + self.chunk, self.total)) for start in starts]
        return [samples for samples in chunks if not self._record(samples).is_file()]

    def write(self, samples: range, values: dict[str, Tensor]) -> None:
        """Write these samples; they count as written once all their files are whole."""
        for m in self.system.images:
            (self.out / m).mkdir(parents=True, exist_ok=True)
            for i, pixels in zip(samples, self.system.codecs[m].decode(values[m]), strict=True):
                enlarge(pixels, pixels.shape[0]).save(self._picture(m, i))
        captions = {m: self.system.codecs[m].decode(values[m]) for m in self.system.texts}
        atomic_write(self._record(samples), json.dumps(captions, ensure_ascii=False))

    def write_trajectory(self, states: list[dict[str, Tensor]]) -> None:
        """A contact sheet of each state of the first samples on their way from noise."""
        for i, state in enumerate(states):
            first = {m: x[:SHOWN] for m, x in state.items()}
            write_sheet(self.system, first, self.out / TRAJECTORY / f"{i:04d}.png")

    def finish(self) -> Path:
        """Join the captions, draw the contact sheet, and return its path. The main rank calls this at the end."""
        sheet = self.out / SHEET
        if (self._manifest() or {}).get("complete"):
            return sheet
        starts = range(0, self.total, self.chunk)
        shown: dict[str, list[str]] = {m: [] for m in self.system.texts}
        with contextlib.ExitStack() as opened:
            names = {m: self.out / f"{m}.txt" for m in self.system.texts}
            files = {m: opened.enter_context(open(name, "w", encoding="utf-8")) for m, name in names.items()}
            for start in starts:
                chunk = json.loads(self._record(range(start, start + self.chunk)).read_text(encoding="utf-8"))
                for m, captions in chunk.items():
                    lines = [" ".join(caption.splitlines()) for caption in captions]
                    files[m].writelines(line + "\n" for line in lines)
                    shown[m] += lines[: SHOWN - len(shown[m])]
        captions = shown[self.system.texts[0]] if self.system.texts else None
        contact_sheet(self._shown_pictures(), captions).save(sheet)
        self._write_manifest(complete=True)
        shutil.rmtree(self.out / CHUNKS)
        return sheet

    def _shown_pictures(self) -> np.ndarray:
        n = min(SHOWN, self.total)
        if not self.system.images:
            return np.full((n, 1, 1, 1), 255, np.uint8)
        return np.stack([np.asarray(Image.open(self._picture(self.system.images[0], i))) for i in range(n)])

    def _picture(self, m: str, i: int) -> Path:
        return self.out / m / f"{i:06d}.png"

    def _record(self, samples: range) -> Path:
        return self.out / CHUNKS / f"{samples.start:08d}.json"

    def _manifest(self) -> dict | None:
        try:
            there = json.loads((self.out / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return there if isinstance(there, dict) else None

    def _write_manifest(self, complete: bool) -> None:
        names = {"pictures": self.system.images, "captions": self.system.texts}
        values = {"samples": self.total, "complete": complete, **self.about, **names, "request": self.request}
        atomic_write(self.out / MANIFEST, json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n")

    def _clear(self) -> None:
        """Remove what an earlier request wrote, and nothing else."""
        for name in (CHUNKS, TRAJECTORY, *self.system.images):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in (SHEET, MANIFEST, *(f"{m}.txt" for m in self.system.texts)):
            (self.out / name).unlink(missing_ok=True)


def write_sheet(system: Pipeline, samples: dict[str, Tensor], path: Path) -> Path:
    """A contact sheet of the first picture and the first text modality."""
    captions = system.codecs[system.texts[0]].decode(samples[system.texts[0]]) if system.texts else None
    n = len(next(iter(samples.values())))
    pictures = np.full((n, 1, 1, 1), 255, np.uint8)
    if system.images:
        pictures = system.codecs[system.images[0]].decode(samples[system.images[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, captions).save(path)
    return path


def _difference(there: dict, here: dict) -> str | None:
    """The first setting in which two requests differ."""
    return next((key for key in {**there, **here} if there.get(key) != here.get(key)), None)
