"""Choice of the implementation that an operation runs, registration of kernels, and checks of arguments.

Every operation takes `backend`: "triton", "reference" or "auto" (Triton for CUDA tensors; the reference for CPU
tensors and for float64). None reads the environment variable ANYSTATE_BACKEND, by default "auto". Triton kernels run
on CPU tensors only in its interpreter (TRITON_INTERPRET=1, set before the first import).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TypeAlias

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheels for macOS and Windows; the reference does not need it
    triton, tl = None, SimpleNamespace(constexpr=int)

jit = triton.jit if triton else lambda function: function
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
BACKENDS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PerSample: TypeAlias = Tensor | float  # one number for the whole batch, or a (B,) tensor


def patch_interpreter_index() -> None:
    """Make Triton 3.6's interpreter work with numpy 2.5, which refuses int() of an array of one element."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


if INTERPRETED:
    patch_interpreter_index()

_overrides: list[str] = []  # of nested `use_backend`, the innermost last


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Set the backend of the operations inside that are called without one."""
    _overrides.append(backend)
    try:
        yield
    finally:
        _overrides.pop()


@torch.compiler.assume_constant_result
def default_backend() -> str:
    return _overrides[-1] if _overrides else os.environ.get("ANYSTATE_BACKEND") or "auto"


@torch.compiler.assume_constant_result
def checks_cuda_values() -> bool:
    return os.environ.get("ANYSTATE_CHECK_VALUES") == "1"


def is_reference(backend: str | None) -> bool:
    """Whether the reference is requested by name. "auto" may run a faster equivalent on CPU."""
    return (backend or default_backend()) == "reference"


def use_triton(backend: str | None, tensor: Tensor, **floating: Tensor | None) -> bool:
    """Whether to run the kernels, from `backend`, the device of `tensor` and the dtypes of `floating`.

    In float64 "auto" selects the reference and "triton" raises ValueError.
    """
    choice = backend or default_backend()
    check(choice in BACKENDS, "backend", f"must be one of {', '.join(BACKENDS)}, got {choice!r}")
    unsupported = {name: x.dtype for name, x in floating.items() if x is not None and x.dtype not in KERNEL_DTYPES}
    if choice == "reference":
        return False
    if choice == "auto":
        return tensor.is_cuda and triton is not None and not unsupported
    runs = triton is not None and (tensor.is_cuda or INTERPRETED)
    check(runs, "backend", f"triton needs Triton and CUDA tensors (or TRITON_INTERPRET=1), got {tensor.device}")
    for name, dtype in unsupported.items():
        check(False, name, f"Triton kernels take float32, bfloat16 and float16, got {dtype}")
    return True


def cast_for_matmul(**tensors: Tensor | None) -> list[Tensor | None]:
    """Operands of a matrix product in one dtype: that of autocast where it is on; otherwise they must agree."""
    values = [value for value in tensors.values() if value is not None]
    device_type = values[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return [value if value is None else value.to(dtype) for value in tensors.values()]
    first, dtype = next(iter(tensors)), values[0].dtype
    for name, value in tensors.items():
        if value is not None:
            check(value.dtype == dtype, name, f"must be {dtype} like {first}, got {value.dtype}")
    return list(tensors.values())


# Launches


def custom_op(name: str, launch: Callable) -> torch.library.CustomOpDef:
    """Register `launch`, whose first argument is a tensor or a list of tensors, as the operation anystate::`name`.

    The operation makes the GPU of its first tensor current, because Triton launches on the current GPU. Its schema is
    the signature of `launch`. Tests replace its attribute `launch`, the function that it calls.

    A fake implementation must take sizes from `.shape`: len() of a tensor would specialize compiled code to one size.
    """

    @functools.wraps(launch)
    def launch_on_device(first, *others):
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return operation.launch(first, *others)

    operation = torch.library.custom_op(f"anystate::{name}", mutates_args=())(launch_on_device)
    operation.launch = launch
    return operation


def block_size(n: int, largest: int) -> int:
    """The smallest power of two that covers n, between 16 and `largest`."""
    return min(largest, max(16, triton.next_power_of_2(n)))


def warps(elements: int, per_thread: int = 8) -> int:
    """Number of warps for a block, with `per_thread` elements per thread."""
    return min(8, max(1, elements // (32 * per_thread)))


def per_sample(value: PerSample, like: Tensor) -> Tensor:
    """A float or 0-d tensor as (B,) on the device of `like`; a (B,) tensor is only made contiguous."""
    if isinstance(value, Tensor):
        return (value if value.ndim else value.to(like.device).expand(len(like))).contiguous()
    return torch.full((len(like),), float(value), device=like.device)


def last_dim_contiguous(value: Tensor) -> Tensor:
    """The same values with stride 1 along the last dimension; slices along the other dimensions are not copied."""
    return value if value.stride(-1) == 1 else value.contiguous()


# Checks


def check(ok: bool, name: str, message: str) -> None:
    if not ok:
        raise ValueError(f"{name}: {message}")


def check_floating(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None:
            check(value.is_floating_point(), name, f"must be floating point, got {value.dtype}")


def check_device(device: torch.device, **tensors: PerSample | None) -> None:
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.ndim:
            check(value.device == device, name, f"must be on {device}, got {value.device}")


def check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None:
        check(tuple(value.shape) == tuple(shape), name, f"must have shape {tuple(shape)}, got {tuple(value.shape)}")


def check_per_sample(like: Tensor, **values: PerSample | None) -> None:
    """Each value is a float, a 0-d tensor or a (B,) tensor on the device of `like`."""
    check_device(like.device, **values)
    for name, value in values.items():
        if isinstance(value, Tensor) and value.ndim:
            check_shape(name, value, (len(like),))


def check_keys(keys: Tensor, like: Tensor) -> None:
    check(keys.dtype == torch.int64, "keys", f"must be int64, got {keys.dtype}")
    check_shape("keys", keys, (len(like), 5))
    check_device(like.device, keys=keys)


def check_tokens(name: str, tokens: Tensor, low: int, high: int) -> None:
    """Tokens are int64 in [low, high]. On a GPU the range is checked only with ANYSTATE_CHECK_VALUES=1, because
    reading the values back synchronizes."""
    check(tokens.dtype == torch.int64, name, f"must be int64, got {tokens.dtype}")
    if tokens.numel() == 0 or torch.compiler.is_compiling() or (tokens.is_cuda and not checks_cuda_values()):
        return
    smallest, largest = (int(value) for value in torch.aminmax(tokens))
    check(low <= smallest and largest <= high, name, f"must lie in [{low}, {high}], got {smallest} … {largest}")
