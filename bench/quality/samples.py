"""The samples of an evaluation: every direction, drawn in batches, stored, and resumed after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ...diffusion import Guidance
from ...model import distributed
from ...model.storage import atomic_write
from ...sample.pipeline import Pipeline
from ...train.data.pairs import Pairs

DIRECTIONS = ("joint", "text_to_image", "image_to_text")


class Samples:
    """Samples of a pipeline in a folder, one file `OUT/DIRECTION/00000000.safetensors` per batch.

    The condition of sample i is the held-out pair i modulo their number, so that a larger n extends a smaller one.
    Under torchrun the batches are split over the ranks.

    Args:
        out: None stores nothing, and draws all batches on this rank.
        settings: everything that determines the samples, `seed`, `steps` and `precision` among them.
        guidance: scale for all directions; default the config's.

    Raises:
        ValueError: the folder holds samples of other settings.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        test: Pairs,
        out: Path | None,
        settings: dict,
        guidance: float | None = None,
        progress: bool = False,
    ):
        self.pipeline, self.test, self.out, self.progress = pipeline, test, out, progress
        self.seed, self.steps, self.guidance = settings["seed"], settings["steps"], guidance
        self.batch_size, self.precision = pipeline.config.sample.batch_size, settings["precision"]
        if out is not None:
            _check_settings(out, settings)

    def draw(self, direction: str, n: int) -> dict[str, Tensor]:
        """The first n samples of a direction, {modality: (n, *shape)} on the CPU; missing ones are drawn.

        Ranks other than the main one get an empty dictionary.
        """
        starts = range(0, n, self.batch_size)
        if self.out is None:
            return self._concatenate([self._draw(direction, start) for start in starts], n)
        for start in starts[distributed.rank() :: distributed.world()]:
            self._stored(direction, start)
        distributed.barrier()
        if not distributed.is_main():
            return {}
        return self._concatenate([self._stored(direction, start) for start in starts], n)

    def pairs(self, n: int) -> Tensor:
        """Indices (n,) of the held-out pairs that n conditional samples are conditioned on."""
        return torch.arange(n) % len(self.test)

    def _concatenate(self, batches: list[dict[str, Tensor]], n: int) -> dict[str, Tensor]:
        return {m: torch.cat([batch[m] for batch in batches])[:n] for m in self.pipeline.space}

    def _stored(self, direction: str, start: int) -> dict[str, Tensor]:
        """A batch from its file, which is written if it is missing."""
        path = self.out / direction / f"{start:08d}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except SafetensorError:
                path.unlink()  # incomplete after a crash of the machine: draw it again
        batch = self._draw(direction, start)
        atomic_write(path, save(batch))
        return batch

    def _draw(self, direction: str, start: int) -> dict[str, Tensor]:
        conditions = self._conditions(direction, start)
        batch = self.pipeline.sample(
            conditions,
            n=self.batch_size,
            start_index=start,
            steps=self.steps,
            guidance=self._guidance(bool(conditions)),
            seed=self.seed,
            batch_size=self.batch_size,
            progress=self.progress,
            precision=self.precision,
        )
        return {m: x.cpu().contiguous() for m, x in batch.items()}

    def _conditions(self, direction: str, start: int) -> dict[str, Tensor]:
        index = (start + torch.arange(self.batch_size)) % len(self.test)
        (image,), (text,) = self.pipeline.images, self.pipeline.texts
        if direction == "text_to_image":
            return {text: self.test.captions[index, 0]}
        if direction == "image_to_text":
            return {image: self.test.images[index]}
        return {}

    def _guidance(self, conditional: bool) -> Guidance:
        default = self.pipeline.guidance(conditional)
        if self.guidance is None:
            return default
        return Guidance(self.guidance, default.final_time, default.interval)


def _check_settings(out: Path, settings: dict) -> None:
    """Refuse a folder of other settings, and write these."""
    file = out / "settings.json"
    if file.exists():
        stored = json.loads(file.read_text())
        for key, value in settings.items():
            if stored.get(key) != value:
                raise ValueError(
                    f"{out} holds samples with {key} = {stored.get(key)}, requested {value}: choose another --out"
                )
    if distributed.is_main():
        atomic_write(file, json.dumps(settings, indent=1) + "\n")  # other ranks may be reading it
