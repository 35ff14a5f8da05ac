"""The loss of a batch: the weighted sum of its modalities' losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from ..configs.config import Loss
from ..diffusion import Space, Weighting
from ..kernels import Rng


class Objective(nn.Module):
    """The loss as one module, so that ranks average the gradients of network and weighting alike.

    Args:
        names: the modalities that are learned.
        observed: draws the elements that are clean conditions in a batch, {modality: bool}; None for none.
    """

    def __init__(
        self,
        net: nn.Module,
        weighting: nn.ModuleDict,
        space: Space,
        names: Iterable[str],
        observed: Callable[[Rng], dict[str, Tensor]] | None = None,
    ):
        super().__init__()
        self.net, self.weighting = net, weighting
        self.space, self.names, self.observed = space, list(names), observed

    def forward(
        self,
        x0: dict[str, Tensor],
        t: dict[str, Tensor],
        loss_mask: dict[str, Tensor],
        rng: Rng,
        present: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the sum of weighted losses over samples and modalities, {modality: (B,) detached unweighted loss}).

        present: {modality: (B,) bool}: nothing of a modality that a sample lacks is a condition.
        """
        observed = {} if self.observed is None else self.observed(rng)
        observed |= {m: observed[m] & like(has, observed[m]) for m, has in (present or {}).items() if m in observed}
        predictions = self.space.predictions(self.net, x0, t, rng, self.names, observed)
        sums = {m: self.weighting[m].sum(t[m], loss_mask[m], *prediction) for m, prediction in predictions.items()}
        return sum(total for total, _ in sums.values()), {m: loss for m, (_, loss) in sums.items()}


def weightings(losses: Mapping[str, Loss], space: Space) -> nn.ModuleDict:
    """{process: the weighting of its loss}."""
    return nn.ModuleDict({m: Weighting(space[m], c.weighting, c.scale, c.gamma) for m, c in losses.items()})


def like(has: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, …, 1), to broadcast with x (B, …)."""
    return has.view(-1, *[1] * (x.ndim - 1))
