"""Logits of columns with different numbers of states, computed by groups of columns of similar size."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .lazy_logits import LazyLogits, tokens_at
from .random import uniform


@dataclasses.dataclass
class ColumnGroup:
    """The head of some columns: their logits are hidden (B, c, D) · weight (c, D, K) + bias (c, 1, K).

    Args:
        columns: (c,) int64 on the device, their places among all columns.
    """

    columns: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, c, K) from the hidden states of all columns (B, L, D)."""
        own = hidden.index_select(1, self.columns).transpose(0, 1)
        return torch.baddbmm(self.bias, own, self.weight).transpose(0, 1)


class ColumnLogits(LazyLogits):
    """Logits (B, L, C) that are −∞ beyond a column's own number of states.

    A column of 10,000 states among ten of 20 would make a padded tensor a thousand times larger than needed. So each
    group has its own, and where only some rows of a large column are asked for, only those are computed.
    """

    def __init__(self, hidden: Tensor, groups: list[ColumnGroup], order: Tensor):
        """order: (L,) int64, the place of every column in the groups one after the other."""
        super().__init__(hidden)
        self.groups, self.order = groups, order

    def __getitem__(self, samples: slice) -> ColumnLogits:
        return ColumnLogits(self.hidden[samples], self.groups, self.order)

    def values(self) -> Tensor:
        states = max(group.bias.shape[-1] for group in self.groups)
        pad = torch.nn.functional.pad
        parts = [group.logits(self.hidden) for group in self.groups]
        return self._in_order([pad(x, (0, states - x.shape[-1]), value=-math.inf) for x in parts])

    def column(self, index: int) -> Tensor:
        return self.values()[..., index].float()

    def restrict(self, allowed: Tensor) -> ColumnLogits:
        groups = []
        for group in self.groups:
            own = allowed.index_select(0, group.columns)[:, None, : group.bias.shape[-1]]
            groups.append(dataclasses.replace(group, bias=group.bias.masked_fill(~own, -math.inf)))
        return ColumnLogits(self.hidden, groups, self.order)

    def cross_entropy(self, target: Tensor, columns: int) -> Tensor:
        losses = []
        for group in self.groups:
            own = target.index_select(1, group.columns)
            if self._is_partial(group) and not torch.compiler.is_compiling():
                rows = (own[:, 0] >= 0).nonzero()[:, 0]
                some = LazyLogits(group.logits(self.hidden[rows])).cross_entropy(own[rows], columns)
                losses.append(torch.zeros(own.shape).index_copy(0, rows, some))
            else:
                losses.append(LazyLogits(group.logits(self.hidden)).cross_entropy(own, columns))
        return self._in_order(losses)

    def tau_leap(self, tokens, rate, keys, states, rule, mask_logit, uncond=None, guidance=1.0):
        if rule != "last" or mask_logit or uncond is not None:
            return super().tau_leap(tokens, rate, keys, states, rule, mask_logit, uncond, guidance)
        masked = tokens == states
        return torch.where(masked, self.at_uniforms(uniform(keys, tokens.shape[1]), states, masked), tokens)

    def at_uniforms(self, uniforms: Tensor, states: int, wanted: Tensor) -> Tensor:
        drawn = []
        for group in self.groups:
            u, here = (x.index_select(1, group.columns) for x in (uniforms, wanted))
            if not self._is_partial(group):
                drawn.append(tokens_at(group.logits(self.hidden), u))
                continue
            rows = here[:, 0].nonzero()[:, 0]
            token = torch.zeros(here.shape, dtype=torch.int64)
            drawn.append(token.index_copy(0, rows, tokens_at(group.logits(self.hidden[rows]), u[rows])))
        return self._in_order(drawn)

    def _is_partial(self, group: ColumnGroup) -> bool:
        """Whether only the rows that matter are computed; finding them would make a GPU wait."""
        return self.hidden.device.type == "cpu" and len(group.columns) == 1

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Values of the groups (B, c, …) as values of all columns (B, L, …)."""
        return torch.cat(parts, 1).index_select(1, self.order)
