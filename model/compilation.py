"""Compilation of networks by torch.compile.

On a GPU the repeated blocks are compiled one by one: blocks of one shape share their code, so the compiler's time does
not grow with the depth. They all count as one function with a limit on the kinds of inputs it is compiled for, beyond
which compiling fails; hence `MMDiT.whole_blocks`, and a limit far above the few kinds that are left. On the CPU, whose
models are small, the whole network is one piece, which saves the passes over memory between blocks. On a GPU the
training step of a small network is one piece with all that surrounds the network, see `compile_small`.

Shapes are static, for a run has one batch size; only blocks that draw samples on a GPU are compiled for batches of any
size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..kernels.backend import use_backend

Result = TypeVar("Result")
log = logging.getLogger(__name__)
MAX_COMPILATIONS = 64  # of inputs that one function may be compiled for; PyTorch's own limit is 8
MIN_FLOPS = {"cpu": 2e12, "cuda": 2e14}  # FLOPs of a run that takes a few times as long as the compiler, about a minute


def should_compile(setting: str, device: torch.device, work: Callable[[], float]) -> bool:
    """Whether to compile: the setting, or for "auto" whether the run's FLOPs, which `work` counts, are enough.

    A function of the configuration alone, never of measured times, so a resumed run decides as before.
    """
    if setting == "auto":
        return device.type in MIN_FLOPS and work() >= MIN_FLOPS[device.type] and compiler_missing(device) is None
    return setting == "always"


def forward_flops(evaluate: Callable[[], object]) -> int:
    """FLOPs of the matrix products and attentions of one call, the same on every device and for compiled networks.

    Attention is counted as the two products that it consists of: the counter does not know every fused kernel.
    """
    eager, products = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), eager, products, use_backend("reference"), FlopCounterMode(display=False) as counter:
        evaluate()
    return counter.get_total_flops()


def compiler_missing(device: torch.device) -> str | None:
    """The compiler that torch.compile would need and this machine lacks, or None."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton  # which `import torch` alone does not import

        return None if has_triton() else "Triton"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # torch raises its own, undocumented kinds
        log.info("no C++ compiler: %s", error)
        return "a C++ compiler (g++ or clang++)"
    return None


def has_compiler(device: torch.device, demanded: bool) -> bool:
    """Whether this machine can compile; if not, a warning.

    Raises:
        ValueError: it cannot, and compiled code is `demanded`.
    """
    missing = compiler_missing(device)
    if missing and demanded:
        raise ValueError(f"compile=always needs {missing}, which this machine lacks; set compile=never")
    if missing:
        log.warning("running without torch.compile: %s is missing", missing)
    return missing is None


def compile_small(function: Callable[[], Result], backend: str | Callable = "inductor") -> Callable[[], Result]:
    """A function of a small network, compiled as a whole into as few kernels as possible.

    Operations run as their references, which the compiler fuses with what is around them: narrow rows fill a sixth of a
    tile of our kernels. Kernels that do not depend on each other are combined, such as the many short sums that
    gradients of biases end with.
    """
    options = {"combo_kernels": True} if backend == "inductor" else None
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)

    def run() -> Result:
        with use_backend("reference"):
            return compiled()

    return run


def compile_net(
    net: nn.Module,
    device: torch.device,
    demanded: bool = False,
    dynamic: bool = False,
    sharded: bool = False,
    backend: str | Callable = "inductor",
) -> bool:
    """Compile a network in place; returns whether it was. Without a compiler it runs eagerly, with a warning.

    dynamic: the number of samples changes from call to call, as in sampling that leaves out unchanged samples.
    sharded: the blocks will be gathered and freed by hooks, which must stay outside what is compiled.
    backend: of torch.compile, for tests that count compilations.

    Raises:
        ValueError: `demanded`, and this machine has no compiler.
    """
    if not has_compiler(device, demanded):
        return False
    torch._dynamo.config.recompile_limit = max(MAX_COMPILATIONS, torch._dynamo.config.recompile_limit)
    options: dict[str, Any] = {"dynamic": None if dynamic else False, "fullgraph": True, "backend": backend}
    if device.type == "cpu" and not sharded:
        if backend == "inductor":
            from .inductor_pass import BiasAfterwards  # Inductor takes a second to import

            options["options"] = {"post_grad_custom_post_pass": BiasAfterwards()}
        net.compile(**options)
        return True
    net.whole_blocks = True
    for block in net.repeated():
        if sharded:
            block.forward = torch.compile(block.forward, **options)
        else:
            block.compile(**options)
    return True
