"""`Pipeline`: a trained model and all that sampling it needs, its config, space, network and codecs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..configs.config import Config, Image, Text
from ..configs.load import load_config
from ..configs.runs import WEIGHTS, resolve
from ..diffusion import Guidance, Space
from ..diffusion.build import build_space
from ..kernels import LazyLogits, Rng
from ..model.build import Codec, build_codecs, build_network, codec_files
from ..model.compilation import compile_net, forward_flops, should_compile
from ..model.cpu_memory import keep_memory
from ..model.mmdit import MMDiT
from ..model.storage import load_weights
from .condition import Condition
from .sampler import sample
from .steppers import Sampler


@dataclasses.dataclass
class Pipeline:
    """A model as its config describes it, ready to be sampled."""

    config: Config
    space: Space
    net: MMDiT
    codecs: dict[str, Codec]

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> Pipeline:
        """The model saved in a run folder (its newest checkpoint) or in a checkpoint folder.

        weights: ema or raw.

        Raises:
            CheckpointError: no, a truncated, or another architecture's checkpoint.
        """
        folder = resolve(path)
        pipeline = build_pipeline(load_config(folder / "config.yaml"), folder)
        load_weights(pipeline.net, folder / WEIGHTS[weights])
        pipeline.net.to(device).eval()
        return pipeline

    @property
    def images(self) -> list[str]:
        """Names of the image modalities."""
        return [m for m, c in self.config.modalities.items() if isinstance(c, Image)]

    @property
    def texts(self) -> list[str]:
        """Names of the text modalities."""
        return [m for m, c in self.config.modalities.items() if isinstance(c, Text)]

    @property
    def samplers(self) -> dict[str, Sampler]:
        """{modality: its configured sampler}."""
        return {m: Sampler(c.sampler.method, c.sampler.time_grid) for m, c in self.config.modalities.items()}

    def precision(self, wanted: str | None = None) -> str:
        """The precision of the network while it samples on its device: fp32 or bf16.

        wanted: fp32, bf16 or auto; default the config's `sample.precision`.
        """
        setting = wanted or self.config.sample.precision
        if setting not in ("auto", "fp32", "bf16"):
            raise ValueError(f"--precision must be auto, fp32 or bf16, got {setting!r}")
        if setting != "auto":
            return setting
        on_gpu = next(self.net.parameters()).device.type == "cuda"
        return "bf16" if on_gpu and self.config.train.precision != "fp32" else "fp32"

    def files(self) -> dict[str, bytes]:
        """The files of a checkpoint besides weights and config, {name: content}."""
        return codec_files(self.codecs)

    def guidance(self, conditional: bool) -> Guidance:
        """The configured guidance of conditional or joint sampling."""
        settings = self.config.sample
        chosen = settings.guidance if conditional or settings.joint_guidance is None else settings.joint_guidance
        return Guidance(**chosen.model_dump())

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
        config, device = self.config, next(self.net.parameters()).device
        if device.type == "cpu":
            keep_memory()
        if should_compile(config.compile, device, lambda: sample_flops(self) * evaluations):
            compile_net(self.net, device, config.compile == "always", dynamic=True)


def build_pipeline(config: Config, folder: Path | None = None, codecs: bool = True) -> Pipeline:
    """The model that a config describes, with weights freshly drawn from its seed.

    folder: a checkpoint that holds its tokenizers; default: they are where the config says.
    codecs: False leaves them out; benchmarks need none.
    """
    made = build_codecs(config, folder) if codecs else {}
    return Pipeline(config, build_space(config), build_network(config), made)


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
