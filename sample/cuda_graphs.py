"""CUDA graphs: the kernel launches of an update, captured once and replayed with a single launch.

A graph reads and writes fixed memory. Nothing that is captured may wait for the device or depend on a number on the
host that changes: the state of a batch, the index of its time step, times and random-number keys are tensors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol, Self, TypeVar

import torch
from torch import nn

from ..diffusion.space import Net, Space
from .bf16_weights import Bf16Weights

Result = TypeVar("Result")
Kind = TypeVar("Kind", contravariant=True)
log = logging.getLogger(__name__)
_GRAPHS: weakref.WeakKeyDictionary[nn.Module, SamplingGraphs] = weakref.WeakKeyDictionary()
DEVICES = ("cuda",)
WARM_UPS = 3  # calls before a training step is captured, for compilers and libraries to initialize
MAX_GRAPHS = 32  # graphs of the samplings with a network


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


class Updates(Protocol[Kind]):
    """What is captured, a batch in sampling: see `run.Run`."""

    net: Net

    def update(self, kind: Kind) -> None: ...

    def signature(self) -> Hashable: ...

    def load(self, other: Self) -> None: ...


Batch = TypeVar("Batch", bound=Updates)


class SamplingGraphs:
    """The updates of samplings with one network, replayed as CUDA graphs: one graph per signature and kind of update.

    A batch whose signature has been seen before is copied into the memory of the earlier one, which its graphs read and
    write. The first update of a kind runs eagerly, which also is the warm-up of the capture; the second one is captured
    and replayed, and so are all that follow, in this batch and in later ones. Where a capture fails, updates of that
    kind run eagerly from then on, and a line in the log says why.
    """

    def __init__(self, net: nn.Module):
        self.net, self.addresses = weakref.proxy(net), addresses(net)
        self.memory: Memory | None = None
        self.weights: Bf16Weights | None = None
        self.batches: dict[Hashable, tuple[Updates, dict]] = {}  # with {kind: its replay, None before it is captured}

    def adopt(self, batch: Batch) -> tuple[Batch, Callable]:
        """(the batch in the memory of an earlier one with its signature, if there is one; its replayed `update`)."""
        batch.net = self.net  # a batch that is kept must not keep the network
        signature = batch.signature()
        kept, replays = self.batches.pop(signature, (batch, {}))
        if kept is not batch:
            kept.load(batch)
        self.batches[signature] = kept, replays
        return kept, functools.partial(self.update, kept, replays)

    def update(self, batch: Updates[Kind], replays: dict, kind: Kind) -> None:
        """An update of a batch."""
        eager = functools.partial(batch.update, kind)
        with no_autocast_cache():
            if kind not in replays:
                replays[kind] = None
                self._drop_oldest()
                eager()
                return
            if replays[kind] is None:
                replays[kind] = self._captured(eager)
            replays[kind]()

    def _drop_oldest(self) -> None:
        """Keep at most `MAX_GRAPHS` graphs, without those of the batches that were used least recently."""
        while len(self.batches) > 1 and sum(len(replays) for _, replays in self.batches.values()) > MAX_GRAPHS:
            self.batches.pop(next(iter(self.batches)))

    def _captured(self, eager: Callable[[], None]) -> Callable[[], None]:
        """The replay of an update, or the update itself where it cannot be captured."""
        try:
            self.memory = self.memory or Memory()
            return capture(eager, 0, self.memory, "thread_local")[0]
        except RuntimeError as error:
            self.memory = None  # no other graph may use the memory of a failed capture
            reason = str(error.__context__ or error).splitlines()[0]  # the error from ending a capture says less
            log.warning("no CUDA graph for this update, it runs eagerly: %s", reason)
            return eager


def graphs_of(net: Net, space: Space, device: torch.device) -> SamplingGraphs | None:
    """The graphs of a network, which are kept from one sampling to the next.

    None without a GPU, and for a plain function or a space with evaluations of its own, which may depend on the host.
    """
    if device.type not in DEVICES or not isinstance(net, nn.Module) or type(space) is not Space:
        return None
    if net not in _GRAPHS or _GRAPHS[net].addresses != addresses(net):  # graphs read the weights at these addresses
        _GRAPHS[net] = SamplingGraphs(net)
    return _GRAPHS[net]


def release(net: Net) -> None:
    """Give back the memory of a network's graphs, some gigabytes for large ones, before the GPU goes on to train."""
    if _GRAPHS.pop(net, None) is not None:
        torch.cuda.empty_cache()


def addresses(net: nn.Module) -> tuple[int, ...]:
    """The addresses of a network's weights."""
    return tuple(p.data_ptr() for p in (*net.parameters(), *net.buffers()))
