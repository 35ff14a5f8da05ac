"""torch.compile, where it pays for itself.

On a GPU the repeated blocks are compiled one by one: blocks of one shape share their code, so the compiler's time does
not grow with the depth. On the CPU, whose models are small, the whole network is one piece, which saves the passes
over memory between blocks. Shapes are static: a run has one batch size.

There `addmm` copies the bias into its result before it multiplies, a fifth of the time of the narrow layers here; the
compiler gets a product and a sum instead, and makes the sum one with whatever comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.flop_counter import FlopCounterMode

from ..kernels.backend import forced

log = logging.getLogger(__name__)
VIEWS = {getattr(torch.ops.aten, name).default for name in ("view", "reshape", "unsqueeze", "permute", "alias")}
WORTH = {"cpu": 2e12, "cuda": 2e14}  # FLOPs of a run that takes a few times as long as the compiler, about a minute


class BiasAfterwards(CustomGraphPass):
    """addmm(b, x, w) becomes mm(x, w) + b, unless it is kept for a backward pass and so written out in any case."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
            if node.kwargs or is_returned(node):  # scaled, or kept
                continue
            bias, x, w = node.args
            with graph.inserting_before(node):
                product = graph.call_function(torch.ops.aten.mm.default, (x, w))
                total = graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
            product.meta, total.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def is_returned(node: torch.fx.Node) -> bool:
    """Whether a graph returns a node, or a view of it."""
    return any(u.op == "output" or (u.target in VIEWS and is_returned(u)) for u in node.users)


def pays(setting: str, device: torch.device, work: Callable[[], float]) -> bool:
    """Whether to compile: the setting, or for "auto" whether the run's FLOPs, which `work` counts, are worth it.

    A function of the configuration alone, never of a clock, so a resumed run decides as the first one did.
    """
    if setting == "auto":
        return device.type in WORTH and work() >= WORTH[device.type] and compiler_missing(device) is None
    return setting == "always"


def forward_flops(evaluate: Callable[[], object]) -> int:
    """FLOPs of the matrix products and attentions of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), forced("reference"):
        evaluate()
    return counter.get_total_flops()


def compiler_missing(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, or None."""
    if device.type != "cpu":
        return None if torch.utils._triton.has_triton() else "Triton"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # torch raises its own, undocumented kinds
        log.info("no C++ compiler: %s", error)
        return "a C++ compiler (g++ or clang++)"
    return None


def compile_net(
    net: nn.Module, device: torch.device, demanded: bool = False, dynamic: bool = False, sharded: bool = False
) -> bool:
    """Compile a network in place; returns whether it was. Without a compiler it runs eagerly and says so.

    dynamic: the number of samples changes from call to call, as it does where sampling leaves out those that rest.
    sharded: the blocks will be gathered and freed by hooks, which must stay outside what is compiled.

    Raises:
        ValueError: `demanded`, and this machine has no compiler.
    """
    missing = compiler_missing(device)
    if missing and demanded:
        raise ValueError(f"compile=always needs {missing}, which this machine lacks; set compile=never")
    if missing:
        log.warning("running without torch.compile: %s is missing", missing)
        return False
    options = {"dynamic": None if dynamic else False, "fullgraph": True}
    if sharded:
        for block in net.repeated():
            block.forward = torch.compile(block.forward, **options)
        return True
    if device.type == "cpu":
        options["options"] = {"post_grad_custom_post_pass": BiasAfterwards()}
    for module in regions(net, device):
        module.compile(**options)
    return True


def regions(net: nn.Module, device: torch.device) -> list[nn.Module]:
    """What is compiled as one piece each."""
    return [net] if device.type == "cpu" else net.repeated()
