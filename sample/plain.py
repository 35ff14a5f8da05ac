"""The plain engine's sampling: what a careful reader of the paper would write; see `train.engine`.

The same steps and random numbers as `engine`, with every head computed in every evaluation, guidance as two passes of
the network, reference operations, and a loop that waits for the device in every step.
"""

from __future__ import annotations

from torch import Tensor

from ..diffusion.space import Net
from ..kernels.backend import use_backend


def every_head(net: Net) -> Net:
    """The network with all heads computed, whichever are asked for."""

    def call(x, t, mask=None, outputs=None, **options):
        out = net(x, t, mask=mask, outputs=None, **options)
        return {m: out[m] for m in (out if outputs is None else outputs)}

    return call


class PlainRun:
    """Mixed into the engine's run of a chunk."""

    def __init__(self, net, *args):
        super().__init__(every_head(net), *args)

    def update(self, k: int) -> dict[str, Tensor]:
        with use_backend("reference"):
            x = super().update(k)
        for value in x.values():
            value.flatten()[0].item()
        return x

    def changing(self, k: int, moving: list[str]) -> dict:
        return {}

    def evaluate(self, k: int, x, t, outputs: list[str], rng) -> tuple[dict, dict]:
        out = self.space.evaluate(self.net, x, t, outputs)
        guided = self.guided_at(k, outputs)
        if not guided:
            return out, {}
        noisier, later = self.guidance.noisier(self.space, x, t, self.condition, rng)
        uncond = self.space.evaluate(self.net, {**x, **noisier}, {**t, **later}, outputs)
        return out, {m: uncond[m] for m in guided}
