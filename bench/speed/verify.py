"""`anystate verify`: every operation, forward and backward, against its reference in float64; one line each."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import backend, reference
from .kernel_cases import CASES, SIZES, Inputs, operation_of, outputs_of, widened, with_gradients
from .rows import Rows

attention = importlib.import_module("...kernels.attention", __package__)

# largest error allowed, relative to the largest exact value: a few roundings of the result
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Check(NamedTuple):
    """One line: an operation (and its gradients) at one dtype. `error` counts wrong tokens where tokens come out."""

    name: str
    backend: str
    shape: str
    dtype: str
    error: float
    passed: bool

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  {self.name:24} {self.backend:10} {self.dtype:9} {self.shape:26} error {self.error:.2e}"


def verify(
    ops: list[str] | None = None,
    size: str | None = None,
    device: str | None = None,
    chosen: str | None = None,
    write: Callable[[str], None] = print,
    rows: Rows | None = None,
) -> bool:
    """Writes one line per operation and dtype, keeps them in `rows`, and returns whether all passed.

    On a GPU the kernels are checked in three dtypes. Without one the reference is checked in float32, and under
    TRITON_INTERPRET=1 the kernels too (in float32: the interpreter does not round bfloat16 as a GPU does).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = size or ("small" if device.startswith("cuda") else "tiny")
    if chosen is None:
        chosen = "triton" if device.startswith("cuda") or backend.INTERPRETED else "reference"
    dtypes = TOLERANCE if device.startswith("cuda") else [torch.float32]
    passed = True
    for name in ops or CASES:
        for dtype in dtypes:
            for way in ways(name, size, device, dtype, chosen):
                try:
                    for check in checks(name, size, device, dtype, way):
                        write(str(check))
                        passed = passed and check.passed
                        if rows is not None:
                            name_of = f"verify {check.name}, {check.dtype}"
                            rows.add(name_of, {check.backend: check.error}, "", shape=check.shape, passed=check.passed)
                except Exception as error:  # whatever a compiler or driver raises: the others still count
                    why = " ".join(str(error).split())[:300]
                    write(f"FAIL  {name:24} {way:10} {str(dtype)[6:]:9} {type(error).__name__}: {why}")
                    passed = False
    return passed


def ways(name: str, size: str, device: str, dtype: torch.dtype, chosen: str) -> tuple[str, ...]:
    """What is checked of a case: the backend; for attention on a GPU every implementation at hand."""
    if chosen != "triton" or not name.startswith("joint_attention"):
        return (chosen,)
    return attention.candidates(torch.device(device), dtype, SIZES[size].head_width, name.endswith("padded"))


def checks(name: str, size: str, device: str, dtype: torch.dtype, chosen: str) -> Iterator[Check]:
    """The result of one case, and its gradients if it has any; `chosen` is a backend, or a kind of attention."""
    case, operation = CASES[name], functools.partial(operation_of(name), backend=chosen)
    if chosen in attention.FUNCTIONS:
        operation = functools.partial(_attend, attention.FUNCTIONS[chosen])
    arguments = case.inputs(Inputs(SIZES[size], device, dtype))
    shape = "×".join(map(str, outputs_of(next(iter(arguments.values())))[0].shape))
    ours, ours_leaves = with_gradients(arguments, case.gradients)
    exact, exact_leaves = with_gradients(widened(arguments), case.gradients)
    results = outputs_of(case.call(operation, ours))
    references = outputs_of(case.call(operation_of(name, reference), exact))
    yield _check(name, chosen, shape, dtype, results, references)
    if case.gradients:
        generator = torch.Generator(device).manual_seed(1)
        upstream = [torch.randn(r.shape, generator=generator, device=device) for r in results]
        torch.autograd.backward(results, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)])
        torch.autograd.backward(references, [u.to(r.dtype).double() for u, r in zip(upstream, results, strict=True)])
        gradients = ([leaf.grad for leaf in leaves] for leaves in (ours_leaves, exact_leaves))
        yield _check(f"{name} backward", chosen, shape, dtype, *gradients)


def _attend(function: Callable, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    return function(q, k, v, key_mask)


def _check(
    name: str, chosen: str, shape: str, dtype: torch.dtype, results: list[Tensor], references: list[Tensor]
) -> Check:
    error = max(map(_error, results, references))
    passed = error <= (TOLERANCE[dtype] if results[0].is_floating_point() else _wrong_tokens_allowed(results[0]))
    return Check(name, chosen, shape, str(dtype).removeprefix("torch."), error, passed)


def _error(result: Tensor, exact: Tensor) -> float:
    """Largest error over the largest exact value; for tokens, the share that differs."""
    if not result.is_floating_point():
        return (result != exact).double().mean().item()
    if not result.isfinite().all():
        return float("inf")
    return ((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def _wrong_tokens_allowed(tokens: Tensor) -> float:
    """Races and thresholds decided within rounding may fall otherwise in float64: one position in a thousand."""
    return max(1e-3, 1.5 / tokens.numel()) if tokens.numel() > 1000 else 0.0
