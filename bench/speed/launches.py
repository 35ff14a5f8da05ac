"""Launches of sampling, counted without a GPU: how many an update makes, and which of them a CUDA graph replays.

An operation counts as its launches if it is no view and does more than allocate. `update_launches` counts the code that
runs on a GPU, on tensors without values. `recorded_graphs` stands in for CUDA graphs where there is no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ... import kernels
from ...kernels import LazyLogits, Rng, backend, lazy_logits
from ...sample import cuda_graphs
from ...sample.condition import Condition
from ...sample.pipeline import Pipeline
from ...sample.run import Kind, Run

ALLOCATIONS = ("device", "empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh", "_unsafe_view")
KERNELS = {"anystate::tau_leap_linear": 5}  # launches of an operation that makes more than one
TOKEN_OPERATIONS = ("mask_perturb", "uniform_perturb", "tau_leap_uniform", "tau_leap")  # of `kernels`
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh")  # for the device, or copy to it


class LaunchCounter(TorchDispatchMode):
    """Counts launches, {operation: number}, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    @property
    def launches(self) -> int:
        return sum(self.operations.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not function.is_view and name.split("::")[-1] not in ALLOCATIONS:
            self.operations[name] += KERNELS.get(name, 1)
        return function(*args, **(kwargs or {}))


def update_launches(
    pipeline: Pipeline, conditions: Mapping[str, Tensor | Condition], n: int, steps: int
) -> dict[Kind, Counter[str]]:
    """{kind of update: its launches on a GPU besides those inside the network, {operation: number}}.

    With graphs, all are inside the one of that kind of update, as are the network's.
    """
    wrapped = {m: Condition.wrap(c) for m, c in conditions.items()}
    guidance, samplers = pipeline.guidance(bool(conditions)), pipeline.samplers
    run = Run(pipeline.net, pipeline.space, wrapped, steps, guidance, samplers, Rng.for_batch(0, n), {})
    counts = {}
    with torch.no_grad(), _as_on_a_gpu(), FakeTensorMode():
        _forget_values(run)
        for kind in dict.fromkeys(kind for kind in run.kinds if kind is not None):
            with LaunchCounter() as counter:
                run.update(kind)
            counts[kind] = counter.operations
    return counts


class _NoLaunches:
    """A network whose predictions have the right shapes and cost nothing."""

    def __init__(self, pipeline: Pipeline | torch.nn.Module):
        self.partial_outputs, self.observes = getattr(pipeline, "partial_outputs", False), pipeline.observes
        heads = {m: getattr(head, "linear", None) for m, head in pipeline.head.items()}
        self.lazy = {m: linear.weight.shape for m, linear in heads.items() if isinstance(linear, torch.nn.Linear)}
        self.columns = {m: head.outputs for m, head in pipeline.head.items() if hasattr(head, "outputs")}

    def __call__(self, x, t, mask=None, outputs=None, **options) -> dict:
        counts = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs)
        return {m: self._prediction(m, x[m][: counts[m]]) for m in counts}

    def _prediction(self, m: str, x: Tensor) -> Tensor | LazyLogits:
        if x.is_floating_point():
            return torch.empty_like(x)
        if m in self.columns:
            return x.new_empty(*x.shape, self.columns[m], dtype=torch.float32)
        columns, width = self.lazy[m]
        weight, bias = (x.new_empty(shape, dtype=torch.float32) for shape in ((columns, width), (columns,)))
        return LazyLogits(x.new_empty(*x.shape, width, dtype=torch.float32), weight, bias)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Run the kernels' code, on tensors without values."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(backend, "INTERPRETED", True))
        patches.enter_context(mock.patch.object(Run, "positions", return_value={}))
        for module in ("tau_leap", "tau_leap_uniform", "perturb"):
            module = importlib.import_module(f"{kernels.__name__}.{module}")
            patches.enter_context(mock.patch.object(module, "check_tokens", return_value=None))
        patches.enter_context(backend.use_backend("triton"))
        yield


def _forget_values(run: Run) -> None:
    """Replace the tensors of a run by tensors without values, and its network by one without launches."""

    def fake(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype)

    run.net = _NoLaunches(run.net)
    run.x, run.t, run.observed, run.allowed_states = (
        {m: fake(x) for m, x in part.items()} for part in (run.x, run.t, run.observed, run.allowed_states)
    )
    run.partial = {m: Condition(fake(c.x), c.t, fake(c.mask)) for m, c in run.partial.items()}
    run.clock, run.after = fake(run.clock), fake(run.after)
    run.rng = dataclasses.replace(run.rng, samples=fake(run.rng.samples), words=fake(run.rng.words))
    for stepper in run.steppers.values():
        for name, value in vars(stepper).items():
            if isinstance(value, Tensor):
                setattr(stepper, name, fake(value))


class Recording(TorchDispatchMode):
    """What a CUDA graph does, without a GPU: the operations of a function with the memory and the numbers that they
    had, run again on that memory. What would wait for the device is refused, as in a capture."""

    def __init__(self, function: Callable[[], object]):
        super().__init__()
        self.calls: list[tuple] = []
        self.executed = True  # a capture does not execute anything, but recording does: the first replay is done
        with _disable_current_modes(), self:
            function()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indexed = function._schema.name == "aten::index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if indexed or function._schema.name.split("::")[-1] in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.calls.append((function, args, kwargs or {}, out, function._schema.is_mutable))
        return out

    def __call__(self) -> None:
        """Replay."""
        if self.executed:
            self.executed = False
            return
        with _disable_current_modes(), torch.autocast("cpu", enabled=False):  # casts have been recorded
            for function, args, kwargs, out, in_place in self.calls:
                new = function(*args, **kwargs)
                for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(old, Tensor) and not in_place:
                        old.copy_(value)


@contextlib.contextmanager
def recorded_graphs(captured: list[Recording] | None = None) -> Iterator[None]:
    """Sampling on the CPU as on a GPU, with `Recording`s in the place of CUDA graphs; they are added to `captured`.

    Operations whose plain version reads values, which their kernels do not, are single calls of a recording.
    """
    active: list[Recording] = [] if captured is None else captured

    def capture(function, warm_ups, memory, errors):
        active.append(Recording(function))
        return active[-1], None

    def single(function: Callable) -> Callable:
        def call(*args, **kwargs):
            modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
            recording = next((mode for mode in modes if isinstance(mode, Recording)), None)
            if recording is None:
                return function(*args, **kwargs)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=torch.is_autocast_enabled("cpu"))
            with _disable_current_modes():
                out = function(*args, **kwargs)
            recording.calls.append((autocast(function), args, kwargs, out, False))
            return out

        return call

    with contextlib.ExitStack() as patches:
        for place, name, value in (
            (cuda_graphs, "capture", capture),
            (cuda_graphs, "Memory", object),
            (cuda_graphs, "DEVICES", ("cpu",)),
            (Run, "positions", lambda self, outputs: {}),
            *((lazy_logits, name, single(getattr(lazy_logits, name))) for name in ("tau_leap", "tau_leap_linear")),
            *((kernels, name, single(getattr(kernels, name))) for name in TOKEN_OPERATIONS),
        ):
            patches.enter_context(mock.patch.object(place, name, value))
        yield
