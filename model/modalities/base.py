"""`Modality`: the base of all kinds of modalities. A kind is a section of the config with behaviour.

It ties together a codec (raw values ↔ tensors), a process (how the tensors are noised) and a stream (its part of the
network), and says how people see its values and how they are judged. A modality may have several processes that belong
together, its parts: the numbers and the tokens of table columns, the elements and positions of atoms. Methods that
build something then return {part: …}.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field
from torch import Tensor

from ...configs.config import Loss, SamplerConfig, Schedule, Section, StreamConfig
from ...diffusion.build import gaussian, masked
from ...diffusion.processes import Gaussian, Masked, Process, Uniform
from ...diffusion.schedules import LogLinear
from ...kernels import Rng
from ..codecs.base import Codec, Parts, as_parts
from ..streams import Stream


class Modality(Section, abc.ABC):
    """A modality of a config. Kinds derive from this class, add their settings, and answer the questions below.

    Attributes:
        suffix: ending of the files that samples are written to.
        joined: all samples are written into one file, by `lines`, instead of a file for each by `write`.
        metrics: families of metrics that apply besides agreement with the other modalities (see `bench.quality`).
        prompts: values are texts, to which --prompts, --context-limit and --repeat-text apply (see `Text`).
        synonyms: names of arrays and columns that hold its values in data sets, besides the modality's own name.
        file_suffixes: endings of the files that hold one value in a data set.
    """

    suffix: ClassVar[str] = ".npy"
    joined: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("elbo",)
    prompts: ClassVar[bool] = False
    synonyms: ClassVar[tuple[str, ...]] = ()
    file_suffixes: ClassVar[tuple[str, ...]] = (".npy",)

    kind: str = Field(description="name of the kind, or package.module:Class")
    stream: StreamConfig = Field(description="part of the network")

    # how raw data becomes tensors, how these are noised, and what part of the network they are

    @abc.abstractmethod
    def build_codec(self, files: Mapping[str, bytes]) -> Codec:
        """The codec; `files` is what `Codec.files` returned when the checkpoint was saved, empty for a new model."""

    @abc.abstractmethod
    def build_process(self, codec: Any) -> Process | dict[str, Process]:
        """The process, or {part: process}, for a fitted codec."""

    @abc.abstractmethod
    def build_stream(self, codec: Any) -> Stream | dict[str, Stream]:
        """The stream, or {part: stream}, of the MMDiT (see `model.streams`)."""

    def build_groups(self, codec: Any) -> dict[str, Any]:
        """The arguments `groups`, `mask_logit` and `observed` of the TableDiT, for kinds of table columns.

        Raises:
            ValueError: this is no such kind.
        """
        raise ValueError(f"network.kind: table_dit takes table columns, kind {self.kind} has none: use mmdit")

    # losses and samplers of its parts, and what is known of an example in training

    @abc.abstractmethod
    def losses(self, processes: Mapping[str, Process]) -> dict[str, Loss]:
        """{part: its loss}."""

    @abc.abstractmethod
    def samplers(self) -> dict[str, SamplerConfig]:
        """{part: its sampler}."""

    def draw_observed(self, codec: Any, rng: Rng, prefix: str) -> Parts:
        """{part: (B, *shape) bool}: elements that are clean conditions of a training batch; {} for none.

        prefix: put before the names of random streams, so that modalities differ.
        """
        return {}

    def draw_uniforms(self, codec: Any, seed: int, start: int, n: int) -> Parts:
        """{part: (n, *shape) float64 in (0, 1)} of samples start, …, in place of independent noise; {} for none."""
        return {}

    # where data sets have its raw values

    def from_file(self, path: Path) -> Any:
        """The raw value in a file with one of `file_suffixes`, or a list of its versions; by default as `read`."""
        return self.read(str(path))

    def from_table(self, columns: Mapping[str, Any], field: str | None) -> Any:
        """Its N values out of a table, by default the column `field`; None: the table has none.

        columns: {name: N cells} that no other modality takes.
        """
        return None if field is None else columns[field]

    def csv_settings(self) -> dict[str, Any]:
        """Of the reader of table files, see `files.read_table`: its arguments, but for the path."""
        return {"missing": [""], "text_columns": []}

    # what people see

    def read(self, text: str) -> Any:
        """The raw value that a text of the command line means; by default an array from an .npy file.

        Raises:
            ValueError: it means none.
        """
        try:
            return np.load(text, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{text!r} is not a readable .npy file ({error})") from None

    def write(self, value: Any, path: Path) -> None:
        """Write one decoded value to a file with the kind's suffix."""
        np.save(path, np.asarray(value))

    def lines(self, values: Sequence) -> list[str]:
        """One line for each decoded value, for a kind that is `joined`."""
        return [str(value) for value in values]

    def header(self, codec: Any) -> str | None:
        """The line above `lines`, if any."""
        return None

    def split(self, values: Sequence) -> list:
        """Decoded values one by one, as `write` and `render` take them."""
        return list(values)

    def as_raw(self, values: Sequence) -> Any:
        """Decoded values as `Pipeline` returns them."""
        return list(values)

    def render(self, value: Any) -> Image.Image | str:
        """A decoded value in a gallery: an image or a text."""
        return " ".join(f"{v:.3g}" for v in np.asarray(value, dtype=np.float64).ravel()[:8])

    # conditions that are known in part

    def encode_condition(self, codec: Any, values: Sequence) -> dict[str, tuple[Tensor, Tensor | None]]:
        """{part: (tensor, mask of the known elements; None: all)} of raw values that are conditions."""
        return {part: (x, None) for part, x in as_parts(codec.encode(values)).items()}

    def restore(self, codec: Any, values: Sequence, given: Sequence) -> Sequence:
        """Decoded values in which what was known, see `encode_condition`, is exactly as it was given."""
        return values

    def shorten(self, x: Tensor, limit: int | None) -> Tensor:
        """Encoded values of which at most `limit` tokens are used, for kinds with `prompts`."""
        return x

    def read_mask(self, codec: Any, path: str) -> Tensor | Parts:
        """(1, …) bool mask of the known elements from a file; by default a boolean array in an .npy file."""
        return self.encode_mask(codec, [self.read(path)])

    def encode_mask(self, codec: Any, masks: Sequence) -> Tensor | Parts:
        """(N, …) bool, broadcastable to what is diffused, of N masks in the shape of raw values.

        A modality with several processes gives {part: mask}.
        """
        import torch

        return torch.from_numpy(np.stack([np.asarray(mask) for mask in masks]).astype(bool))

    # how its values are judged: `bench.quality.agreement` fits classifiers on real data

    def features(self, codec: Any, values: Sequence) -> np.ndarray:
        """(N, D) numbers that a classifier reads off decoded values."""
        return np.stack([np.asarray(value, dtype=np.float64).ravel() for value in values])

    def attributes(self, codec: Any, values: Sequence) -> dict[str, np.ndarray]:
        """{name: (N,) classes} of decoded values, for kinds that hold classes; the name "" is the modality itself."""
        return {}

    def grid_levels(self, codec: Any) -> int | None:
        """Number of equally spaced values from −1 to 1 that the encoded data take; None: they are continuous."""
        return None


