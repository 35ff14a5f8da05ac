"""The folder of samples that `anystate sample` writes, batch by batch; an interrupted run can be continued.

Every modality is a folder of files, image/000000.png …, or one file with a line for each sample, text.txt or row.csv.

sheet.png   manifest.json   trajectory/0000.png …
.chunks/00000000.json: the batch that starts at sample 0 is written; .shown/image/000000.png …: the first samples as the
contact sheet will show them; both are deleted when all batches are written
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..model.storage import atomic_write
from .contact_sheet import Shown, sheet_of
from .pipeline import Pipeline
from .raw_conditions import Conditions

MANIFEST, BATCHES, SHEET, TRAJECTORY = "manifest.json", ".chunks", "sheet.png", "trajectory"
SHOWN = ".shown"
SHEET_SAMPLES = 64  # samples on a contact sheet


class SampleFolder:
    """The output of one request.

    Args:
        request: all settings that determine the samples, as JSON values; a folder belongs to one request.
        about: further entries of the manifest.
        conditions: of the samples, and how many there are.
        batch_size: number of samples written at a time.
    """

    def __init__(
        self, out: Path, pipeline: Pipeline, request: dict, about: dict, conditions: Conditions, batch_size: int
    ):
        self.out, self.pipeline, self.about = out, pipeline, about
        self.conditions, self.total, self.batch_size = conditions, conditions.total, batch_size
        self.request = json.loads(json.dumps(request))
        self.joined = [m for m, modality in pipeline.modalities.items() if modality.joined]

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
        decoded = self.pipeline.decode(values, seed=self.request["seed"], start=samples.start)
        decoded = self.conditions.restore(self.pipeline, decoded, samples)
        lines: dict[str, list[str]] = {}
        for m, modality in self.pipeline.modalities.items():
            if modality.joined:
                lines[m] = modality.lines(decoded[m])
                continue
            (self.out / m).mkdir(parents=True, exist_ok=True)
            for i, value in zip(samples, modality.split(decoded[m]), strict=True):
                modality.write(value, self._file(m, i))
        texts = self._write_shown(samples, decoded)
        atomic_write(self._record(samples), json.dumps({"lines": lines, "texts": texts}, ensure_ascii=False))

    def _write_shown(self, samples: range, decoded: Mapping[str, Sequence]) -> dict[str, list[str]]:
        """Write the images that the contact sheet will show of a batch; returns its texts."""
        texts: dict[str, list[str]] = {}
        for m, values in shown(self.pipeline, decoded, max(0, SHEET_SAMPLES - samples.start)).items():
            for i, value in zip(samples, values, strict=False):
                if isinstance(value, str):
                    texts.setdefault(m, []).append(value)
                else:
                    self._shown_file(m, i).parent.mkdir(parents=True, exist_ok=True)
                    value.save(self._shown_file(m, i))
        return texts

    def write_trajectory(self, states: list[dict[str, Tensor]]) -> None:
        """A contact sheet of the first samples at each step of the sampling."""
        for i, state in enumerate(states):
            first = {m: x[:SHEET_SAMPLES] for m, x in state.items()}
            write_sheet(self.pipeline, first, self.out / TRAJECTORY / f"{i:04d}.png")

    def finish(self) -> Path:
        """Join the lines, draw the contact sheet and return its path. The main rank calls this at the end."""
        sheet = self.out / SHEET
        if self._is_complete():
            return sheet
        texts = self._join_lines()
        sheet_of([self._shown(texts, i) for i in range(min(SHEET_SAMPLES, self.total))]).save(sheet)
        self._write_manifest(complete=True)
        for name in (BATCHES, SHOWN):
            shutil.rmtree(self.out / name, ignore_errors=True)
        return sheet

    def _join_lines(self) -> dict[str, list[str]]:
        """Write the lines of all batches into one file per modality; returns the texts of the contact sheet."""
        texts: dict[str, list[str]] = {}
        with contextlib.ExitStack() as stack:
            files = {m: stack.enter_context(open(self._joined_file(m), "w", encoding="utf-8")) for m in self.joined}
            for m, file in files.items():
                if header := self.pipeline.modalities[m].header(self.pipeline.codecs[m]):
                    file.write(header + "\n")
            for samples in self._batches():
                record = json.loads(self._record(samples).read_text(encoding="utf-8"))
                for m, file in files.items():
                    file.writelines(line + "\n" for line in record["lines"][m])
                for m, values in record["texts"].items():
                    texts.setdefault(m, []).extend(values)
        return texts

    def _shown(self, texts: Mapping[str, list[str]], i: int) -> list[Shown]:
        """Sample i as the contact sheet shows it."""
        named = {m: texts[m][i] if m in texts else self._image(m, i) for m in self.pipeline.modalities}
        return labelled(named)

    def _image(self, m: str, i: int) -> Image.Image:
        with Image.open(self._shown_file(m, i)) as image:
            return image.copy()

    def _batches(self) -> list[range]:
        starts = range(0, self.total, self.batch_size)
        return [range(start, min(start + self.batch_size, self.total)) for start in starts]

    def _file(self, m: str, i: int) -> Path:
        return self.out / m / f"{i:06d}{self.pipeline.modalities[m].suffix}"

    def _joined_file(self, m: str) -> Path:
        return self.out / f"{m}{self.pipeline.modalities[m].suffix}"

    def _shown_file(self, m: str, i: int) -> Path:
        return self.out / SHOWN / m / f"{i:06d}.png"

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
        modalities = self.pipeline.modalities
        files = {m: f"{m}{k.suffix}" if k.joined else f"{m}/*{k.suffix}" for m, k in modalities.items()}
        manifest = {
            "samples": self.total,
            "complete": complete,
            **self.about,
            "modalities": files,
            "pictures": [m for m, k in modalities.items() if not k.joined and k.suffix == ".png"],
            "captions": [m for m, k in modalities.items() if k.prompts],
            "request": self.request,
        }
        atomic_write(self.out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, default=str) + "\n")

    def _clear(self) -> None:
        """Remove what an earlier request wrote, and nothing else."""
        for name in (BATCHES, SHOWN, TRAJECTORY, *(m for m in self.pipeline.modalities if m not in self.joined)):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for path in (self.out / SHEET, self.out / MANIFEST, *map(self._joined_file, self.joined)):
            path.unlink(missing_ok=True)


def write_sheet(pipeline: Pipeline, samples: dict[str, Tensor], path: Path) -> Path:
    """Write a contact sheet of samples {process: (N, …)}; returns its path."""
    values = shown(pipeline, pipeline.decode(samples))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet_of([labelled(dict(zip(values, row, strict=True))) for row in zip(*values.values(), strict=True)]).save(path)
    return path


def shown(pipeline: Pipeline, decoded: Mapping[str, Sequence], n: int | None = None) -> dict[str, list[Shown]]:
    """{modality: its first n decoded values as images or texts}."""
    modalities = pipeline.modalities
    return {m: [modalities[m].render(v) for v in modalities[m].split(values[:n])] for m, values in decoded.items()}


def labelled(sample: Mapping[str, Shown]) -> list[Shown]:
    """The images and texts of a sample {modality: image or text}; several texts say what they are."""
    texts = [m for m, value in sample.items() if isinstance(value, str)]
    return [f"{m}: {value}" if m in texts and len(texts) > 1 else value for m, value in sample.items()]


def _difference(old: dict, new: dict) -> str | None:
    """The first setting in which two requests differ."""
    return next((key for key in {**old, **new} if old.get(key) != new.get(key)), None)
