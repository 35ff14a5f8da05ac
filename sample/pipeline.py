"""`Pipeline`: a trained model and all that sampling it needs, its config, codecs, space and network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs.config import Config
from ..configs.load import load_config
from ..configs.locate import is_hub_id
from ..configs.runs import WEIGHTS, CheckpointError, resolve
from ..diffusion import Guidance, Space
from ..kernels import LazyLogits, Rng
from ..model.build import (
    Codecs,
    Names,
    build_codecs,
    build_network,
    build_samplers,
    build_space,
    codec_files,
    modalities_of,
    part_names,
)
from ..model.codecs.base import NotFitted, as_parts
from ..model.compilation import compile_net, forward_flops, should_compile
from ..model.cpu_memory import keep_memory
from ..model.mmdit import MMDiT
from ..model.modalities.base import Modality
from ..model.storage import load_weights
from ..model.table_dit import TableDiT
from .condition import Condition
from .sampler import sample
from .steppers import Sampler

BATCH_SIZE = 4096  # rows at a time where the config leaves the number open


@dataclasses.dataclass
class Pipeline:
    """A model as its config describes it, ready to be sampled."""

    config: Config
    codecs: Codecs
    space: Space
    net: MMDiT | TableDiT

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> Pipeline:
        """The model saved in a run folder (its newest checkpoint), in a checkpoint folder, or on the Hugging Face hub.

        weights: ema or raw.

        Raises:
            CheckpointError: no, a truncated, or another architecture's checkpoint.
        """
        folder = resolve(download(str(path)) if is_hub_id(str(path)) and not Path(path).exists() else path)
        config = load_config(folder / "config.yaml")
        try:
            pipeline = build_pipeline(config, build_codecs(config, folder))
        except NotFitted as error:
            raise CheckpointError(f"{folder} lacks a file of a codec: {error}") from None
        file = folder / WEIGHTS[weights]
        if weights == "ema" and not file.is_file() and not (folder / "train_state").is_dir():
            file = folder / WEIGHTS["raw"]  # written by save_pretrained, which keeps one set
        load_weights(pipeline.net, file)
        pipeline.net.to(device).eval()
        return pipeline

    @property
    def modalities(self) -> dict[str, Modality]:
        """{name: modality}."""
        return modalities_of(self.config)

    @functools.cached_property
    def names(self) -> Names:
        """{modality: {part: name of its process}}."""
        return part_names(self.config, self.codecs)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.net.parameters()).device

    @property
    def samplers(self) -> dict[str, Sampler]:
        """{process: its configured sampler}."""
        settings = build_samplers(self.config, self.names)
        return {name: Sampler(c.method, c.time_grid) for name, c in settings.items()}

    def measured_by(self, metric: str) -> list[str]:
        """The modalities to which a family of metrics applies."""
        return [m for m, modality in self.modalities.items() if metric in modality.metrics]

    def modality_of(self, process: str) -> str:
        """The modality that a process belongs to."""
        return next(m for m, parts in self.names.items() if process in parts.values())

    @property
    def generated(self) -> list[str]:
        """The modalities that the model can generate."""
        return [m for m, parts in self.names.items() if set(parts.values()) <= set(self.net.outputs)]

    def to(self, device: torch.device | str) -> Pipeline:
        """Move the network to a device; returns the pipeline."""
        self.net.to(device)
        return self

    def precision(self, wanted: str | None = None) -> str:
        """The precision of the network while it samples on its device: fp32 or bf16.

        wanted: fp32, bf16 or auto; default the config's `sample.precision`.
        """
        setting = wanted or self.config.sample.precision
        if setting not in ("auto", "fp32", "bf16"):
            raise ValueError(f"--precision must be auto, fp32 or bf16, got {setting!r}")
        if setting != "auto":
            return setting
        wide = self.device.type == "cuda" and not self.net.narrow
        return "bf16" if wide and self.config.train.precision != "fp32" else "fp32"

    def files(self) -> dict[str, bytes]:
        """The files of a checkpoint besides weights and config, {name: content}."""
        return codec_files(self.codecs)

    def guidance(self, conditional: bool) -> Guidance:
        """The configured guidance of conditional or joint sampling."""
        settings = self.config.sample
        chosen = settings.guidance if conditional or settings.joint_guidance is None else settings.joint_guidance
        values = chosen.model_dump()
        if isinstance(values["scale"], dict):
            values["scale"] = self.of_processes(values["scale"])
        return Guidance(**values)

    def of_processes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """{process: value} of {modality: value}; names of processes stay."""
        out = {}
        for m, value in values.items():
            out |= dict.fromkeys(self.names[m].values(), value) if m in self.names else {m: value}
        return out

    def encode(self, values: Mapping[str, Sequence]) -> dict[str, Tensor]:
        """{process: (N, …)} of {modality: N raw values}."""
        out = {}
        for m, raw in values.items():
            out |= {self.names[m][part]: x for part, x in as_parts(self.codecs[m].encode(raw)).items()}
        return out

    def decode(self, x: Mapping[str, Tensor], names: Sequence[str] | None = None) -> dict[str, Sequence]:
        """{modality: N decoded values} of {process: (N, …)}; names: of the modalities, default all of which x has all.

        Decoded values are what the methods of a kind take; `Modality.as_raw` turns them into what people use.
        """
        out = {}
        for m in self.names if names is None else names:
            parts = self.names[m]
            if all(k in x for k in parts.values()):
                value = {part: x[k] for part, k in parts.items()}
                out[m] = self.codecs[m].decode(value[""] if list(parts) == [""] else value)
        return out

    def uniforms(self, seed: int, start: int, n: int) -> dict[str, Tensor]:
        """{process: uniform numbers of samples start, …} for modalities that do not want independent noise."""
        out = {}
        for m, modality in self.modalities.items():
            drawn = modality.draw_uniforms(self.codecs[m], seed, start, n)
            out |= {self.names[m][part]: u for part, u in drawn.items()}
        return out

    def sample(self, conditions: Mapping[str, Tensor | Condition] | None = None, n: int | None = None, **options):
        """`sample.sample` as the config says; `options` are its other arguments, which replace what the config says."""
        settings = {
            "steps": self.config.sample.steps,
            "guidance": self.guidance(bool(conditions)),
            "samplers": self.samplers,
            "precision": self.precision(),
        }
        return sample(self.net, self.space, conditions, n, **{**settings, **options})

    def compile_for(self, evaluations: float) -> None:
        """Compile the network before it is evaluated on so many samples in all, where that saves time."""
        if self.device.type == "cpu":
            keep_memory()
        if should_compile(self.config.compile, self.device, lambda: sample_flops(self) * evaluations):
            compile_net(self.net, self.device, self.config.compile == "always", dynamic=True)


def build_pipeline(config: Config, codecs: Codecs | None = None) -> Pipeline:
    """The model that a config describes, with weights freshly drawn from its seed.

    codecs: fitted ones; default new ones, for modalities that need no fit.

    Raises:
        NotFitted: a codec must be fitted first.
    """
    codecs = build_codecs(config) if codecs is None else codecs
    return Pipeline(config, codecs, build_space(config, codecs), build_network(config, codecs))


def sample_flops(pipeline: Pipeline) -> int:
    """FLOPs of a pipeline's network for one sample, forward: matrix products and attentions, all logits included."""
    net, space = pipeline.net, pipeline.space
    device = next(net.parameters()).device
    rng = Rng.for_batch(0, 1, device=device)
    t = {m: torch.ones(1, dtype=torch.float64, device=device) for m in space}

    def evaluate() -> None:
        for out in space.evaluate(net, space.prior(rng), t).values():
            LazyLogits.wrap(out).values()  # a head's product waits until its logits are read

    return forward_flops(evaluate)
