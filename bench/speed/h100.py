"""Makes PyTorch see an H100 where there is no GPU, for code that is traced, scheduled and counted but not run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface

from ...kernels import backend as kernel_backend

attention = importlib.import_module("...kernels.attention", __package__)  # the package's attribute may be a function

CUDA = torch.device("cuda", 0)
H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
IN_TORCH_CUDA = ("get_device_properties", "get_device_capability", "current_device", "device_count")


@contextlib.contextmanager
def as_on_h100() -> Iterator[None]:
    """Let PyTorch see an H100, and let tensors of the CPU take the paths of a GPU in our operations."""
    functions = {
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_compute_capability": 90,
        "current_device": 0,
        "device_count": 1,
        "get_raw_stream": 0,
    }
    patches = [
        mock.patch("torch.utils._triton.triton_hash_with_backend", always("h100")),
        mock.patch("torch.utils._triton.has_triton", always(True)),
        mock.patch.object(CudaInterface, "is_available", staticmethod(always(True))),
        mock.patch.object(attention, "candidates", candidates_on_gpu(attention.candidates)),
    ]
    for name, operation in (("copy_", torch.ops.aten.copy_), ("__invert__", torch.ops.aten.bitwise_not)):
        # PyTorch's own ask for a driver, also for fake tensors, where it is built without CUDA
        patches.append(mock.patch.object(Tensor, name, functools.partialmethod(call, operation)))
    patches += [mock.patch.object(torch.cuda, k, always(v)) for k, v in functions.items() if k in IN_TORCH_CUDA]
    for owner in (CudaInterface, CudaInterface.Worker):
        patches += [
            mock.patch.object(owner, k, staticmethod(always(v))) for k, v in functions.items() if hasattr(owner, k)
        ]
    choice = kernel_backend.use_triton
    users = [module for module in list(sys.modules.values()) if getattr(module, "use_triton", None) is choice]
    patches += [mock.patch.object(module, "use_triton", uses_kernels) for module in users]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def always(value: object) -> Callable:
    """A function that returns a value, whatever its arguments."""
    return lambda *_, **__: value


def call(tensor: Tensor, operation: Callable, *args, **kwargs):
    """An operation as a method of a tensor."""
    return operation(tensor, *args, **kwargs)


def uses_kernels(backend: str | None, tensor: Tensor, **floating: Tensor | None) -> bool:
    """`use_triton` for a tensor that counts as one of a GPU."""
    known = kernel_backend.KERNEL_DTYPES
    fits = all(x is None or x.dtype in known for x in floating.values())
    return fits and not kernel_backend.is_reference(backend)


def candidates_on_gpu(original: Callable) -> Callable:
    """`attention.candidates` for a tensor that counts as one of a GPU."""

    @kernel_backend.constant_in_graphs
    def candidates(device, dtype, width, masked):
        return original(CUDA, dtype, width, masked)

    return candidates
