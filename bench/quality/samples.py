"""The samples of an evaluation: every direction, drawn in batches, stored, and resumed after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ... import kernels
from ...configs.aliases import upgrade
from ...diffusion import Guidance
from ...kernels import Draw, Rng
from ...model import distributed
from ...model.storage import atomic_write
from ...sample.pipeline import BATCH_SIZE, Pipeline
from ...train.data.examples import Examples
from .roles import image_and_text


def given(pipeline: Pipeline, m: str) -> str:
    """The direction in which all else is sampled given the modality m."""
    pair = image_and_text(pipeline)
    if pair and len(pipeline.modalities) == 2:
        return "image_to_text" if m == pair[0] else "text_to_image"
    return f"given_{m}"


def directions(pipeline: Pipeline) -> dict[str, tuple[str, ...]]:
    """{direction: the modalities that are conditions}, as far as the model generates the others.

    `joint`; for every modality, all else given it (`given_X`) and, if that is not the same, it given all others
    (`X_given_rest`). Of one image and one text: joint, text_to_image and image_to_text.
    """
    names, generated = list(pipeline.modalities), set(pipeline.generated)
    cases: dict[str, tuple[str, ...]] = {"joint": ()}
    if len(names) > 1:
        cases |= {given(pipeline, m): (m,) for m in names}
    if len(names) > 2:
        cases |= {f"{m}_given_rest": tuple(k for k in names if k != m) for m in names}
    return {name: conditions for name, conditions in cases.items() if set(names) - set(conditions) <= generated}


class Samples:
    """Samples of a pipeline in a folder, one file `OUT/DIRECTION/00000000.safetensors` per batch.

    The condition of sample i is the held-out example i modulo their number, so that a larger n extends a smaller one;
    examples that lack a modality of the condition are left out. Under torchrun the batches are split over the ranks.

    Args:
        out: None stores nothing, and draws all batches on this rank.
        settings: everything that determines the samples, `seed`, `steps` and `precision` among them.
        guidance: scale for all directions; default the config's.

    Attributes:
        directions: {direction: the modalities that are conditions}, see `directions`.
        complete: {direction: rows of the held-out examples that have these modalities}.

    Raises:
        ValueError: the folder holds samples of other settings.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        test: Examples,
        out: Path | None,
        settings: dict,
        guidance: float | None = None,
        progress: bool = False,
    ):
        self.pipeline, self.test, self.out, self.progress = pipeline, test, out, progress
        self.seed, self.steps, self.guidance = settings["seed"], settings["steps"], guidance
        self.batch_size = pipeline.config.sample.batch_size or BATCH_SIZE
        self.precision = settings["precision"]
        complete = {d: self._complete(conditions) for d, conditions in directions(pipeline).items()}
        self.complete = {d: rows for d, rows in complete.items() if len(rows)}
        self.directions = {d: conditions for d, conditions in directions(pipeline).items() if d in self.complete}
        if out is not None:
            _check_settings(out, settings)

    def draw(self, direction: str, n: int) -> dict[str, Tensor]:
        """The first n samples of a direction, {process: (n, *shape)} on the CPU; missing ones are drawn.

        Ranks other than the main one get an empty dictionary.

        Raises:
            ValueError: the model, or the held-out data, do not allow this direction.
        """
        if direction not in self.directions:
            raise ValueError(
                f"this model cannot be sampled in the direction {direction}; possible: {', '.join(self.directions)}"
            )
        starts = range(0, n, self.batch_size)
        if self.out is None:
            return self._concatenate([self._draw(direction, start) for start in starts], n)
        for start in starts[distributed.rank() :: distributed.world()]:
            self._stored(direction, start)
        distributed.barrier()
        if not distributed.is_main():
            return {}
        return self._concatenate([self._stored(direction, start) for start in starts], n)

    def examples(self, direction: str, n: int) -> Tensor:
        """Indices (n,) of the held-out examples that the first n samples of a direction are conditioned on."""
        return self._rows(direction, torch.arange(n))

    def first_batch(self, direction: str) -> dict[str, Tensor] | None:
        """The first batch of a direction, if it was drawn and stored."""
        if self.out is None or not self._file(direction, 0).exists():
            return None
        return self._stored(direction, 0)

    def _rows(self, direction: str, samples: Tensor) -> Tensor:
        rows = self.complete[direction]
        return rows[samples % len(rows)]

    def _complete(self, modalities: tuple[str, ...]) -> Tensor:
        """The rows of the held-out examples that have all these modalities."""
        has = torch.ones(len(self.test), dtype=torch.bool)
        for name in [name for m in modalities for name in self.pipeline.names[m].values()]:
            if name in self.test.present:
                has &= self.test.present[name].cpu()
        return has.nonzero()[:, 0]

    def _concatenate(self, batches: list[dict[str, Tensor]], n: int) -> dict[str, Tensor]:
        return {m: torch.cat([batch[m] for batch in batches])[:n] for m in self.pipeline.space}

    def _file(self, direction: str, start: int) -> Path:
        return self.out / direction / f"{start:08d}.safetensors"

    def _stored(self, direction: str, start: int) -> dict[str, Tensor]:
        """A batch from its file, which is written if it is missing."""
        path = self._file(direction, start)
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
        """{process: data of the held-out examples}, of several versions the first."""
        modalities = self.directions[direction]
        if not modalities:
            return {}
        samples = torch.arange(start, start + self.batch_size)
        examples = self.test.first(self._rows(direction, samples))
        names = [name for m in modalities for name in self.pipeline.names[m].values()]
        return {name: _without_gaps(name, examples[name], Rng(self.seed, samples)) for name in names}

    def _guidance(self, conditional: bool) -> Guidance:
        default = self.pipeline.guidance(conditional)
        if self.guidance is None:
            return default
        return Guidance(self.guidance, default.final_time, default.interval)


def _without_gaps(name: str, x: Tensor, rng: Rng) -> Tensor:
    """x with noise in the elements without a value, as in training."""
    if not x.is_floating_point() or not bool(x.isnan().any()):
        return x
    noise = kernels.normal(rng.keys(f"fill {name}", Draw.DATA), x[0].numel()).view(x.shape)
    return torch.where(x.isnan(), noise, x)


def _check_settings(out: Path, settings: dict) -> None:
    """Refuse a folder of other settings, and write these."""
    file = out / "settings.json"
    if file.exists():
        stored = upgraded(json.loads(file.read_text()))
        for key, value in settings.items():
            if stored.get(key) != value:
                raise ValueError(
                    f"{out} holds samples with {key} = {stored.get(key)}, requested {value}: choose another --out"
                )
    if distributed.is_main():
        atomic_write(file, json.dumps(settings, indent=1) + "\n")  # other ranks may be reading it


def upgraded(settings: dict) -> dict:
    """Stored settings in which the data set is named as today."""
    data = settings.get("data")
    return {**settings, **upgrade({"data": data}, dict)} if isinstance(data, dict) else settings
