"""CUDA graphs: what was launched once, kernel by kernel, is launched again as one piece.

A graph reads and writes fixed memory: inputs are copied into it, answers lie in it until the next replay. Nothing
that is captured may wait for the device or depend on a number on the host; times and keys are tensors.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..diffusion.space import Net
from ..kernels import Places

log = logging.getLogger(__name__)
_GRAPHED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
WARM_UPS = 3  # calls before a training step is captured: compilers and libraries set themselves up in them
MOST = 32  # kinds of questions that keep a graph


class Memory:
    """Where graphs of which never two run at a time lie, one over the other, and the stream they are captured on."""

    def __init__(self):
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()


def capture(
    function: Callable[[], object], warm_ups: int = WARM_UPS, memory: Memory | None = None, errors: str = "global"
) -> tuple[Callable[[], None], object]:
    """(replay, result) of a function captured as a CUDA graph; every replay writes into that result.

    Args:
        memory: shared with other graphs; default its own.
        errors: whose calls that a capture forbids spoil it: "thread_local" leaves threads alone that load or decode.
    """
    memory = memory or Memory()
    now, side = torch.cuda.current_stream(), memory.stream
    with torch.cuda.stream(now), no_copies():  # a capture that fails leaves its own stream the current one
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(warm_ups):
                function()
        now.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory.pool, stream=side, capture_error_mode=errors):
            result = function()
    return graph.replay, result


@contextlib.contextmanager
def no_copies() -> Iterator[None]:
    """Autocast makes its low-precision copies of weights anew in every product: kept ones would be freed while a graph
    still reads them. Warm-ups need this as well, for compiled code is compiled again where it changes."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class GraphedNet:
    """A network whose evaluations are captured, one graph for each kind of question (shapes, heads, rows).

    A kind is answered eagerly when it is first asked, which also is the capture's warm-up, and captured the second
    time. Graphs share their memory, so what one returns is overwritten by the next evaluation of any kind. Where a
    capture fails, that kind runs eagerly from then on, and a line in the log says why.
    """

    def __init__(self, net: Net):
        self.net, self.graphs = net, {}
        self.selects_rows = getattr(net, "selects_rows", False)
        self.memory, self.addresses = None, addresses(net)

    def __call__(self, x: Mapping, t: Mapping, mask: Mapping | None = None, outputs=None):
        inputs = {"x": dict(x), "t": dict(t), "mask": dict(mask or {})}
        kind = signature(inputs, outputs)
        if kind is None:
            return self.net(x, t, mask=mask, outputs=outputs)
        known = kind in self.graphs
        if not known:
            while len(self.graphs) >= MOST:
                self.graphs.pop(next(iter(self.graphs)))
            self.graphs[kind] = Graph(self.net, inputs, outputs)
        graph = self.graphs[kind]
        graph.take(inputs)
        if known and graph.replay is None and not graph.failed:
            self._capture(graph)
        return graph()

    def _capture(self, graph: Graph) -> None:
        try:
            self.memory = self.memory or Memory()
            graph.replay, graph.answer = capture(graph.evaluate, 0, self.memory, "thread_local")
        except RuntimeError as error:
            graph.failed, self.memory = True, None  # what a broken capture leaves there is not for others
            reason = str(error.__context__ or error).splitlines()[0]  # ending it fails too, and says less
            log.warning("no CUDA graph for this evaluation, it runs eagerly: %s", reason)


class Graph:
    """One kind of question, asked of fixed memory; eager until it has a `replay`."""

    def __init__(self, net: Net, inputs: dict[str, dict[str, Tensor]], outputs):
        self.held = {part: {m: torch.empty_like(v) for m, v in values.items()} for part, values in inputs.items()}
        self.net, self.outputs = net, outputs
        self.replay, self.answer, self.failed = None, None, False

    def take(self, inputs: dict[str, dict[str, Tensor]]) -> None:
        for part, values in inputs.items():
            for m, value in values.items():
                self.held[part][m].copy_(value)

    def evaluate(self) -> dict:
        with no_copies():
            return self.net(self.held["x"], self.held["t"], mask=self.held["mask"] or None, outputs=self.outputs)

    def __call__(self) -> dict:
        if self.replay is None:
            return self.evaluate()
        self.replay()
        return dict(self.answer)


def graphed(net: Net) -> Net:
    """The network with graphs, which it keeps from one sampling to the next; a plain function stays as it is."""
    if not isinstance(net, torch.nn.Module):
        return net
    if net not in _GRAPHED or _GRAPHED[net].addresses != addresses(net):  # graphs read the weights where they lay
        _GRAPHED[net] = GraphedNet(weakref.proxy(net))
    return _GRAPHED[net]


def release(net: Net) -> None:
    """Give back the memory of a network's graphs, some gigabytes for large ones, before the GPU goes on to train."""
    if _GRAPHED.pop(net, None) is not None:
        torch.cuda.empty_cache()


def addresses(net: Net) -> tuple[int, ...]:
    """Where the weights lie."""
    return tuple(p.data_ptr() for p in (*net.parameters(), *net.buffers()))


def signature(inputs: Mapping[str, Mapping[str, Tensor]], outputs) -> tuple | None:
    """What must agree for a graph to serve again; None where rows are picked by number, which change each time."""
    rows = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs or [])
    if any(isinstance(r, Tensor | Places) for r in rows.values()):
        return None
    shapes = [(part, m, tuple(v.shape), v.dtype) for part, values in inputs.items() for m, v in values.items()]
    wanted = [(m, None if r is None else (r.start, r.stop)) for m, r in rows.items()]
    device = next(iter(inputs["x"].values())).device
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return tuple(shapes), tuple(wanted), outputs is None, precision
