"""Layers for the columns of tables: one layer per column, computed together.

B rows, C columns of a group, D width, K states of a column.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..kernels import ColumnGroup, ColumnLogits
from .layers import Modulate

LARGE = 256  # states from which on a column has logits of its own


class Mlp(nn.Sequential):
    """Linear layers of the given widths with an activation between them."""

    def __init__(self, *widths: int, act: type[nn.Module] = nn.SiLU):
        layers = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(a, b), act()] if i < len(widths) - 2 else [nn.Linear(a, b)]
        super().__init__(*layers)


class TanhGelu(nn.Module):
    """GELU with the tanh approximation (official); when compiled, tanh is written as a sigmoid, which is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return x * torch.sigmoid(x * (1.5957691216057308 + 0.0713548162726009 * x * x))  # 2√(2/π) (1, 0.044715)
        return nn.functional.gelu(x, approximate="tanh")


class ColumnLinear(nn.Module):
    """One linear layer per column, computed as a batched matrix product: (B, C, in) → (B, C, out)."""

    def __init__(self, columns: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(columns, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(columns, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight).transpose(0, 1)


class NumericalFeatures(nn.Module):
    """Periodic features of numbers, (B, C, 1) → (B, C, D) (arXiv 2203.05556).

    Per column, a linear layer of the value x and of cos(f x), sin(f x) for `sinusoids` learned frequencies f.
    """

    def __init__(self, columns: int, sinusoids: int, width: int):
        super().__init__()
        self.frequency = nn.Parameter(torch.randn(columns, sinusoids))
        self.linear = ColumnLinear(columns, 1 + 2 * sinusoids, width)

    def forward(self, x: Tensor) -> Tensor:
        angle = x * self.frequency
        return self.linear(torch.cat([x, torch.cos(angle), torch.sin(angle)], -1))


class CategoricalHead(nn.Module):
    """Logits of categorical columns, (B, C, D) → (B, C, largest K [+ 1]), −∞ beyond a column's own K.

    The weights of all columns are one (ΣK, D) parameter without padding, scattered into a padded tensor when used; if
    one has more than LARGE states, `ColumnLogits`, each such column by itself.

    Args:
        deep: an MLP of three layers per column instead of one linear layer.
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
        self.states, self.columns, self.outputs = states, len(states), max(states) + mask_logit
        self.is_grouped = max(states) > LARGE and len(states) > 1 and not mask_logit
        small = [c for c, k in enumerate(states) if k <= LARGE]
        self.groups = [*([small] if small else []), *([c] for c, k in enumerate(states) if k > LARGE)]
        in_groups = torch.tensor([c for group in self.groups for c in group])
        self.register_buffer("in_groups", in_groups, persistent=False)
        self.register_buffer("order", in_groups.argsort(), persistent=False)
        slots = []  # rows of the padded matrix that the rows of `weight` go to
        for c, k in enumerate(states):
            slots += [c * self.outputs + state for state in range(k)]
            if mask_logit:
                slots.append(c * self.outputs + max(states))
        self.register_buffer("slots", torch.tensor(slots), persistent=False)
        self.weight = nn.Parameter(torch.zeros(len(slots), width))
        self.bias = nn.Parameter(torch.zeros(len(slots)))

    def forward(self, x: Tensor) -> Tensor | ColumnLogits:
        if self.is_grouped:
            return ColumnLogits(self.hidden(x), self._groups(x.dtype), self.order)
        size, width = self.columns * self.outputs, x.shape[-1]
        weight = self.weight.new_zeros(size, width).index_copy(0, self.slots, self.weight)
        bias = self.bias.new_full((size,), -math.inf).index_copy(0, self.slots, self.bias)
        weight = weight.view(self.columns, self.outputs, width).transpose(1, 2).to(x.dtype)
        bias = bias.view(self.columns, 1, self.outputs).to(x.dtype)
        return torch.baddbmm(bias, self.hidden(x).transpose(0, 1), weight).transpose(0, 1)

    def _groups(self, dtype: torch.dtype) -> list[ColumnGroup]:
        """The small columns together, and every large one."""
        weights, biases = self.weight.to(dtype).split(self.states), self.bias.to(dtype).split(self.states)
        groups = []
        for own, places in zip(self.groups, self.in_groups.split([len(g) for g in self.groups]), strict=True):
            most = max(self.states[c] for c in own)
            weight = [pad(weights[c].t(), (0, most - self.states[c])) for c in own]
            bias = [pad(biases[c][None], (0, most - self.states[c]), value=-math.inf) for c in own]
            groups.append(ColumnGroup(places, torch.stack(weight), torch.stack(bias)))
        return groups


class NumberEmbedding(nn.Module):
    """Numbers (B, C) → (B, C, D): features of the value and a learned vector, per column.

    observed: cells may be marked as clean conditions, by a learned vector.
    """

    def __init__(self, columns: int, sinusoids: int, width: int, observed: bool):
        super().__init__()
        self.features = NumericalFeatures(columns, sinusoids, width)
        self.position = nn.Parameter(0.02 * torch.randn(columns, width))
        self.known = nn.Parameter(torch.zeros(columns, width)) if observed else None

    @property
    def observes(self) -> bool:
        """Whether `forward` takes observed cells."""
        return self.known is not None

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        cells = self.features(x[..., None]) + self.position
        if self.known is None:
            return cells
        return cells + (torch.zeros_like(x) if observed is None else observed.to(x.dtype))[..., None] * self.known


class NumberHead(nn.Module):
    """(B, C, D) → one number per column, (B, C)."""

    def __init__(self, columns: int, width: int, cond: int):
        super().__init__()
        self.modulate = Modulate(width, cond)
        self.linear = ColumnLinear(columns, width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.modulate(x, c))[..., 0]


class CategoryEmbedding(nn.Module):
    """Tokens (B, C) → (B, C, D): a table of states, then the mask, per column; the mask's id is the largest K."""

    def __init__(self, states: tuple[int, ...], width: int):
        super().__init__()
        self.mask_id = max(states)
        self.table = nn.Parameter(0.02 * torch.randn(sum(states) + len(states), width))
        starts = [sum(states[:c]) + c for c in range(len(states))]
        self.register_buffer("starts", torch.tensor(starts), persistent=False)
        self.register_buffer("sizes", torch.tensor(states), persistent=False)
        self.position = nn.Parameter(0.02 * torch.randn(len(states), width))

    def forward(self, tokens: Tensor) -> Tensor:
        index = self.starts + torch.where(tokens == self.mask_id, self.sizes, tokens)
        return nn.functional.embedding(index, self.table) + self.position


class CategoryHead(nn.Module):
    """(B, C, D) → logits (B, C, largest K), −∞ beyond a column's own K; see `CategoricalHead`."""

    def __init__(self, states: tuple[int, ...], width: int, cond: int, deep: bool):
        super().__init__()
        self.modulate = Modulate(width, cond)
        self.output = CategoricalHead(states, width, deep, mask_logit=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor | ColumnLogits:
        return self.output(self.modulate(x, c))
