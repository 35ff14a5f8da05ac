"""CUDA graphs: what was launched once, kernel by kernel, is launched again as one piece.

A graph reads and writes fixed memory: inputs are copied into it, answers lie in it until the next replay. Nothing
that is captured may wait for the device or depend on a number on the host; times and keys are tensors.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..diffusion.space import Net

log = logging.getLogger(__name__)
_GRAPHED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
WARM_UPS = 3  # calls before a capture: compilers and libraries set themselves up in them


def capture(function: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """(replay, result) of a function captured as a CUDA graph; every replay writes into that result."""
    side, now = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    now.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


class GraphedNet:
    """A network whose evaluations are captured, one graph for each kind of question (shapes, heads, rows).

    What it returns is overwritten by the next evaluation of the same kind. Where a capture fails, that kind runs
    eagerly from then on, and a line in the log says why.
    """

    def __init__(self, net: Net):
        self.net, self.graphs = net, {}
        self.selects_rows = getattr(net, "selects_rows", False)

    def __call__(self, x: Mapping, t: Mapping, mask: Mapping | None = None, outputs=None):
        inputs = {"x": dict(x), "t": dict(t), "mask": dict(mask or {})}
        kind = signature(inputs, outputs)
        if kind is None:
            return self.net(x, t, mask=mask, outputs=outputs)
        if kind not in self.graphs:
            self.graphs[kind] = self._captured(inputs, outputs)
        if self.graphs[kind] is None:
            return self.net(x, t, mask=mask, outputs=outputs)
        held, replay, answer = self.graphs[kind]
        for part, values in inputs.items():
            for m, value in values.items():
                held[part][m].copy_(value)
        replay()
        return dict(answer)

    def _captured(self, inputs: dict, outputs):
        held = {part: {m: value.clone() for m, value in values.items()} for part, values in inputs.items()}

        def call():
            return self.net(held["x"], held["t"], mask=held["mask"] or None, outputs=outputs)

        try:
            return held, *capture(call)
        except RuntimeError as error:
            log.warning("no CUDA graph for this evaluation, it runs eagerly: %s", str(error).splitlines()[0])
            return None


def graphed(net: Net) -> Net:
    """The network with graphs, which it keeps from one sampling to the next; a plain function stays as it is."""
    if not isinstance(net, torch.nn.Module):
        return net
    if net not in _GRAPHED:
        _GRAPHED[net] = GraphedNet(weakref.proxy(net))
    return _GRAPHED[net]


def signature(inputs: Mapping[str, Mapping[str, Tensor]], outputs) -> tuple | None:
    """What must agree for a graph to serve again; None where rows are picked by number, which change each time."""
    rows = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs or [])
    if any(isinstance(r, Tensor) for r in rows.values()):
        return None
    shapes = [(part, m, tuple(v.shape), v.dtype) for part, values in inputs.items() for m, v in values.items()]
    wanted = [(m, None if r is None else (r.start, r.stop)) for m, r in rows.items()]
    device = next(iter(inputs["x"].values())).device
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return tuple(shapes), tuple(wanted), outputs is None, precision
