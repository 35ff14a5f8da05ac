"""TableDiT: a transformer over the cells of a row, one token per column, with one output head per column.

Columns come in groups; each group is a modality with its own process and time: `Numerical` under Gaussian diffusion,
`Categorical` under masked diffusion. The columns of a categorical group may have different numbers of states K: the
group's process has the largest of them, logits beyond a column's own K are −∞, and the mask has the same id in all.
The network equals the official one (`model.official.table` maps its weights); its blocks are those of DiT (arXiv
2212.09748).

B rows, C columns of a group or of all, D width, K states of a column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import kernels
from .column_layers import CategoricalHead, Mlp, NumericalFeatures, TanhGelu
from .layers import TimeEmbedding
from .residual import Residual


@dataclasses.dataclass(frozen=True)
class Numerical:
    """A group of numerical columns, (B, columns) float."""

    columns: int


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A group of categorical columns, (B, columns) int64, with their numbers of states; the mask id is the largest."""

    states: tuple[int, ...]

    @property
    def columns(self) -> int:
        return len(self.states)


class Block(nn.Module):
    """Attention and feed-forward on (B, C, D), both modulated by the conditioning c (B, D)."""

    def __init__(self, width: int, heads: int, expand: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = Mlp(width, expand * width, width, act=TanhGelu)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Residual, c: Tensor) -> Residual:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.modulation(c).chunk(6, -1)
        total, y = x.modulated(scale, shift, self.qkv, 1e-6, plus_one=True)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = Residual(total, self.proj(kernels.joint_attention(q, k, v).flatten(2)), gate)
        total, y = x.modulated(ff_scale, ff_shift, self.ff[0], 1e-6, plus_one=True)
        return Residual(total, self.ff(y), ff_gate)


class TableDiT(nn.Module):
    """The network of a space of column groups.

    Args:
        groups: {modality: Numerical or Categorical}. In the sequence, numerical columns come first.
        time_conditioning: the groups whose times the network sees. Official: one (all groups share a time) or two.
        mlp: factor of the feed-forward width.
        deep_heads: three layers per categorical column instead of one (official).
        mask_logit: categorical heads have a logit for the mask as well (official).
        observed: numerical cells may be marked as observed, see `forward`; categorical cells need no mark, because a
            token that is not the mask is observed.
        time_scale: factor on times before their sinusoids; official 1.
        sinusoids: frequencies of `NumericalFeatures`; 0 is one MLP of the value for all columns (official).
    """

    def __init__(
        self,
        groups: Mapping[str, Numerical | Categorical],
        width: int,
        depth: int,
        heads: int,
        time_conditioning: Sequence[str],
        mlp: int = 4,
        deep_heads: bool = True,
        mask_logit: bool = True,
        observed: bool = False,
        time_scale: float = 1.0,
        sinusoids: int = 0,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"the width {width} is not a multiple of the number of heads {heads}")
        self.groups, self.width, self.mlp = dict(groups), width, mlp
        self.numerical = [m for m, g in groups.items() if isinstance(g, Numerical)]
        self.categorical = [m for m, g in groups.items() if isinstance(g, Categorical)]
        # modules are created in an order that fixes their random initial weights
        self.time = nn.ModuleDict({m: TimeEmbedding(width, time_scale) for m in time_conditioning})
        self.position = nn.Parameter(0.02 * torch.randn(sum(g.columns for g in groups.values()), width))
        self.final = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)
        self.head = nn.ModuleDict()
        self.known = None
        if self.numerical:
            self._add_numerical(sum(groups[m].columns for m in self.numerical), sinusoids, observed)
        if self.categorical:
            self._add_categorical(deep_heads, mask_logit)
        self.blocks = nn.ModuleList([Block(width, heads, mlp) for _ in range(depth)])

    def _add_numerical(self, columns: int, sinusoids: int, observed: bool) -> None:
        """Embedding and head of the numerical columns."""
        width = self.width
        self.number_table = nn.Parameter(0.02 * torch.randn(columns, width))
        self.number_scale = NumericalFeatures(columns, sinusoids, width) if sinusoids else Mlp(1, width, width, width)
        self.number_head = Mlp(width, width, width, 1)
        if observed:
            self.known = nn.Parameter(torch.zeros(columns, width))  # added to observed cells

    def _add_categorical(self, deep_heads: bool, mask_logit: bool) -> None:
        """Embedding and heads of the categorical columns; the rows of a column in the table are its states, then the
        mask."""
        groups = {m: g for m, g in self.groups.items() if isinstance(g, Categorical)}
        states = [k for g in groups.values() for k in g.states]
        masks = [max(g.states) for g in groups.values() for _ in g.states]
        starts = [sum(states[:c]) + c for c in range(len(states))]
        self.token_table = nn.Parameter(0.02 * torch.randn(sum(states) + len(states), self.width))
        for m, group in groups.items():
            self.head[m] = CategoricalHead(group.states, self.width, deep_heads, mask_logit)
        for name, values in (("starts", starts), ("sizes", states), ("masks", masks)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    narrow = True  # layers gain nothing from bf16, and their launches limit a GPU: training steps are CUDA graphs

    @property
    def outputs(self) -> list[str]:
        """The modalities that the network predicts."""
        return list(self.groups)

    @property
    def observes(self) -> list[str]:
        """The modalities whose observed cells the network was trained with, see `forward`."""
        return [] if self.known is None else self.numerical

    def repeated(self) -> list[nn.Module]:
        """The blocks, which `model.compilation` compiles once for all."""
        return list(self.blocks)

    def embed(self, x: Mapping[str, Tensor], observed: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, C, D): the embedding of every cell."""
        parts = []
        if self.numerical:
            values = torch.cat([x[m] for m in self.numerical], 1)
            cells = self.number_table + self.number_scale(values[..., None])
            if self.known is not None and observed:
                marks = [observed.get(m, torch.zeros_like(x[m], dtype=torch.bool)) for m in self.numerical]
                cells = cells + torch.cat(marks, 1)[..., None] * self.known
            parts.append(cells)
        if self.categorical:
            tokens = torch.cat([x[m] for m in self.categorical], 1)
            index = self.starts + torch.where(tokens == self.masks, self.sizes, tokens)
            parts.append(torch.nn.functional.embedding(index, self.token_table))
        return torch.cat(parts, 1) + self.position

    def condition(self, t: Mapping[str, Tensor]) -> Tensor:
        """(B, D): the sum of the time embeddings; a group without a time in t is left out."""
        return sum(embed(t[m]) for m, embed in self.time.items() if m in t)

    def forward(
        self,
        x: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        outputs: Collection[str] | None = None,
        observed: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{modality: prediction (B, C) of a numerical group, logits (B, C, K) of a categorical one}.

        Args:
            x: {modality: (B, C)}.
            t: {modality: (B,)} times.
            mask: not used, because rows have no padding.
            outputs: the modalities to predict, default all.
            observed: {numerical group: (B, C) bool}, cells that are clean whatever the group's time.
        """
        c = torch.nn.functional.silu(self.condition(t))
        residual = Residual(self.embed(x, observed))
        for block in self.blocks:
            residual = block(residual, c)
        shift, scale = self.final(c).chunk(2, -1)
        h = kernels.gated_adaln(*residual[:3], scale, shift, 1e-6, plus_one=True)[1]
        order = [*self.numerical, *self.categorical]
        parts = dict(zip(order, h.split([self.groups[m].columns for m in order], 1), strict=True))
        wanted = [m for m in self.groups if outputs is None or m in outputs]
        return {m: self.head[m](parts[m]) if m in self.head else self.number_head(parts[m])[..., 0] for m in wanted}
