"""The kernels that compiled code runs on an H100, from torch.compile's own scheduler, on a machine without a GPU.

A function is traced on tensors of the CPU, which may be fake, with our Triton kernels and the attention of a GPU. The
graphs are moved to a CUDA device and handed to Inductor with the properties of an H100: it fuses and schedules them as
there, but nothing is compiled or run. Every scheduled kernel is listed with its traffic:

- a fused kernel: what Inductor counts, every buffer read and written once;
- matrix products, attention and our operations: inputs read and outputs written once, from the sizes in the graph. Of a
  view only its elements count. What an operation moves beyond that inside of it is not counted.

How many kernels an operation of ours launches is counted by running its launcher on tensors without memory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
from torch import Tensor, fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config, ir, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ...kernels.backend import NAMESPACE, OPERATIONS, Operation
from .compile_only import recorded
from .h100 import CUDA, as_on_h100

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
NO_KERNEL = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
NO_KERNEL += ("_unsafe_view", "is_pinned", "_local_scalar_dense", "set_", "resize_")
MAX_TENSORS = (110, 64, 48, 36, 30)  # of one launch over lists of tensors, by the number of lists: PyTorch's own limits


class Kernel(NamedTuple):
    """One scheduled kernel. kind: fused, product, attention, operation (one of ours) or other."""

    name: str
    kind: str
    bytes: int
    launches: int


@dataclasses.dataclass
class Graph:
    """A compiled forward or backward graph: its kernels, how many it launches, and how often it was called."""

    backward: bool
    kernels: list[Kernel]
    launches: int
    calls: int = 0

    def bytes(self, *kinds: str) -> int:
        """Bytes moved by the kernels of some kinds."""
        return sum(kernel.bytes for kernel in self.kernels if kernel.kind in kinds)


class Lowering:
    """A backend for torch.compile that lists kernels; what it compiles runs in plain PyTorch.

    calls: for every call of the compiler the forward graph and, once it is compiled, the backward graph.
    running: whether compiled code is running.
    """

    def __init__(self) -> None:
        self.calls: list[list[Graph]] = []
        self.running = False
        self.compile_fx = compile_fx.compile_fx

    @property
    def graphs(self) -> list[Graph]:
        return [graph for graphs in self.calls for graph in graphs]

    def __call__(self, module: fx.GraphModule, inputs: list, config_patches: dict | None = None, **_) -> Callable:
        graphs: list[Graph] = []
        self.calls.append(graphs)

        def inner(module: fx.GraphModule, inputs: list, is_backward=False, is_inference=False, **_) -> Callable:
            kernels, launches = scheduled(module, inputs, bool(is_backward), bool(is_inference))
            graphs.append(Graph(bool(is_backward), kernels, launches))
            return self._plain(module, graphs[-1])

        options = {"fx_graph_cache": False, **(config_patches or {})}
        with config.patch(options):  # and once more where the backward graph is compiled, later
            return self.compile_fx(module, inputs, inner_compile=config.patch(options)(inner))

    def _plain(self, module: fx.GraphModule, graph: Graph) -> Callable:
        def run(*inputs):
            graph.calls += 1
            self.running = True
            try:
                return module.forward(*inputs)
            finally:
                self.running = False

        return make_boxed_func(run)


def lowered(function: Callable, *inputs, **options) -> list[Graph]:
    """The graphs of a function that is called once, and of the backward pass where inputs require gradients.

    options: of torch.compile.
    """
    lowering = Lowering()
    torch._dynamo.reset()
    with as_on_h100():
        out = torch.compile(function, backend=lowering, fullgraph=True, dynamic=False, **options)(*inputs)
        learned = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
        if learned:
            torch.autograd.backward(learned, [torch.ones_like(x) for x in learned])
    return lowering.graphs


# Lowering


def scheduled(module: fx.GraphModule, inputs: list, backward: bool, inference: bool) -> tuple[list[Kernel], int]:
    """The kernels of a graph, as scheduled for an H100, and how many are launched.

    Fused kernels are launched where the generated code says: independent ones may be combined.
    """
    fake = torch._guards.detect_fake_mode(inputs)
    module = copy.deepcopy(module)
    with V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
        inputs = moved_to_cuda(module, inputs, fake)
        compile_fx.record_original_output_strides(module)
        compile_fx._recursive_post_grad_passes(module, is_inference=inference)
        graph = GraphLowering(
            module,
            shape_env=fake.shape_env,
            example_inputs=inputs,
            is_inference=inference,
            is_backward=backward,
        )
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            source = graph.codegen()
            source = source[0] if isinstance(source, tuple) else source
            kernels = [found for node in graph.scheduler.nodes if (found := kernel_of(node)) is not None]
    fused = len(re.findall(r"\w\.run\(.*stream=", source if isinstance(source, str) else source.value))
    return kernels, fused + sum(kernel.launches for kernel in kernels if kernel.kind != "fused")


def moved_to_cuda(module: fx.GraphModule, inputs: list, fake: FakeTensorMode) -> list:
    """Let all tensors of a graph be on the GPU; returns its inputs there."""

    def moved(x):
        if not isinstance(x, FakeTensor):
            return x
        x = x.detach()  # of the same storage, as passes look for aliases
        x.fake_device = CUDA
        return x

    with torch.no_grad(), fake:
        for name, buffer in list(module.named_buffers()):
            if buffer.ndim:  # single numbers are read
                setattr(
                    module, name, torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=CUDA)
                )
        for node in module.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
            if "val" in node.meta:
                node.meta["val"] = tree_map(moved, node.meta["val"])
        return [moved(x) for x in inputs]


def kernel_of(node: scheduler.BaseSchedulerNode) -> Kernel | None:
    """The kernel of a node of the schedule; None where it only names memory."""
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return None
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        return Kernel(node.get_name(), "fused", node.get_read_write_buffers_sizes(), 1)
    if isinstance(node.node, ir.MultiOutput):
        return None
    origin = origin_of(node.node)
    if origin is None:
        return Kernel(node.get_name(), "other", node.get_read_write_buffers_sizes(), 1)
    return Kernel(origin.name, kind_of(origin.target), traffic(origin), launches_of(origin.target, origin.args))


def origin_of(kernel: ir.ExternKernel) -> fx.Node | None:
    """The operation of the graph that a kernel of a library was made for."""
    same = [node for node in kernel.origins if node.target is getattr(kernel, "op_overload", None)]
    return same[0] if same else kernel.get_origin_node()


def kind_of(target) -> str:
    namespace, name = target._schema.name.split("::")
    if namespace == NAMESPACE:
        return "attention" if "flash" in name else "operation"
    if name in PRODUCTS:
        return "product"
    return "attention" if "attn" in name or "attention" in name else "other"


def traffic(node: fx.Node) -> int:
    """Bytes of the distinct inputs and of the outputs of an operation in a graph."""
    outputs = [x for x in tree_leaves(node.meta["val"]) if isinstance(x, Tensor)]
    inputs = [found.meta["val"] for found in node.all_input_nodes if isinstance(found.meta.get("val"), Tensor)]
    return sum(int(x.numel()) * x.element_size() for x in [*inputs, *outputs])


# Launches


def launches_of(target, args: tuple, kwargs: dict | None = None) -> int:
    """How many kernels a call of an operation launches."""
    namespace, name = target._schema.name.split("::")
    if namespace == NAMESPACE:
        return launches_inside(name, args)
    if target.is_view or name in NO_KERNEL:
        return 0
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    lists = [x for x in lists if x[0].ndim or not name.startswith("_fused")]  # the steps are a list of single numbers
    written = 0 if name.endswith("_") else len(target._schema.returns)
    limit = MAX_TENSORS[min(len(lists) + written, len(MAX_TENSORS)) - 1]
    return -(-len(lists[0]) // limit)


def launches_inside(name: str, args: tuple) -> int:
    """The launches of an operation of ours: its Triton kernels and PyTorch's around them."""

    with torch.utils._python_dispatch._disable_current_modes():
        args = tree_map(without_memory, args)
        with recorded() as launches, Launches() as around:
            inspect.unwrap(OPERATIONS[name].launch)(*args)
    return len(launches) + around.count


