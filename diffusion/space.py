"""The product of state spaces: any number of named modalities, each with its own process and its own time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..kernels import Draw, Places, Rng
from ..kernels.philox import modality_hash
from .processes import Process

Net = Callable[..., dict]


class Space(dict[str, Process]):
    """{name: process}. A data point is {name: (B, *shape)}, its times are {name: (B,)}.

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
        n = len(rng.samples)
        return {m: self[m].prior(n, rng.keys(m, Draw.PRIOR)) for m in (self if names is None else names)}

    def perturb(self, x0: dict[str, Tensor], t: dict[str, Tensor], rng: Rng) -> dict[str, Tensor]:
        """Draw every modality of x₀ at its own time."""
        return {m: self[m].perturb(x, t[m], rng.keys(m, Draw.NOISE)) for m, x in x0.items()}

    def evaluate(self, net: Net, x: dict[str, Tensor], t: dict[str, Tensor], outputs=None) -> dict:
        """The network at (x, t): tells it each time in the form it was trained on and which keys to skip.

        Times below a process's t_min (a clean condition) are raised to it. outputs: names, or {name: rows} for a
        network that can leave rows out (see `MMDiT.forward`).
        """
        t = {m: t[m].clamp(min=self[m].t_min) for m in x}
        times = {m: self[m].time_conditioning(t[m]) for m in x}
        masks = {m: self[m].key_mask(x[m]) for m in x}
        masks = {m: mask for m, mask in masks.items() if mask is not None}
        out = net(x, times, mask=masks or None, outputs=outputs)
        rows = outputs if isinstance(outputs, Mapping) else {}
        return {m: self[m].answer(v, *take(x[m], t[m], rows.get(m))) for m, v in out.items()}

    def losses(
        self,
        net: Net,
        x0: dict[str, Tensor],
        t: dict[str, Tensor],
        rng: Rng,
        names: Iterable[str] | None = None,
        given: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{name: (B,) float32}: every modality's own loss at its own time, unweighted.

        given: {name: bool of x₀'s shape}, elements that stay clean as a condition: the network is told (as `given=`)
        and they do not count in the loss.
        """
        names, given = list(x0 if names is None else names), given or {}
        xt = self.perturb(x0, t, rng)
        xt = {m: torch.where(given[m], x0[m], x) if m in given else x for m, x in xt.items()}
        out = self.evaluate(functools.partial(net, given=given) if given else net, xt, t, outputs=names)
        return {m: self[m].loss(out[m], x0[m], xt[m], rng.keys(m, Draw.NOISE), given.get(m)) for m in names}

    def check(self, x: dict[str, Tensor]) -> None:
        """Raise ValueError unless every given modality belongs to the space and holds valid data."""
        for name, value in x.items():
            if name not in self:
                raise ValueError(f"unknown modality {name!r}; this space has {', '.join(self)}")
            self[name].check(name, value)
        if len({len(value) for value in x.values()}) > 1:
            raise ValueError(f"modalities differ in batch size: { {m: len(v) for m, v in x.items()} }")


def expand_time(t: float | Tensor, n: int, device) -> Tensor:
    """A scalar time as (n,) float64; a (n,) tensor passes."""
    return torch.as_tensor(t, dtype=torch.float64, device=device).expand(n)


def take(x: Tensor, t: Tensor, rows: slice | Tensor | Places | None) -> tuple[Tensor, Tensor]:
    """The part of a batch and of its times that a network was asked about."""
    if isinstance(rows, Places):
        return x[rows.samples, rows.position][:, None], t[rows.samples]
    return (x, t) if rows is None else (x[rows], t[rows])


def selects_rows(net: Net) -> bool:
    """Whether a network takes `outputs` as {name: rows}."""
    return getattr(net, "selects_rows", False)
