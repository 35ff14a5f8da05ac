"""The product of state spaces: any number of named modalities, each with its own process and its own time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..kernels import Draw, Rng
from ..kernels.philox import modality_hash
from .processes import Process

Net = Callable[..., dict]  # net(x, t, mask=None, outputs=None) → {modality: output}, see `Space.evaluate`


class Space(dict[str, Process]):
    """{modality: process}. A data point is {modality: (B, *shape)}, its times are {modality: (B,)}.

    >>> space = Space({"image": Gaussian((1, 8, 8), Cosine()), "text": Masked(20, 27, LogLinear())})
    """

    def __init__(self, processes: dict[str, Process]):
        super().__init__(processes)
        if not processes:
            raise ValueError("a space needs at least one modality")
        if len({modality_hash(name) for name in processes}) < len(processes):
            raise ValueError(f"two modality names share a random stream, rename one of {', '.join(processes)}")

    def prior(self, rng: Rng, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Pure noise at time 1, one sample per entry of rng.samples."""
        n, names = len(rng.samples), self if names is None else names
        return {m: self[m].prior(n, rng.keys(m, Draw.PRIOR), rng.uniforms.get(m)) for m in names}

    def perturb(self, x0: dict[str, Tensor], t: dict[str, Tensor], rng: Rng) -> dict[str, Tensor]:
        """Draw x_t of every modality, each at its own time."""
        return {m: self[m].perturb(x, t[m], rng.keys(m, Draw.NOISE)) for m, x in x0.items()}

    def evaluate(
        self,
        net: Net,
        x: dict[str, Tensor],
        t: dict[str, Tensor],
        outputs: Iterable[str] | Mapping[str, int | None] | None = None,
        observed: Mapping[str, Tensor] | None = None,
        positions: Mapping[str, Tensor] | None = None,
    ) -> dict:
        """{modality: ε-prediction or logits} of the network at (x, t).

        The network is called with the time conditioning of every modality (times below t_min are raised to it) and the
        attention masks.

        Args:
            outputs: the modalities to predict, default all; {modality: n} for the first n samples only.
            observed: {modality: bool of x's shape}, elements that are clean whatever the modality's time, for
                networks trained with them.
            positions: see `MMDiT.forward`. The last two are passed on only where they are given.
        """
        t = {m: t[m].clamp(min=self[m].t_min) for m in x}
        times = {m: self[m].time_conditioning(t[m]) for m in x}
        masks = {m: self[m].key_mask(x[m]) for m in x}
        masks = {m: mask for m, mask in masks.items() if mask is not None}
        more = {"observed": observed, "positions": positions}
        more = {name: value for name, value in more.items() if value}
        out = net(x, times, mask=masks or None, outputs=outputs, **more)
        first = outputs if isinstance(outputs, Mapping) else {}
        return {m: self[m].to_prediction(v, x[m][: first.get(m)], t[m][: first.get(m)]) for m, v in out.items()}

    def predictions(
        self,
        net: Net,
        x0: dict[str, Tensor],
        t: dict[str, Tensor],
        rng: Rng,
        names: Iterable[str] | None = None,
        observed: dict[str, Tensor] | None = None,
    ) -> dict[str, tuple]:
        """{modality: the arguments of its `Process.loss`}: every modality noised at its own time, and the prediction.

        observed: {modality: bool of x₀'s shape}, elements that stay clean as a condition: the network sees which, and
        they do not count in the loss.
        """
        names, observed = list(x0 if names is None else names), observed or {}
        xt = self.perturb(x0, t, rng)
        xt = {m: torch.where(observed[m], x0[m], x) if m in observed else x for m, x in xt.items()}
        out = self.evaluate(net, xt, t, names, observed)
        return {m: (out[m], x0[m], xt[m], rng.keys(m, Draw.NOISE), observed.get(m)) for m in names}

    def losses(
        self,
        net: Net,
        x0: dict[str, Tensor],
        t: dict[str, Tensor],
        rng: Rng,
        names: Iterable[str] | None = None,
        observed: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{modality: (B,) float32}: the loss of every modality at its own time, unweighted; see `predictions`."""
        predictions = self.predictions(net, x0, t, rng, names, observed)
        return {m: self[m].loss(*prediction) for m, prediction in predictions.items()}

    def check(self, x: dict[str, Tensor]) -> None:
        """Raise ValueError unless every modality of x belongs to the space and holds valid data."""
        for name, value in x.items():
            if name not in self:
                raise ValueError(f"unknown modality {name!r}; this space has {', '.join(self)}")
            self[name].check(name, value)
        if len({len(value) for value in x.values()}) > 1:
            raise ValueError(f"modalities differ in batch size: { {m: len(v) for m, v in x.items()} }")


def expand_time(t: float | Tensor, n: int, device: torch.device) -> Tensor:
    """A scalar time as (n,) float64; a (n,) tensor passes."""
    return torch.as_tensor(t, dtype=torch.float64, device=device).expand(n)