def without_memory(x):
    """A tensor, or the tensor that a node of a graph stands for, on the meta device; anything else as it is."""
    x = x.meta.get("val") if isinstance(x, fx.Node) else x
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(tuple(map(int, x.shape)), tuple(map(int, x.stride())), dtype=x.dtype, device="meta")


class Launches(TorchDispatchMode):
    """Counts the kernels that PyTorch's own and our operations launch on a GPU; compiled code counts nothing here."""

    def __init__(self, lowering: Lowering | None = None) -> None:
        super().__init__()
        self.lowering, self.count = lowering, 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # otherwise torch.compile refuses to run inside

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.lowering is None or not self.lowering.running:
            self.count += launches_of(function, args, kwargs)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Let our operations return zeros on the CPU instead of launching kernels."""

    def zeros(operation: Operation) -> Callable:
        @functools.wraps(operation.launch)
        def launch(*args):
            out = operation(*tree_map(without_memory, args))
            return tree_map(lambda x: torch.zeros(x.shape, dtype=x.dtype), out)

        return launch

    with contextlib.ExitStack() as stack:
        for operation in OPERATIONS.values():
            stack.enter_context(mock.patch.object(operation, "launch", zeros(operation)))
        yield


@contextlib.contextmanager
def compiled_by(lowering: Lowering) -> Iterator[None]:
    """Let torch.compile use a `Lowering` where it would use Inductor."""
    with mock.patch.object(compile_fx, "compile_fx", lowering):
        yield
