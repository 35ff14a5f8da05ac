"""The kernels of one training step of a table, counted on the CPU by the stage that launches them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...model import compilation
from ...train import graph_step
from .cuda_lowering import Launches, Lowering, compiled_by, without_kernels
from .h100 import always, as_on_h100
from .table import trainer

OTHERS = "EMA and the rest"
LOSSES, BACKWARD, OPTIMIZER = "from data to losses", "backward", "clip and optimizer"


class StagedLaunches(Launches):
    """Counts kernels by stage, those of compiled code too."""

    def __init__(self, lowering: Lowering) -> None:
        super().__init__(lowering)
        self.stage, self.by_stage, self.compiled = OTHERS, Counter(), 0

    def in_stage(self, stage: str, function: Callable) -> Callable:
        """The function, whose kernels belong to a stage."""

        def staged(*args, **kwargs):
            before, self.stage = self.stage, self._flush(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.stage = self._flush(before)

        return staged

    def _flush(self, following: str) -> str:
        """Add what was launched since the last call to the current stage; returns the following stage."""
        graphs = self.lowering.graphs
        compiled = sum(graph.calls * graph.launches for graph in graphs)
        for graph in graphs:
            graph.calls = 0
        self.by_stage[self.stage] += self.count + compiled
        self.compiled += compiled
        self.count = 0
        return following

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is launched inside."""
        self._flush(OTHERS)
        self.by_stage.clear()
        self.compiled = 0
        with self:
            yield
        self._flush(OTHERS)


def table_step(recipe: str = "paper", settings: Sequence[str] = ()) -> dict[str, int]:
    """{stage: kernels} of one captured training step of a recipe on Adult, their sum, and how many are compiled."""
    torch._dynamo.reset()
    lowering = Lowering()
    launches = StagedLaunches(lowering)
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_on_h100())
        stack.enter_context(without_kernels())
        stack.enter_context(compiled_by(lowering))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused ones refuse float32 heads of 6 features on a GPU
        stack.enter_context(mock.patch.object(compilation, "compiler_missing", always(None)))
        stack.enter_context(mock.patch.object(graph_step, "DEVICES", ("cpu",)))
        for stage, owner, name in ((BACKWARD, torch.Tensor, "backward"), (OPTIMIZER, graph_step, "clip_and_step")):
            staged = launches.in_stage(stage, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, staged))
        step = graph_step.GraphStep(trainer(torch.device("cpu"), ["compile=always", *settings], recipe).state)
        step.losses = launches.in_stage(LOSSES, step.losses)
        for _ in range(2):  # the first call compiles
            with launches.counted():
                step._body()
    return {**launches.by_stage, "all": sum(launches.by_stage.values()), "compiled": launches.compiled}
