"""The loss of a batch: the weighted sum of its modalities' losses."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..configs.config import Config
from ..diffusion import Space, Weighting
from ..kernels import Rng


class Objective(nn.Module):
    """The weighted loss of a batch as one module, so that ranks average the gradients of network and weighting alike.

    losses: (x0, t, rng) → {modality: (B,) unweighted loss}, computed with `net`.
    """

    def __init__(self, net: nn.Module, weighting: nn.ModuleDict, losses: Callable[..., dict[str, Tensor]]):
        super().__init__()
        self.net, self.weighting, self.losses = net, weighting, losses

    def forward(self, x0, t, loss_mask, rng: Rng) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over samples and modalities, and the detached unweighted losses."""
        losses = self.losses(x0, t, rng)
        weighted = [(self.weighting[m](loss, t[m]) * loss_mask[m]).sum() for m, loss in losses.items()]
        return sum(weighted), {m: loss.detach() for m, loss in losses.items()}


def weightings(config: Config, space: Space) -> nn.ModuleDict:
    """{modality: its configured weighting}."""
    return nn.ModuleDict(
        {m: Weighting(space[m], c.loss.weighting, c.loss.scale, c.loss.gamma) for m, c in config.modalities.items()}
    )
