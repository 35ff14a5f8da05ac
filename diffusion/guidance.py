"""Noisy guidance: extrapolate away from the prediction under a noisier condition."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from ..configs.config import GuidanceConfig
from ..kernels import Draw, Rng
from .space import Net, Space


class Guidance(GuidanceConfig):
    """out = w f(x_t, y_s) + (1 − w) f(x_t, y_σ), with y_σ the condition noised afresh to time σ.

    Args:
        scale: w; 1 is no guidance. One number for all guided modalities, or {modality: w}, where others are not guided.
        final_time: σ; 1 is classifier-free guidance. A condition that is noisier than σ keeps its own time.
        interval: guidance acts while the time of the generated modality is in this closed interval.

    Raises:
        ValueError: a reversed interval, or times outside [0, 1].
    """

    def __init__(
        self,
        scale: float | dict[str, float] = 1.0,
        final_time: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ):
        try:
            super().__init__(scale=scale, final_time=final_time, interval=interval)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            name = ".".join(["guidance", *map(str, problem["loc"][:1])])
            raise ValueError(f"{name} = {problem['input']!r}: {problem['msg']}") from None

    def scale_of(self, name: str) -> float:
        """The scale of a modality."""
        return self.scale.get(name, 1.0) if isinstance(self.scale, dict) else self.scale

    def is_active(self, name: str, t: float) -> bool:
        """Whether a modality is guided at its time t."""
        return self.scale_of(name) != 1.0 and self.interval[0] <= t <= self.interval[1]

    def evaluate(
        self,
        space: Space,
        net: Net,
        x: dict[str, Tensor],
        t: dict[str, Tensor],
        outputs: Iterable[str],
        condition: Collection[str],
        rng: Rng,
        guided: Collection[str] | None = None,
        observed: Mapping[str, Tensor] | None = None,
        positions: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict, dict]:
        """(predictions, predictions under the noisier condition), both evaluated as one doubled batch.

        Args:
            t: {modality: (B,) time}, 0 where it is clean.
            condition: the modalities that are noised afresh in the second half of the batch.
            guided: the modalities of `outputs` whose second prediction is used, default all; a network with
                `partial_outputs` computes it for no others.
            observed, positions: see `Space.evaluate`.
        """
        n, outputs = len(rng.samples), list(outputs)
        guided = outputs if guided is None else guided
        noisy, later = self.noisier(space, x, t, condition, rng)
        x2 = {m: torch.cat([value, noisy.get(m, value)]) for m, value in x.items()}
        t2 = {m: torch.cat([value, later.get(m, value)]) for m, value in t.items()}
        observed2 = {m: torch.cat([value, value]) for m, value in (observed or {}).items()}
        positions2 = {}
        for m, index in (positions or {}).items():
            positions2[m] = torch.cat([index, index + n * x[m].shape[1]]) if m in guided else index
        wanted = {m: None if m in guided else n for m in outputs} if partial_outputs(net) else outputs
        both = space.evaluate(net, x2, t2, wanted, observed2, positions2)
        return {m: both[m][:n] for m in outputs}, {m: both[m][n:] for m in guided}

    def noisier(
        self, space: Space, x: dict[str, Tensor], t: dict[str, Tensor], condition: Iterable[str], rng: Rng
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The condition noised afresh to time σ, and its times, (B,) each."""
        later = {m: t[m].clamp(min=self.final_time) for m in condition}
        noisy = {m: space[m].transition(x[m], t[m], later[m], rng.keys(m, Draw.GUIDANCE)) for m in condition}
        return noisy, later


def partial_outputs(net: Net) -> bool:
    """Whether a network takes `outputs` as {modality: n} and `positions` (see `MMDiT.forward`)."""
    return getattr(net, "partial_outputs", False)
