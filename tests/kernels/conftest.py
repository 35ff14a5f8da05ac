"""Fixtures of the kernel tests.

The kernels run on a GPU if there is one, otherwise in Triton's interpreter. That takes about 5 ms per program; the
shapes are therefore small, and `small_blocks` sets small blocks on CPU.
"""

import importlib

import numpy as np
import pytest
import torch

from anystate.kernels import Draw, Rng, backend
from anystate.kernels.backend import tl

CUDA = torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def faithful_bfloat16():
    """Make Triton's interpreter treat bfloat16 as a GPU does: round float32 to nearest even, where the interpreter
    truncates, and multiply values in tl.dot, where it multiplies bit patterns."""
    if not backend.INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, value, to):
        if value.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, value, to)
        bits = value.data.view(np.uint32)
        return TensorHandle(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), to.scalar)

    def widening_dot(self, a, b, *others):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b))
        return dot(self, a, b, *others)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, widening_dot


@pytest.fixture(scope="session")
def device() -> str:
    if not CUDA and not backend.INTERPRETED:
        pytest.skip("needs a GPU or Triton's interpreter")
    return "cuda" if CUDA else "cpu"


@pytest.fixture
def module():
    """`module("tau_leap")` is the module; the attribute of the package with that name is the operation."""
    return lambda name: importlib.import_module(f"anystate.kernels.{name}")


@pytest.fixture
def small_blocks(monkeypatch, module):
    """Sets launch constants on CPU so that small shapes span several blocks."""

    def set_(name: str, **constants: int) -> None:
        for constant, value in constants.items():
            if not CUDA:
                monkeypatch.setattr(module(name), constant, value)

    return set_


@pytest.fixture
def keys(device):
    return lambda n, seed=2**40 + 5: Rng.for_batch(seed, n, start=2**31, device=device).at(3).keys("text", Draw.STEP)


@pytest.fixture
def random(device):
    """`random(2, 3, dtype=...)`: standard normals on the device, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.fixture
def tokens(device):
    """`tokens(2, 3, high=7)`: int64 in [0, high)."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape, high: torch.randint(0, high, shape, generator=generator).to(device)


def as_good(ours, theirs, exact, name: str = "", slack: float = 2e-6, factor: float = 1.1) -> None:
    """The error against float64 is at most that of PyTorch in the same precision, times `factor`, plus rounding."""
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, reference {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)}, reference {tuple(theirs.shape)}"
    ours, theirs = ((value.double() - exact).abs().max().item() for value in (ours, theirs))
    allowed = factor * theirs + slack * max(1.0, exact.abs().max().item())
    assert ours <= allowed, f"{name}: off by {ours:.3g}, the reference by {theirs:.3g}"


def leaves(inputs: list, dtype: torch.dtype | None = None) -> list:
    """Copies of the floating tensors that require gradients; other values are unchanged."""
    return [
        value.detach().to(dtype or value.dtype).clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for value in inputs
    ]


@pytest.fixture
def check_gradients():
    """Compares `ours` and `reference`, forward and backward, with the reference in float64; see `as_good`."""

    def check(ours, reference, inputs: list, factor: float = 1.1) -> None:
        results = []
        for function, dtype in ((ours, None), (reference, None), (reference, torch.float64)):
            arguments = leaves(inputs, dtype)
            outputs = function(*arguments)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            generator = torch.Generator().manual_seed(2)
            upstream = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
            torch.autograd.backward(outputs, upstream)
            results.append(outputs + [a.grad for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad])
        for i, (ours_, theirs, exact) in enumerate(zip(*results, strict=True)):
            as_good(ours_, theirs, exact.double(), f"result {i}", factor=factor)

    return check


@pytest.fixture(scope="session")
def close():
    return as_good
