"""The folder of samples that `anystate sample` writes, batch by batch; an interrupted run can be continued.

image/000000.png …   text.txt (one caption per line)   sheet.png   manifest.json   trajectory/0000.png …
.chunks/00000000.json: the batch that starts at sample 0 is written; deleted when all are
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

MANIFEST, BATCHES, SHEET, TRAJECTORY = "manifest.json", ".chunks", "sheet.png", "trajectory"
SHEET_SAMPLES = 64  # samples on a contact sheet


class SampleFolder:
    """The output of one request.

    Args:
        request: all settings that determine the samples, as JSON values; a folder belongs to one request.
        about: further entries of the manifest.
        total: number of samples.
        batch_size: number of samples written at a time.
    """

    def __init__(self, out: Path, pipeline: Pipeline, request: dict, about: dict, total: int, batch_size: int):
        self.out, self.pipeline, self.about, self.total, self.batch_size = out, pipeline, about, total, batch_size
        self.request = json.loads(json.dumps(request))

    def begin(self, force: bool) -> None:
        """Create the folder, or prepare to continue in it. The main rank calls this before any other method.

        Raises:
            ValueError: the folder has other content, and not `force`.
        """
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file; choose another --out")
        manifest = self._manifest()
        if manifest is None:
            if not force and self.out.is_dir() and any(self.out.iterdir()):
                raise ValueError(f"{self.out} is not empty: choose another --out, or --force to write into it")
        elif force:
            self._clear()
        else:
            self._check_same_request(manifest)
            if manifest.get("complete"):
                return
        (self.out / BATCHES).mkdir(parents=True, exist_ok=True)
        self._write_manifest(complete=False)

    def _check_same_request(self, manifest: dict) -> None:
        """Raise ValueError if the folder holds samples of another request."""
        key = _difference(manifest.get("request", {}), self.request)
        if key is not None and (any((self.out / BATCHES).glob("*.json")) or manifest.get("complete")):
            raise ValueError(
                f"{self.out} holds samples of another request ({key} differs): choose another --out, "
                "or --force to replace them"
            )

    def missing(self) -> list[range]:
        """The batches that are not written yet."""
        if self._is_complete():
            return []
        return [samples for samples in self._batches() if not self._record(samples).is_file()]

    def write(self, samples: range, values: dict[str, Tensor]) -> None:
        """Write a batch; it counts as written once all its files are complete."""
        for m in self.pipeline.images:
            (self.out / m).mkdir(parents=True, exist_ok=True)
            for i, pixels in zip(samples, self.pipeline.codecs[m].decode(values[m]), strict=True):
                enlarge(pixels, pixels.shape[0]).save(self._image_file(m, i))
        captions = {m: self.pipeline.codecs[m].decode(values[m]) for m in self.pipeline.texts}
        atomic_write(self._record(samples), json.dumps(captions, ensure_ascii=False))

    def write_trajectory(self, states: list[dict[str, Tensor]]) -> None:
        """A contact sheet of the first samples at each step of the sampling."""
        for i, state in enumerate(states):
            first = {m: x[:SHEET_SAMPLES] for m, x in state.items()}
            write_sheet(self.pipeline, first, self.out / TRAJECTORY / f"{i:04d}.png")

    def finish(self) -> Path:
        """Join the captions, draw the contact sheet and return its path. The main rank calls this at the end."""
        sheet = self.out / SHEET
        if self._is_complete():
            return sheet
        first_captions = self._join_captions()
        captions = first_captions[self.pipeline.texts[0]] if self.pipeline.texts else None
        contact_sheet(self._first_images(), captions).save(sheet)
        self._write_manifest(complete=True)
        shutil.rmtree(self.out / BATCHES)
        return sheet

    def _join_captions(self) -> dict[str, list[str]]:
        """Write the captions of all batches into one file per modality; returns those of the contact sheet."""
        first: dict[str, list[str]] = {m: [] for m in self.pipeline.texts}
        with contextlib.ExitStack() as stack:
            files = {}
            for m in self.pipeline.texts:
                files[m] = stack.enter_context(open(self.out / f"{m}.txt", "w", encoding="utf-8"))
            for samples in self._batches():
                for m, captions in json.loads(self._record(samples).read_text(encoding="utf-8")).items():
                    lines = [" ".join(caption.splitlines()) for caption in captions]
                    files[m].writelines(line + "\n" for line in lines)
                    first[m] += lines[: SHEET_SAMPLES - len(first[m])]
        return first

    def _first_images(self) -> np.ndarray:
        n = min(SHEET_SAMPLES, self.total)
        if not self.pipeline.images:
            return _blank(n)
        return np.stack([np.asarray(Image.open(self._image_file(self.pipeline.images[0], i))) for i in range(n)])

    def _batches(self) -> list[range]:
        starts = range(0, self.total, self.batch_size)
        return [range(start, min(start + self.batch_size, self.total)) for start in starts]

    def _image_file(self, m: str, i: int) -> Path:
        return self.out / m / f"{i:06d}.png"

    def _record(self, samples: range) -> Path:
        return self.out / BATCHES / f"{samples.start:08d}.json"

    def _manifest(self) -> dict | None:
        try:
            manifest = json.loads((self.out / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def _is_complete(self) -> bool:
        return bool((self._manifest() or {}).get("complete"))

    def _write_manifest(self, complete: bool) -> None:
        manifest = {
            "samples": self.total,
            "complete": complete,
            **self.about,
            "pictures": self.pipeline.images,
            "captions": self.pipeline.texts,
            "request": self.request,
        }
        atomic_write(self.out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, default=str) + "\n")

    def _clear(self) -> None:
        """Remove what an earlier request wrote, and nothing else."""
        for name in (BATCHES, TRAJECTORY, *self.pipeline.images):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in (SHEET, MANIFEST, *(f"{m}.txt" for m in self.pipeline.texts)):
            (self.out / name).unlink(missing_ok=True)


def write_sheet(pipeline: Pipeline, samples: dict[str, Tensor], path: Path) -> Path:
    """Write a contact sheet of the first image and the first text modality; returns its path."""
    captions = None
    if pipeline.texts:
        text = pipeline.texts[0]
        captions = pipeline.codecs[text].decode(samples[text])
    if pipeline.images:
        image = pipeline.images[0]
        images = pipeline.codecs[image].decode(samples[image])
    else:
        images = _blank(len(next(iter(samples.values()))))
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, captions).save(path)
    return path


def _blank(n: int) -> np.ndarray:
    """White images, for captions alone."""
    return np.full((n, 1, 1, 1), 255, np.uint8)


def _difference(old: dict, new: dict) -> str | None:
    """The first setting in which two requests differ."""
    return next((key for key in {**old, **new} if old.get(key) != new.get(key)), None)
