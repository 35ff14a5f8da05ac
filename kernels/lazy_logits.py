"""The answer of a discrete head, kept as hidden states and a linear layer until somebody asks for the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Single positions of a batch of sequences, where nothing else is asked for.

    Args:
        rows: (S,) int64, the samples they lie in.
        row, position: (R,) int64; place r is position[r] of sample rows[row[r]].
    """

    rows: Tensor
    row: Tensor
    position: Tensor

    @classmethod
    def where(cls, chosen: Tensor) -> Places:
        """Those that are True in (B, L)."""
        rows = chosen.any(1).nonzero()[:, 0]
        return cls(rows, *chosen[rows].nonzero().unbind(1))

    def twice(self, n: int) -> Places:
        """The same places in both halves of a doubled batch of 2n samples."""
        rows = torch.cat([self.rows, self.rows + n])
        return Places(rows, torch.cat([self.row, self.row + len(self.rows)]), self.position.repeat(2))

    @property
    def samples(self) -> Tensor:
        """(R,): the sample of each place."""
        return self.rows[self.row]


class LazyLogits:
    """Unnormalized log p(x₀), (B, L, C) = hidden (B, L, D) · weightᵀ (C, D) + bias (C,).

    Losses and τ-leaping hand the three parts to fused kernels, so the (B, L, C) tensor need never exist.
    `LazyLogits.wrap` also wraps a plain tensor of logits.
    """

    def __init__(self, hidden: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None):
        self.hidden, self.weight, self.bias = hidden, weight, bias

    @classmethod
    def of(cls, out: LazyLogits | Tensor) -> LazyLogits:
        return out if isinstance(out, LazyLogits) else cls(out)

    def values(self) -> Tensor:
        """(B, L, C): every logit, in the dtype of the head."""
        if self.weight is None:
            return self.hidden
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def column(self, index: int) -> Tensor:
        """(B, L) float32: one column of the logits."""
        if self.weight is None:
            return self.hidden[..., index].float()
        bias = None if self.bias is None else self.bias[index : index + 1]
        return torch.nn.functional.linear(self.hidden, self.weight[index : index + 1], bias).squeeze(-1).float()

    def log_probs(self, columns: int | None = None) -> Tensor:
        """(B, L, columns) float32 (float64 stays): log-softmax over the first `columns` (default all)."""
        values = self.values()[..., :columns]
        return torch.log_softmax(values if values.dtype == torch.float64 else values.float(), -1)

    def chunk(self, n: int) -> list[LazyLogits]:
        """Split along the batch, as torch.chunk does."""
        return [LazyLogits(hidden, self.weight, self.bias) for hidden in self.hidden.chunk(n)]

    def spread(self, rows: Tensor, n: int) -> LazyLogits:
        """The same for a batch of n, of which these are the rows `rows`; the others are meaningless."""
        whole = self.hidden.new_zeros(n, *self.hidden.shape[1:])
        return LazyLogits(whole.index_copy_(0, rows, self.hidden), self.weight, self.bias)

    def placed(self, places: Places, n: int, length: int) -> LazyLogits:
        """The same for n sequences, of which these, (R, 1, C), are `places`; the others are meaningless."""
        whole = self.hidden.new_zeros(n, length, self.hidden.shape[2])
        whole[places.samples, places.position] = self.hidden[:, 0]
        return LazyLogits(whole, self.weight, self.bias)

    def cross_entropy(self, target: Tensor, columns: int) -> Tensor:
        """(B, L) float32 of −log softmax(first `columns`)[target]; 0 where the target is −1."""
        from . import linear_cross_entropy

        if self.weight is None:
            rows = torch.nn.functional.cross_entropy(
                self.hidden[..., :columns].flatten(0, 1).float(), target.flatten(), ignore_index=-1, reduction="none"
            )
        else:
            bias = None if self.bias is None else self.bias[:columns]
            rows = linear_cross_entropy(self.hidden.flatten(0, 1), self.weight[:columns], bias, target.flatten())
        return rows.view_as(target)

    def tau_leap(self, tokens, rate, keys, states, rule, mask_logit, uncond: LazyLogits | None = None, guidance=1.0):
        """`kernels.tau_leap` from whatever this object holds; `uncond` is the second branch of guidance."""
        from . import tau_leap, tau_leap_linear

        if self.weight is not None and (uncond is None or uncond.weight is self.weight):
            hidden = None if uncond is None else uncond.hidden
            return tau_leap_linear(
                self.hidden, self.weight, self.bias, tokens, rate, keys, states, rule, mask_logit, hidden, guidance
            )
        other = None if uncond is None else uncond.values()
        return tau_leap(self.values(), tokens, rate, keys, states, rule, mask_logit, other, guidance)
