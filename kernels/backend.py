"""Which implementation an operation runs, and the checks its arguments pass before any launch.

Every operation takes `backend`: "triton", "reference" or "auto" (Triton on CUDA tensors, the reference
elsewhere and for float64); None reads the environment variable ANYSTATE_BACKEND, by default "auto". Triton
kernels run on CPU tensors only under its interpreter (TRITON_INTERPRET=1, set before the first import).
"""

import contextlib
import functools
import os
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheels for macOS and Windows; the reference needs none
    triton, tl = None, SimpleNamespace(constexpr=int)

jit = triton.jit if triton else lambda function: function
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
BACKENDS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpret_indices() -> None:
    """Triton 3.6's interpreter makes an integer of an array of one element in a way that numpy 2.5 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


if INTERPRETED:
    interpret_indices()

_forced: list[str] = []


@contextlib.contextmanager
def use_backend(backend: str):
    """Every operation inside that is not told a backend of its own runs this one."""
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


@torch.compiler.assume_constant_result
def environment_backend() -> str:
    return _forced[-1] if _forced else os.environ.get("ANYSTATE_BACKEND") or "auto"


@torch.compiler.assume_constant_result
def checks_cuda_values() -> bool:
    return os.environ.get("ANYSTATE_CHECK_VALUES") == "1"


def is_reference(backend: str | None) -> bool:
    """Whether the reference itself is asked for; "auto" may take another way than its, on the CPU too."""
    return (backend or environment_backend()) == "reference"


def use_triton(backend: str | None, tensor: Tensor, **floating: Tensor | None) -> bool:
    """Whether the kernels run: decided by `backend`, the device of `tensor` and the dtypes of `floating`.

    "auto" leaves float64 to the reference; "triton" refuses it.
    """
    choice = backend or environment_backend()
    check(choice in BACKENDS, "backend", f"must be one of {', '.join(BACKENDS)}, got {choice!r}")
    foreign = {name: x.dtype for name, x in floating.items() if x is not None and x.dtype not in KERNEL_DTYPES}
    if choice == "reference":
        return False
    if choice == "auto":
        return tensor.is_cuda and triton is not None and not foreign
    runs = triton is not None and (tensor.is_cuda or INTERPRETED)
    check(runs, "backend", f"triton needs Triton and CUDA tensors (or TRITON_INTERPRET=1), got {tensor.device}")
    for name, dtype in foreign.items():
        check(False, name, f"Triton kernels take float32, bfloat16 and float16, got {dtype}")
    return True


def matmul_dtype(**tensors: Tensor | None) -> list[Tensor | None]:
    """The operands of a matrix product in one dtype: autocast's where that is on, else they must agree already."""
    values = [value for value in tensors.values() if value is not None]
    device_type = values[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return [value if value is None else value.to(dtype) for value in tensors.values()]
    for name, value in tensors.items():
        same = value is None or value.dtype == values[0].dtype
        check(
            same, name, f"must be {values[0].dtype} like {next(iter(tensors))}, got {value is not None and value.dtype}"
        )
    return list(tensors.values())


# Launches


def custom_op(name: str):
    """Registers a function of tensors as the operation anystate::`name`. Its kernels run on the GPU where its first
    tensor lies: Triton launches on the current one, which need not be that.

    Its fake takes sizes from `.shape`: len() of a tensor fixes the number, and compiled code serves one batch size.
    """

    def register(function):
        @functools.wraps(function)
        def on_its_device(first, *others):
            with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
                return function(first, *others)

        return torch.library.custom_op(f"anystate::{name}", mutates_args=())(on_its_device)

    return register


def block_size(n: int, largest: int) -> int:
    """The power of two that covers n, between 16 and `largest`."""
    return min(largest, max(16, triton.next_power_of_2(n)))


def warps(elements: int, per_thread: int = 8) -> int:
    """Warps for a block, `per_thread` elements to a thread."""
    return min(8, max(1, elements // (32 * per_thread)))


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """A float or 0-d tensor as (B,) on like's device; (B,) tensors pass."""
    if isinstance(value, Tensor):
        return (value if value.ndim else value.to(like.device).expand(len(like))).contiguous()
    return torch.full((len(like),), float(value), device=like.device)


# Checks


def check(ok: bool, name: str, message: str) -> None:
    if not ok:
        raise ValueError(f"{name}: {message}")


def check_floating(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        check(
            value is None or value.is_floating_point(),
            name,
            f"must be floating point, got {value is not None and value.dtype}",
        )


def check_device(device: torch.device, **tensors: Tensor | float | None) -> None:
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.ndim:
            check(value.device == device, name, f"must be on {device}, got {value.device}")


def check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None:
        check(tuple(value.shape) == tuple(shape), name, f"must have shape {tuple(shape)}, got {tuple(value.shape)}")


def check_per_sample(like: Tensor, **values: Tensor | float) -> None:
    """Per-sample numbers: a float, a 0-d tensor or (B,) on like's device."""
    check_device(like.device, **values)
    for name, value in values.items():
        if isinstance(value, Tensor) and value.ndim:
            check_shape(name, value, (len(like),))


def check_keys(keys: Tensor, like: Tensor) -> None:
    check(keys.dtype == torch.int64, "keys", f"must be int64, got {keys.dtype}")
    check_shape("keys", keys, (len(like), 5))
    check_device(like.device, keys=keys)


def check_tokens(name: str, tokens: Tensor, low: int, high: int) -> None:
    """int64 in [low, high]. Reading the values back would stop a GPU, so there it is done only on request
    (ANYSTATE_CHECK_VALUES=1)."""
    check(tokens.dtype == torch.int64, name, f"must be int64, got {tokens.dtype}")
    if tokens.numel() == 0 or torch.compiler.is_compiling() or (tokens.is_cuda and not checks_cuda_values()):
        return
    smallest, largest = (int(value) for value in torch.aminmax(tokens))
    check(low <= smallest and largest <= high, name, f"must lie in [{low}, {high}], got {smallest} … {largest}")
