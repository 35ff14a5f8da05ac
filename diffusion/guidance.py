"""Noisy guidance: push the answer away from what a noisier condition would give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import Draw, Places, Rng
from .space import Net, Space, selects_rows


@dataclasses.dataclass(frozen=True)
class Guidance:
    """out = w f(x_t, y_s) + (1 − w) f(x_t, y_σ), with y_σ the condition noised afresh to time σ.

    Args:
        scale: w; 1 is no guidance. One number for all guided modalities, or {name: w}, where others stay unguided.
        final_time: σ; 1 is classifier-free guidance. A condition already noisier than σ keeps its own level.
        interval: guidance acts while the generated modality's time lies in this closed interval.
    """

    scale: float | dict[str, float] = 1.0
    final_time: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance interval needs 0 <= start <= end <= 1, got [{low}, {high}]")
        if not 0.0 < self.final_time <= 1.0:
            raise ValueError(f"guidance final_time must lie in (0, 1], got {self.final_time}")

    def scale_of(self, name: str) -> float:
        return self.scale.get(name, 1.0) if isinstance(self.scale, dict) else self.scale

    def active(self, name: str, t: float) -> bool:
        """Whether modality `name` is guided at its time t."""
        return self.scale_of(name) != 1.0 and self.interval[0] <= t <= self.interval[1]

    def evaluate(
        self,
        space: Space,
        net: Net,
        x: dict[str, Tensor],
        t: dict[str, Tensor],
        outputs: list[str] | Mapping[str, Places | None],
        condition: list[str],
        rng: Rng,
        guided: list[str] | None = None,
    ) -> tuple[dict, dict]:
        """Both branches in one doubled batch: (conditional outputs, outputs under the noisier condition).

        t[m] (B,) is the noise level of x[m], 0 where it is clean. guided: the modalities whose second branch is used
        (default all); a network that can leave rows out (see `MMDiT.forward`) computes it for no others, and takes
        {name: Places} for `outputs`.
        """
        guided = outputs if guided is None else guided
        noisier, later = self.noisier(space, x, t, condition, rng)
        x2 = {m: torch.cat([value, noisier.get(m, value)]) for m, value in x.items()}
        t2 = {m: torch.cat([value, later.get(m, value)]) for m, value in t.items()}
        if selects_rows(net):
            n, asked = len(rng.samples), outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs)
            whole = {m: None if m in guided else slice(0, n) for m in asked}
            single = {m: p.twice(n) if m in guided else p for m, p in asked.items() if p is not None}
            outputs = {**whole, **single}
        both = space.evaluate(net, x2, t2, outputs)
        pairs = {m: both[m].chunk(2) for m in both if m in guided or not selects_rows(net)}
        return {m: pairs[m][0] if m in pairs else both[m] for m in both}, {m: pairs[m][1] for m in guided}

    def noisier(
        self, space: Space, x, t, condition: list[str], rng: Rng
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The condition noised afresh to time σ, and its times, (B,) each."""
        later = {m: t[m].clamp(min=self.final_time) for m in condition}
        return {m: space[m].transition(x[m], t[m], later[m], rng.keys(m, Draw.GUIDANCE)) for m in condition}, later
