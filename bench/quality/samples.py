"""The samples an evaluation needs: every direction, drawn chunk by chunk, kept, and taken up where it stopped."""

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
    """Samples of a system in a folder, `OUT/DIRECTION/00000000.safetensors`, a file per chunk.

    Sample i of a direction is given the held-out pair i modulo their number, so a larger n goes on where a smaller one
    ended. Under torchrun the chunks are split over the ranks.

    Args:
        out: None keeps nothing, and draws all chunks on this rank.
        settings: what decides the samples, `seed`, `steps` and `precision` among them; a folder with others is refused.
        guidance: scale for all directions; default the config's.

    Raises:
        ValueError: the folder holds samples of other settings.
    """

    def __init__(
        self,
        system: Pipeline,
        test: Pairs,
        out: Path | None,
        settings: dict,
        guidance: float | None = None,
        progress=False,
    ):
        self.system, self.test, self.out, self.progress = system, test, out, progress
        self.seed, self.steps, self.guidance = settings["seed"], settings["steps"], guidance
        self.chunk, self.precision = system.config.sample.batch_size, settings["precision"]
        if out is None:
            return
        file = out / "settings.json"
        if file.exists():
            known = json.loads(file.read_text())
            for key, value in settings.items():
                if known.get(key) != value:
                    raise ValueError(
                        f"{out} holds samples with {key} = {known.get(key)}, asked for {value}: choose another --out"
                    )
        if distributed.is_main():
            atomic_write(file, json.dumps(settings, indent=1) + "\n")  # other ranks may be reading it

    def draw(self, direction: str, n: int) -> dict[str, Tensor]:
        """The first n samples of a direction, {modality: (n, *shape)} on the CPU; missing ones are drawn."""
        firsts = range(0, n, self.chunk)
        if self.out is None:
            parts = [self._draw(direction, first) for first in firsts]
            return {m: torch.cat([part[m] for part in parts])[:n] for m in self.system.space}
        for first in firsts[distributed.rank() :: distributed.world()]:
            self._part(direction, first)
        distributed.barrier()
        parts = [self._part(direction, first) for first in firsts] if distributed.is_main() else []
        return {m: torch.cat([part[m] for part in parts])[:n] for m in (self.system.space if parts else ())}

    def pairs(self, n: int) -> Tensor:
        """Which held-out pair each of n conditional samples is given."""
        return torch.arange(n) % len(self.test)

    def _part(self, direction: str, first: int) -> dict[str, Tensor]:
        path = self.out / direction / f"{first:08d}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except SafetensorError:
                path.unlink()  # cut off by a kill of the machine: draw it again
        drawn = self._draw(direction, first)
        atomic_write(path, save(drawn))
        return drawn

    def _draw(self, direction: str, first: int) -> dict[str, Tensor]:
        index = (first + torch.arange(self.chunk)) % len(self.test)
        (image,), (text,) = self.system.images, self.system.texts
        given = {
            "joint": {},
            "text_to_image": {text: self.test.captions[index, 0]},
            "image_to_text": {image: self.test.images[index]},
        }[direction]
        drawn = self.system.sample(
            given,
            n=self.chunk,
            first=first,
            steps=self.steps,
            guidance=self._guidance(bool(given)),
            seed=self.seed,
            chunk=self.chunk,
            progress=self.progress,
            precision=self.precision,
        )
        return {m: x.cpu().contiguous() for m, x in drawn.items()}

    def _guidance(self, given: bool) -> Guidance:
        own = self.system.guidance(given)
        return own if self.guidance is None else Guidance(self.guidance, own.final_time, own.interval)
