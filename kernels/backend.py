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
from typing import TypeAlias, TypeVar

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
NAMESPACE = "anystate"
OPERATIONS: dict[str, "Operation"] = {}  # by name

Function = TypeVar("Function", bound=Callable)
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


def constant_in_graphs(function: Function) -> Function:
    """A function that the compiler calls once while it traces, as `torch.compiler.assume_constant_result` marks it.

    That decorator would import the compiler, which takes longer than the rest of this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def default_backend() -> str:
    return _overrides[-1] if _overrides else os.environ.get("ANYSTATE_BACKEND") or "auto"


@constant_in_graphs
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


def matmul_dtype(**tensors: Tensor | None) -> torch.dtype:
    """The dtype of a matrix product: that of autocast where it is on; otherwise the operands must agree."""
    first, *others = [(name, value) for name, value in tensors.items() if value is not None]
    device_type, dtype = first[1].device.type, first[1].dtype
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    for name, value in others:
        check(value.dtype == dtype, name, f"must be {dtype} like {first[0]}, got {value.dtype}")
    return dtype


def cast_for_matmul(**tensors: Tensor | None) -> list[Tensor | None]:
    """Operands of a matrix product in its dtype."""
    dtype = matmul_dtype(**tensors)
    return [value if value is None else value.to(dtype) for value in tensors.values()]


# Launches


class Operation:
    """The operation anystate::`name`, which calls `launch`, whose first argument is a tensor or a list of tensors.

    It makes the GPU of its first tensor current, because Triton launches on the current GPU. Its schema is the
    signature of `launch`. Tests replace the attribute `launch`.

    `torch.library.custom_op` would put Python around `launch` that looks for aliases in every call and calls autograd's
    Python code for operations without gradients too. Here neither runs: `test_registration` looks for aliases. Measured
    by `anystate bench counts` on one CPU, beyond the launch itself: 20 instead of 22 µs with gradients, 8 instead of 12
    without, and 3 instead of 12 for an operation of a backward pass.

    `torch.library.triton_op` with `wrap_triton` does not pay. In eager code it is dispatched as `custom_op` is. In
    compiled code Inductor launches the kernel itself, but fuses nothing with it. Lowered for an H100, `bias_gelu`
    between two products with a number took as many kernels as now; `gated_adaln`, whose launchers write into slices of
    one buffer, took 4 instead of 1, and 11 instead of 8 in its backward pass.
    """

    def __init__(self, name: str, launch: Callable):
        @functools.wraps(launch)
        def launch_on_device(first, *others):
            with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
                return self.launch(first, *others)

        self.name, self.launch = f"{NAMESPACE}::{name}", launch
        self.library = torch.library.Library(NAMESPACE, "FRAGMENT")
        schema = torch.library.infer_schema(launch, mutates_args=())
        self.library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.library.impl(name, launch_on_device, "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args):
        return self.overload(*args)

    def register_fake(self, function: Callable) -> Callable:
        """Set the function that makes results without data.

        It must take sizes from `.shape`: len() of a tensor would specialize compiled code to one size.
        """
        torch.library.register_fake(self.name, function, lib=self.library)
        return function

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Set the formula of the gradients, which cannot be differentiated once more."""
        once = torch.autograd.function.once_differentiable(backward)
        torch.library.register_autograd(self.name, once, setup_context=setup_context, lib=self.library)


def custom_op(name: str, launch: Callable) -> Operation:
    """Register `launch` as the operation anystate::`name`, in the place of an earlier one."""
    if name in OPERATIONS:
        OPERATIONS[name].library._destroy()
    OPERATIONS[name] = Operation(name, launch)
    return OPERATIONS[name]


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
