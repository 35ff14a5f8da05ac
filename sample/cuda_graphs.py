"""CUDA graphs: the kernel launches of an evaluation, captured once and replayed with a single launch.

A graph reads and writes fixed memory: inputs are copied into it, outputs stay in it until the next replay. Nothing that
is captured may wait for the device or depend on a number on the host; times and random-number keys are tensors.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..diffusion.space import Net

Result = TypeVar("Result")
log = logging.getLogger(__name__)
_GRAPHED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
WARM_UPS = 3  # calls before a training step is captured, for compilers and libraries to initialize
MAX_GRAPHS = 32  # input signatures that keep a graph


class Memory:
    """Shared memory pool of graphs that never run concurrently, and the stream that they are captured on."""

    def __init__(self):
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()


def capture(
    function: Callable[[], Result], warm_ups: int = WARM_UPS, memory: Memory | None = None, errors: str = "global"
) -> tuple[Callable[[], None], Result]:
    """(replay, result) of a function captured as a CUDA graph; every replay writes into that result.

    Args:
        memory: pool shared with other graphs; default one of its own.
        errors: which forbidden calls make the capture fail: "thread_local" allows those of threads that load or decode.
    """
    memory = memory or Memory()
    now, side = torch.cuda.current_stream(), memory.stream
    with torch.cuda.stream(now), no_autocast_cache():  # a capture that fails leaves its own stream the current one
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
def no_autocast_cache() -> Iterator[None]:
    """Turn off autocast's cache of low-precision weights: it would free copies that a graph still reads.

    Warm-ups need this as well, because compiled code is compiled again where the setting changes.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class GraphedNet:
    """A network whose evaluations are replayed as CUDA graphs, one graph per input signature (shapes, outputs).

    The first call with a signature runs eagerly, which also is the warm-up of the capture; the second one is captured.
    Graphs share their memory, so what one returns is overwritten by the next evaluation with any signature. Where a
    capture fails, that signature runs eagerly from then on, and a line in the log says why.
    """

    def __init__(self, net: nn.Module):
        self.net, self.graphs = net, {}
        self.partial_outputs = getattr(net, "partial_outputs", False)
        self.observes = getattr(net, "observes", ())
        self.memory, self.addresses = None, addresses(net)

    def __call__(
        self,
        x: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        outputs: Iterable[str] | Mapping[str, int | None] | None = None,
        **options: Mapping[str, Tensor],
    ) -> dict:
        """The network's outputs; `options` are its further inputs, {modality: tensor} each."""
        if options.get("positions"):  # their number differs from call to call
            return self.net(x, t, mask=mask, outputs=outputs, **options)
        inputs = {"x": dict(x), "t": dict(t), "mask": dict(mask or {})}
        inputs |= {name: dict(values) for name, values in options.items()}
        key = signature(inputs, outputs)
        is_new = key not in self.graphs
        if is_new:
            while len(self.graphs) >= MAX_GRAPHS:
                self.graphs.pop(next(iter(self.graphs)))
            self.graphs[key] = Graph(self.net, inputs, outputs)
        graph = self.graphs[key]
        graph.copy_in(inputs)
        if not is_new and graph.replay is None and not graph.failed:
            self._capture(graph)
        return graph()

    def _capture(self, graph: Graph) -> None:
        try:
            self.memory = self.memory or Memory()
            graph.replay, graph.result = capture(graph.evaluate, 0, self.memory, "thread_local")
        except RuntimeError as error:
            graph.failed, self.memory = True, None  # no other graph may use the memory of a failed capture
            reason = str(error.__context__ or error).splitlines()[0]  # the error from ending a capture says less
            log.warning("no CUDA graph for this evaluation, it runs eagerly: %s", reason)


class Graph:
    """The evaluations with one input signature, on fixed input memory; eager until it has a `replay`."""

    def __init__(self, net: Net, inputs: dict[str, dict[str, Tensor]], outputs):
        self.inputs = {part: {m: torch.empty_like(v) for m, v in values.items()} for part, values in inputs.items()}
        self.net, self.outputs = net, outputs
        self.replay, self.result, self.failed = None, None, False

    def copy_in(self, inputs: dict[str, dict[str, Tensor]]) -> None:
        """Copy the inputs of a call into the fixed memory."""
        for part, values in inputs.items():
            for m, value in values.items():
                self.inputs[part][m].copy_(value)

    def evaluate(self) -> dict:
        """The network at the fixed inputs."""
        with no_autocast_cache():
            x, t, mask = (self.inputs[part] for part in ("x", "t", "mask"))
            options = {part: values for part, values in self.inputs.items() if part not in ("x", "t", "mask")}
            return self.net(x, t, mask=mask or None, outputs=self.outputs, **options)

    def __call__(self) -> dict:
        if self.replay is None:
            return self.evaluate()
        self.replay()
        return dict(self.result)


def with_cuda_graphs(net: Net) -> Net:
    """The network with graphs, which are kept from one sampling to the next; a plain function is returned as it is."""
    if not isinstance(net, nn.Module):
        return net
    if net not in _GRAPHED or _GRAPHED[net].addresses != addresses(net):  # graphs read the weights at these addresses
        _GRAPHED[net] = GraphedNet(weakref.proxy(net))
    return _GRAPHED[net]


def release(net: Net) -> None:
    """Give back the memory of a network's graphs, some gigabytes for large ones, before the GPU goes on to train."""
    if _GRAPHED.pop(net, None) is not None:
        torch.cuda.empty_cache()


def addresses(net: nn.Module) -> tuple[int, ...]:
    """The addresses of a network's weights."""
    return tuple(p.data_ptr() for p in (*net.parameters(), *net.buffers()))


def signature(inputs: Mapping[str, Mapping[str, Tensor]], outputs) -> tuple:
    """The input signature, equal for all calls that replay a graph: shapes and dtypes, outputs, precision."""
    shapes = [(part, m, tuple(v.shape), v.dtype) for part, values in inputs.items() for m, v in values.items()]
    wanted = outputs if isinstance(outputs, Mapping) or outputs is None else dict.fromkeys(outputs)
    device = next(iter(inputs["x"].values())).device
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return tuple(shapes), None if wanted is None else tuple(wanted.items()), precision
