"""TableDiT: one stream of column tokens, every cell a token, heads per column.

Columns come in groups, each a modality with its own process and its own time: `Numbers` under Gaussian diffusion,
`Categories` under the masked one. Columns of one group may have different numbers of states K: the group's process
has the largest of them, logits beyond a column's own K are −∞, and the mask is the same id for all. Equal to the
official network (`model.official_table` maps its weights); blocks are those of DiT (arXiv 2212.09748).

B rows, C columns of a group or of all, D width, K states of a column.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import kernels
from .layers import TimeEmbedding


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A group of `columns` numerical columns, (B, columns) float."""

    columns: int


@dataclasses.dataclass(frozen=True)
class Categories:
    """A group of categorical columns with their numbers of states, (B, columns) int64; the mask is max(states)."""

    states: tuple[int, ...]

    @property
    def columns(self) -> int:
        return len(self.states)


class Mlp(nn.Sequential):
    """Linear layers of the given widths with an activation between them."""

    def __init__(self, *widths: int, act=nn.SiLU):
        layers = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(a, b), act()] if i < len(widths) - 2 else [nn.Linear(a, b)]
        super().__init__(*layers)


class TanhGelu(nn.Module):
    """GELU in its tanh form (official). Compiled, tanh is written with a sigmoid, whose exponential is quicker."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return x * torch.sigmoid(x * (1.5957691216057308 + 0.0713548162726009 * x * x))  # 2√(2/π) (1, 0.044715)
        return nn.functional.gelu(x, approximate="tanh")


class ColumnLinear(nn.Module):
    """A linear layer of its own for every column, computed as one batched product: (B, C, in) → (B, C, out)."""

    def __init__(self, columns: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(columns, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(columns, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight).transpose(0, 1)


class NumberFeatures(nn.Module):
    """(B, C, 1) → (B, C, D): per column a linear map of the value and of `sinusoids` pairs [cos, sin] of multiples of
    it, learned per column as well (arXiv 2203.05556)."""

    def __init__(self, columns: int, sinusoids: int, width: int):
        super().__init__()
        self.frequency = nn.Parameter(torch.randn(columns, sinusoids))
        self.linear = ColumnLinear(columns, 1 + 2 * sinusoids, width)

    def forward(self, x: Tensor) -> Tensor:
        angle = x * self.frequency
        return self.linear(torch.cat([x, torch.cos(angle), torch.sin(angle)], -1))


class CategoryHead(nn.Module):
    """(B, C, D) → padded logits (B, C, largest K [+ 1]): per column, a linear layer or (`deep`) an MLP of three.

    The weights of all columns lie in one (ΣK, D) matrix without padding and are spread over a padded one when used.

    Args:
        mask_logit: every column has one more output, for the mask; it comes last, after the padding.
    """

    def __init__(self, states: tuple[int, ...], width: int, deep: bool, mask_logit: bool):
        super().__init__()
        self.hidden = (
            nn.Sequential(
                ColumnLinear(len(states), width, width),
                nn.SiLU(),
                ColumnLinear(len(states), width, width),
                nn.SiLU(),
            )
            if deep
            else nn.Identity()
        )
        self.columns, self.outputs = len(states), max(states) + mask_logit
        slots = []
        for c, k in enumerate(states):
            own = [*range(k), max(states)] if mask_logit else range(k)
            slots += [c * self.outputs + v for v in own]
        self.register_buffer("slots", torch.tensor(slots), persistent=False)
        self.weight = nn.Parameter(torch.zeros(len(slots), width))
        self.bias = nn.Parameter(torch.zeros(len(slots)))

    def forward(self, x: Tensor) -> Tensor:
        size, width = self.columns * self.outputs, x.shape[-1]
        weight = self.weight.new_zeros(size, width).index_copy(0, self.slots, self.weight)
        bias = self.bias.new_full((size,), -math.inf).index_copy(0, self.slots, self.bias)
        weight = weight.view(self.columns, self.outputs, width).transpose(1, 2).to(x.dtype)
        bias = bias.view(self.columns, 1, self.outputs).to(x.dtype)
        return torch.baddbmm(bias, self.hidden(x).transpose(0, 1), weight).transpose(0, 1)


class Block(nn.Module):
    """Attention and feed-forward, both modulated by the conditioning c (B, D)."""

    def __init__(self, width: int, heads: int, expand: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = Mlp(width, expand * width, width, act=TanhGelu)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.modulation(c).chunk(6, -1)
        y = kernels.adaln_modulate(x, scale, shift, 1e-6, plus_one=True)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = kernels.gated_residual(x, self.proj(kernels.joint_attention(q, k, v).flatten(2)), gate)
        y = kernels.adaln_modulate(x, ff_scale, ff_shift, 1e-6, plus_one=True)
        return kernels.gated_residual(x, self.ff(y), ff_gate)


class TableDiT(nn.Module):
    """The network of a space of column groups.

    Args:
        groups: {name: Numbers or Categories}. In the sequence, numbers come first, then categories.
        clocks: groups whose times condition the network. Official: one (all groups share a time) or two.
        mlp: factor of the feed-forward width.
        deep_heads: three layers per categorical column instead of one (official).
        mask_logit: categorical heads put out a mask logit as well (official).
        known: cells of `Numbers` may be marked as given, see `forward`; categorical cells need no mark, for a token
            that is not the mask is known.
        time_scale: factor on times before their sinusoids; official 1.
        sinusoids: numbers enter by `NumberFeatures` of so many; 0 is one MLP of the value for all columns (official).
    """

    def __init__(
        self,
        groups: Mapping[str, Numbers | Categories],
        width: int,
        depth: int,
        heads: int,
        clocks: list[str],
        mlp: int = 4,
        deep_heads: bool = True,
        mask_logit: bool = True,
        known: bool = False,
        time_scale: float = 1.0,
        sinusoids: int = 0,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads {heads} do not divide the width {width}")
        self.groups, self.width, self.mlp = dict(groups), width, mlp
        self.numbers = [m for m, g in groups.items() if isinstance(g, Numbers)]
        self.categories = [m for m, g in groups.items() if isinstance(g, Categories)]
        columns = sum(g.columns for g in groups.values())
        numerical = sum(groups[m].columns for m in self.numbers)
        states = [k for m in self.categories for k in groups[m].states]
        self.time = nn.ModuleDict({m: TimeEmbedding(width, time_scale) for m in clocks})
        self.position = nn.Parameter(0.02 * torch.randn(columns, width))
        self.final = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)
        self.head = nn.ModuleDict()
        if numerical:
            self.number_table = nn.Parameter(0.02 * torch.randn(numerical, width))
            features = NumberFeatures(numerical, sinusoids, width) if sinusoids else Mlp(1, width, width, width)
            self.number_scale = features
            self.number_head = Mlp(width, width, width, 1)
            self.known = nn.Parameter(torch.zeros(numerical, width)) if known else None
        if states:
            self.token_table = nn.Parameter(0.02 * torch.randn(sum(states) + len(states), width))
            self.head.update(
                {m: CategoryHead(groups[m].states, width, deep_heads, mask_logit) for m in self.categories}
            )
            starts, sizes, masks, start = [], [], [], 0
            for m in self.categories:
                for k in groups[m].states:
                    starts.append(start)
                    sizes.append(k)
                    masks.append(max(groups[m].states))
                    start += k + 1
            for name, values in (("starts", starts), ("sizes", sizes), ("masks", masks)):
                self.register_buffer(name, torch.tensor(values), persistent=False)
        self.blocks = nn.ModuleList([Block(width, heads, mlp) for _ in range(depth)])

    def repeated(self) -> list[nn.Module]:
        """The blocks that repeat, for `model.compiling`."""
        return list(self.blocks)

    def embed(self, x: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, C, D): the token of every cell."""
        parts = []
        if self.numbers:
            values = torch.cat([x[m] for m in self.numbers], 1)
            cells = self.number_table + self.number_scale(values[..., None])
            if self.known is not None and given:
                marks = [given[m] if m in given else torch.zeros_like(x[m], dtype=torch.bool) for m in self.numbers]
                cells = cells + torch.cat(marks, 1)[..., None] * self.known
            parts.append(cells)
        if self.categories:
            tokens = torch.cat([x[m] for m in self.categories], 1)
            index = self.starts + torch.where(tokens == self.masks, self.sizes, tokens)
            parts.append(torch.nn.functional.embedding(index, self.token_table))
        return torch.cat(parts, 1) + self.position

    def condition(self, t: Mapping[str, Tensor]) -> Tensor:
        """(B, D): the times of the clocks; a clock without a time is left out."""
        return sum(embed(t[m]) for m, embed in self.time.items() if m in t)

    def forward(
        self,
        x: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        outputs: list[str] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{group: (B, C) output of a Numbers group, (B, C, K) logits of a Categories group}.

        Args:
            given: {Numbers group: (B, C) bool}, cells that hold clean data whatever the group's time.
            mask: not used; a table has no padding.
        """
        c = torch.nn.functional.silu(self.condition(t))
        h = self.embed(x, given)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final(c).chunk(2, -1)
        h = kernels.adaln_modulate(h, scale, shift, 1e-6, plus_one=True)
        order = [*self.numbers, *self.categories]
        parts = dict(zip(order, h.split([self.groups[m].columns for m in order], 1), strict=True))
        wanted = [m for m in self.groups if outputs is None or m in outputs]
        return {m: self.head[m](parts[m]) if m in self.head else self.number_head(parts[m])[..., 0] for m in wanted}