class OneProcess(Modality):
    """Base of kinds with one process."""

    loss: Loss = Field(Loss(), description="the loss")
    sampler: SamplerConfig = Field(SamplerConfig(), description="the sampler")

    def losses(self, processes):
        return dict.fromkeys(processes, self.loss)

    def samplers(self):
        return {"": self.sampler}


class GaussianModality(OneProcess):
    """Base of kinds under Gaussian diffusion."""

    schedule: Schedule = Field(Schedule(), description="the noise schedule")
    t_min: float = Field(1e-3, gt=0, lt=1, description="smallest time; 0 is clean data")
    time_conditioning: Literal["sigma", "time", "log_snr"] = Field(
        "sigma", description="the network's input for the time"
    )
    prediction_type: Literal["epsilon", "v_prediction"] = Field(
        "epsilon", description="what the network predicts (see `diffusion.Gaussian`)"
    )

    def gaussian(self, *shape: int) -> Gaussian:
        """The process of samples of this shape."""
        return gaussian(shape, self)


class DiscreteModality(OneProcess):
    """Base of kinds under masked or uniform diffusion."""

    process: Literal["masked", "uniform"] = Field("masked", description="masked or uniform diffusion")
    delta: float = Field(1e-5, gt=0, lt=1, description="δ of the log-linear schedule")
    t_min: float = Field(1e-3, gt=0, lt=1, description="smallest time; 0 is clean data")
    loss_on: Literal["all", "masked"] = Field("all", description="positions in the loss (masked process)")

    def discrete(self, length: int, states: int, **options) -> Masked | Uniform:
        """The process of sequences of `length` tokens; `options` of `Masked`."""
        if self.process == "uniform":
            return Uniform(length, states, LogLinear(self.delta), self.t_min)
        return masked(length, states, self, **options)
