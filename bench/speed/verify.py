"""`anystate verify`: compares every operation, forward and backward, with its reference in float64."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import backend, reference
from .kernel_cases import CASES, in_float64, operation_of, outputs_of, with_gradients
from .kernel_inputs import SIZES, Inputs
from .results import ResultLog

attention = importlib.import_module("...kernels.attention", __package__)

# largest allowed error relative to the largest exact value: a few roundings of the result
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Check(NamedTuple):
    """The error of an operation, or of its gradients, in one dtype; for tokens the share that differs."""

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
    log: ResultLog | None = None,
) -> bool:
    """Verify operations; returns whether all passed.

    On a GPU the kernels are verified in three dtypes. Without one the reference is verified in float32, or under
    TRITON_INTERPRET=1 the kernels, in float32 too: the interpreter does not round bfloat16 as a GPU does.

    Args:
        ops: cases of `kernel_cases.CASES`; default all.
        size: tiny, small or official.
        chosen: backend.
        write: called with one line per operation and dtype.
        log: a log that every error is added to.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = size or ("small" if device.startswith("cuda") else "tiny")
    if chosen is None:
        chosen = "triton" if device.startswith("cuda") or backend.INTERPRETED else "reference"
    dtypes = list(TOLERANCE) if device.startswith("cuda") else [torch.float32]
    passed = True
    for name, dtype in itertools.product(ops or CASES, dtypes):
        for implementation in implementations(name, size, device, dtype, chosen):
            try:
                for check in checks(name, size, device, dtype, implementation):
                    write(str(check))
                    passed = passed and check.passed
                    if log is not None:
                        _add(check, log)
            except Exception as error:  # of a compiler or driver; the other operations are still verified
                message = " ".join(str(error).split())[:300]
                write(f"FAIL  {name:24} {implementation:10} {str(dtype)[6:]:9} {type(error).__name__}: {message}")
                passed = False
    return passed


def _add(check: Check, log: ResultLog) -> None:
    name = f"verify {check.name}, {check.dtype}"
    log.add(name, {check.backend: check.error}, "", shape=check.shape, passed=check.passed)


def implementations(name: str, size: str, device: str, dtype: torch.dtype, chosen: str) -> tuple[str, ...]:
    """The chosen backend; for attention on a GPU all usable implementations."""
    if chosen != "triton" or not name.startswith("joint_attention"):
        return (chosen,)
    return attention.candidates(torch.device(device), dtype, SIZES[size].head_width, name.endswith("padded"))


def checks(name: str, size: str, device: str, dtype: torch.dtype, chosen: str) -> Iterator[Check]:
    """The results of one case and its gradients; `chosen` is a backend or an implementation of attention."""
    case, operation = CASES[name], functools.partial(operation_of(name), backend=chosen)
    if chosen in attention.FUNCTIONS:
        operation = functools.partial(_attend, attention.FUNCTIONS[chosen])
    arguments = case.inputs(Inputs(SIZES[size], device, dtype))
    shape = "×".join(map(str, outputs_of(next(iter(arguments.values())))[0].shape))
    ours, ours_leaves = with_gradients(arguments, case.gradients)
    exact, exact_leaves = with_gradients(in_float64(arguments), case.gradients)
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
    """Largest error relative to the largest exact value; for tokens the share that differs."""
    if not result.is_floating_point():
        return (result != exact).double().mean().item()
    if not result.isfinite().all():
        return float("inf")
    return ((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def _wrong_tokens_allowed(tokens: Tensor) -> float:
    """Share of tokens that may differ, because float64 can decide a race or a threshold differently: 1 in 1000."""
    return max(1e-3, 1.5 / tokens.numel()) if tokens.numel() > 1000 else 0.0
