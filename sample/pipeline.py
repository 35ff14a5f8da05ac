"""`Pipeline`: a trained model and all that sampling it needs, its config, codecs, space and network."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs.config import Config
from ..configs.load import dump_config, load_config
from ..configs.runs import WEIGHTS, CheckpointError
from ..diffusion import Gaussian, Guidance, Space
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
from ..model.storage import atomic_write, load_weights, pack
from ..model.table_dit import TableDiT
from .condition import Condition
from .hub import find_checkpoint, upload
from .model_card import model_card
from .raw_conditions import encode_raw
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
        folder = find_checkpoint(path)
        config = load_config(folder / "config.yaml")
        try:
            pipeline = build_pipeline(config, build_codecs(config, folder))
        except NotFitted as error:
            raise CheckpointError(f"{folder} lacks a file of a codec: {error}") from None
        load_weights(pipeline.net, weights_file(folder, weights))
        pipeline.net.to(device).eval()
        return pipeline

    def save_pretrained(self, folder: str | Path, source: str | None = None) -> Path:
        """Write the model to a folder that `from_pretrained` loads, with a model card; returns the folder.

        source: what the card says the model is loaded from; default the folder's name.

        Raises:
            ValueError: a file of that name, or a checkpoint of a training run, which would lose its weights.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: choose a folder")
        if (folder / WEIGHTS["ema"]).exists() or (folder / "train_state").exists():
            raise ValueError(f"{folder} is a checkpoint of a training run: choose another folder")
        for name, content in self.files().items():
            atomic_write(folder / name, content)
        atomic_write(folder / "README.md", self.model_card(source or folder.name))
        atomic_write(folder / WEIGHTS["raw"], pack(self.net.state_dict()))
        atomic_write(folder / "config.yaml", dump_config(self.config))
        return folder

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Write the model to the Hugging Face hub, as its owner is logged in there; returns its address.

        Raises:
            ValueError: huggingface_hub is missing, or the hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            return upload(self.save_pretrained(folder, repo_id), repo_id, private)

    def model_card(self, source: str) -> str:
        """The page that describes the model on the hub; source: what it is loaded from."""
        parameters = sum(p.numel() for p in self.net.parameters())
        return model_card(self.config, self.space, self.names, self.generated, parameters, source)

    def __call__(
        self,
        conditions: Mapping[str, Any] | None = None,
        n: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        seed: int = 0,
        masks: Mapping[str, Any] | None = None,
        noise_levels: Mapping[str, float] | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Sample raw values of every modality given raw values of some.

        >>> pipe({"text": ["a seven", "zero"]}, n=8)["image"]  # 16 images

        Args:
            conditions: {modality: a value, or a list of R values; R rows of a DataFrame}. Values are what the data set
                holds or what this method returns. A single one goes with all others. Cells that a row lacks, and the
                signs ▯ of a caption, are sampled.
            n: samples of each condition, default 1; sample i has condition i // n.
            num_inference_steps: updates of every sampled modality; default the config's.
            guidance_scale: for all modalities or {modality: scale}, 1 for none; default the config's.
            seed: of the random numbers; sample i of a seed is the same for every n, up to rounding.
            masks: {modality of `conditions`: a mask, or a list of R masks}, True where the value is known; the rest is
                sampled.
            noise_levels: {modality of `conditions`: time in [0, 1] to which it is noised}; default 0.

        Returns:
            {modality: R · n values}, conditions as well; columns as a DataFrame.

        Raises:
            ValueError: an unknown modality, a value or a mask that it does not take, or nothing left to sample.
        """
        known = encode_raw(self, conditions or {}, masks or {}, noise_levels or {}, 1 if n is None else n)
        options: dict[str, Any] = {} if num_inference_steps is None else {"steps": num_inference_steps}
        options["guidance"] = self.guidance(bool(known.conditions), guidance_scale)
        total, limit = known.total, self.config.sample.batch_size or BATCH_SIZE
        samples = self.sample(
            known.of_samples(range(total)),
            n=total,
            seed=seed,
            batch_size=-(-total // -(-total // limit)),  # batches of equal size
            uniforms=self.uniforms(seed, 0, total),
            progress=progress,
            **options,
        )
        decoded = self.decode({k: x.cpu() for k, x in samples.items()}, seed=seed)
        decoded = known.restore(self, decoded, range(total))
        return {m: self.modalities[m].as_raw(values) for m, values in decoded.items()}

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

    def guidance(self, conditional: bool, scale: float | Mapping[str, float] | None = None) -> Guidance:
        """The configured guidance of conditional or joint sampling; scale: instead of the configured one.

        What is configured for conditional sampling does not apply to joint sampling where nothing guides anything.
        """
        settings = self.config.sample
        chosen = settings.guidance if conditional or settings.joint_guidance is None else settings.joint_guidance
        values = chosen.model_dump() | ({} if scale is None else {"scale": scale})
        if isinstance(values["scale"], Mapping):
            values["scale"] = self.of_processes(values["scale"])
        guidance = Guidance(**values)
        is_chosen = conditional or scale is not None or settings.joint_guidance is not None
        return guidance if is_chosen or self._guides_itself(guidance) else Guidance()

    def _guides_itself(self, guidance: Guidance) -> bool:
        """Whether in joint sampling a Gaussian modality is guided by a discrete one."""
        gaussian = {k: isinstance(process, Gaussian) for k, process in self.space.items()}
        return not all(gaussian.values()) and any(guidance.scale_of(k) != 1.0 for k in gaussian if gaussian[k])

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

    def decode(
        self, x: Mapping[str, Tensor], names: Sequence[str] | None = None, seed: int = 0, start: int = 0
    ) -> dict[str, Sequence]:
        """{modality: N decoded values} of {process: (N, …)}; names: of the modalities, default all of which x has all.

        Decoded values are what the methods of a kind take; `Modality.as_raw` turns them into what people use.

        seed, start: x are samples start, start + 1, … of a seed, see `Codec.decode_samples`.
        """
        out = {}
        for m in self.names if names is None else names:
            parts = self.names[m]
            if all(k in x for k in parts.values()):
                value = {part: x[k] for part, k in parts.items()}
                whole = value[""] if list(parts) == [""] else value
                out[m] = self.codecs[m].decode_samples(whole, seed, start)
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


def weights_file(folder: Path, weights: str) -> Path:
    """The file of the EMA or the raw weights; a folder that `save_pretrained` wrote holds only one."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    file = folder / WEIGHTS[weights]
    has_one_set = weights == "ema" and not file.is_file() and not (folder / "train_state").is_dir()
    return folder / WEIGHTS["raw"] if has_one_set else file


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
