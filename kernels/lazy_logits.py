"""Lazy logits: hidden states and the output projection of a discrete head, applied on demand."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import use_triton
from .linear_cross_entropy import linear_cross_entropy
from .linear_cross_entropy_sum import linear_cross_entropy_sum
from .tau_leap import tau_leap
from .tau_leap_linear import tau_leap_linear


class LazyLogits:
    """Unnormalized log p(x₀), (B, L, C) = hidden (B, L, D) · weightᵀ (C, D) + bias (C,).

    Losses and τ-leaping pass the three parts to fused kernels, so that the (B, L, C) tensor need not be computed.
    Without a weight, `hidden` holds the logits themselves.
    """

    def __init__(self, hidden: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        self.hidden, self.weight, self.bias = hidden, weight, bias

    @classmethod
    def wrap(cls, out: LazyLogits | Tensor) -> LazyLogits:
        """`out` itself, or a tensor of logits as `LazyLogits`."""
        return out if isinstance(out, LazyLogits) else cls(out)

    def __getitem__(self, samples: slice) -> LazyLogits:
        """The logits of a part of the batch."""
        return LazyLogits(self.hidden[samples], self.weight, self.bias)

    def values(self) -> Tensor:
        """(B, L, C): all logits, in the dtype of the head."""
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

    def scatter_positions(self, index: Tensor, samples: int, length: int) -> LazyLogits:
        """(samples, length) logits from those of single positions, (R, 1); all others are zero and have no meaning.

        index: (R,) int64, sample · length + position.
        """
        hidden = self.hidden.new_zeros(samples * length, self.hidden.shape[-1]).index_copy(0, index, self.hidden[:, 0])
        return LazyLogits(hidden.view(samples, length, -1), self.weight, self.bias)

    def restrict(self, allowed: Tensor) -> LazyLogits:
        """The logits with −∞ for states that are not allowed; a logit of the mask, behind the states, stays.

        allowed: (L, K) bool.
        """
        values = self.values()
        forbidden = torch.nn.functional.pad(~allowed, (0, values.shape[-1] - allowed.shape[-1]))
        return LazyLogits(values.masked_fill(forbidden, -torch.inf))

    def at_uniforms(self, uniforms: Tensor, states: int, wanted: Tensor) -> Tensor:
        """(B, L): the states at the given points (B, L) of the cumulative distributions; any state where not wanted."""
        return tokens_at(self.log_probs(states), uniforms)

    def cross_entropy(self, target: Tensor, columns: int) -> Tensor:
        """(B, L) float32 of −log softmax(first `columns`)[target]; 0 where the target is −1."""
        if self.weight is None:
            losses = torch.nn.functional.cross_entropy(
                self.hidden[..., :columns].flatten(0, 1).float(), target.flatten(), ignore_index=-1, reduction="none"
            )
        else:
            losses = linear_cross_entropy(*self._head(columns), target.flatten())
        return losses.view_as(target)

    def cross_entropy_sum(self, target: Tensor, columns: int, row_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ row_weight · losses, the losses of `cross_entropy`), both (B, L); only the sum is differentiable."""
        total, losses = linear_cross_entropy_sum(*self._head(columns), target.flatten(), row_weight.flatten())
        return total, losses.view_as(target)

    def sums_at_once(self) -> bool:
        """Whether `cross_entropy_sum` computes gradients together with the losses, so that it is the faster one."""
        return self.weight is not None and torch.is_grad_enabled() and use_triton(None, self.hidden, hidden=self.hidden)

    def _head(self, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (B · L, D) and the first `columns` rows of the projection, which must be there."""
        assert self.weight is not None
        bias = None if self.bias is None else self.bias[:columns]
        return self.hidden.flatten(0, 1), self.weight[:columns], bias

    def tau_leap(
        self,
        tokens: Tensor,
        rate: Tensor,
        keys: Tensor,
        states: int,
        rule: str,
        mask_logit: bool,
        uncond: LazyLogits | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """`kernels.tau_leap` of these logits; `uncond` are those of the second branch of guidance."""
        if self.weight is not None and (uncond is None or uncond.weight is self.weight):
            hidden = None if uncond is None else uncond.hidden
            return tau_leap_linear(
                self.hidden, self.weight, self.bias, tokens, rate, keys, states, rule, mask_logit, hidden, guidance
            )
        other = None if uncond is None else uncond.values()
        return tau_leap(self.values(), tokens, rate, keys, states, rule, mask_logit, other, guidance)


def tokens_at(logits: Tensor, uniforms: Tensor) -> Tensor:
    """(B, L): the states at the points (B, L) of the cumulative distributions of logits (B, L, K)."""
    total = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), -1).double().cumsum(-1)
    return (total <= uniforms[..., None].double() * total[..., -1:]).sum(-1)
