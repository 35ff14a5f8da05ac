"""Streams of the MMDiT: how a modality is embedded as tokens, and how predictions are read off them."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Self

from torch import nn

from ..configs.config import StreamConfig
from .column_layers import CategoryEmbedding, CategoryHead, NumberEmbedding, NumberHead
from .layers import FrameEmbedding, FrameHead, PatchEmbedding, PatchHead, TokenEmbedding, TokenHead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream(abc.ABC):
    """One process in the network: its embedder and its head, in a stream of its own or in that of another process.

    Args:
        width: features of a position.
        cond: width of the conditioning vector, default `width`.
        single_stream_depth: blocks of its own after the trunk.
        output: False for a modality that is never predicted (a pure condition).
        share: name of the process whose stream this one joins, with its width, cond and depth.
        aligned: with share: positions are added to those of that process, instead of following them.
    """

    width: int
    cond: int | None = None
    single_stream_depth: int = 0
    output: bool = True
    share: str | None = None
    aligned: bool = False

    @classmethod
    def of(cls, settings: StreamConfig, **own: Any) -> Self:
        """The stream of a config's section; `own` are the arguments of this class."""
        names = ("width", "cond", "single_stream_depth", "output", "share", "aligned")
        given = {name: getattr(settings, name) for name in names}
        return cls(**{**given, "width": settings.width or 0, **own})  # a shared stream has the width of the other

    @property
    def condition_width(self) -> int:
        return self.cond or self.width

    @property
    @abc.abstractmethod
    def tokens(self) -> int:
        """Number of positions."""

    @abc.abstractmethod
    def build(self) -> tuple[nn.Module, nn.Module]:
        """The embedder, (B, *shape) → (B, tokens, width), and the head, (B, tokens, width) and (B, cond) → prediction.

        The prediction is a tensor of x's shape for Gaussian processes, logits or `LazyLogits` for discrete ones. An
        embedder with an attribute `observes` also takes `observed`, (B, *shape) bool or None.
        """


@dataclasses.dataclass(frozen=True)
class Patches(Stream):
    """Square images (channels, size, size), cut into patches."""

    channels: int
    size: int
    patch: int

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2

    def build(self):
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the image's size {self.size}")
        return (
            PatchEmbedding(self.channels, self.size, self.patch, self.width),
            PatchHead(self.channels, self.size, self.patch, self.width, self.condition_width),
        )


@dataclasses.dataclass(frozen=True)
class Tokens(Stream):
    """`length` tokens with `states` real states (and the mask).

    columns: outputs of the head, default `states`; official heads have states + 1.
    """

    length: int
    states: int
    columns: int | None = None

    @property
    def tokens(self) -> int:
        return self.length

    def build(self):
        return (
            TokenEmbedding(self.states + 1, self.length, self.width),
            TokenHead(self.columns or self.states, self.width, self.condition_width),
        )


@dataclasses.dataclass(frozen=True)
class Frames(Stream):
    """Series (channels, steps), cut into pieces of `patch` steps."""

    channels: int
    steps: int
    patch: int

    @property
    def tokens(self) -> int:
        return self.steps // self.patch

    def build(self):
        if self.steps % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the {self.steps} steps of the series")
        return (
            FrameEmbedding(self.channels, self.steps, self.patch, self.width),
            FrameHead(self.channels, self.steps, self.patch, self.width, self.condition_width),
        )


@dataclasses.dataclass(frozen=True)
class Features(Stream):
    """Vectors (features,), cut into pieces of `patch` features."""

    features: int
    patch: int

    @property
    def tokens(self) -> int:
        return self.features // self.patch

    def build(self):
        if self.features % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the {self.features} features of the vector")
        return (
            FrameEmbedding(None, self.features, self.patch, self.width),
            FrameHead(None, self.features, self.patch, self.width, self.condition_width),
        )


@dataclasses.dataclass(frozen=True)
class Numbers(Stream):
    """Numerical columns (columns,), one token each.

    Args:
        sinusoids: learned frequencies of a number, see `NumericalFeatures`.
        observed: cells may be marked as clean conditions.
    """

    columns: int
    sinusoids: int = 8
    observed: bool = False

    @property
    def tokens(self) -> int:
        return self.columns

    def build(self):
        return (
            NumberEmbedding(self.columns, self.sinusoids, self.width, self.observed),
            NumberHead(self.columns, self.width, self.condition_width),
        )


@dataclasses.dataclass(frozen=True)
class Categories(Stream):
    """Categorical columns with their numbers of states, one token each; the mask has the largest number as id."""

    states: tuple[int, ...]
    deep_heads: bool = False

    @property
    def tokens(self) -> int:
        return len(self.states)

    def build(self):
        return (
            CategoryEmbedding(self.states, self.width),
            CategoryHead(self.states, self.width, self.condition_width, self.deep_heads),
        )
