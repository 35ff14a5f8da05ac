"""The least work of every operation, (bytes, FLOPs), from its arguments and its result.

Bytes are those that must be read from and written to memory once. A floor in time is the work divided by the measured
bandwidth or matmul rate, whichever takes longer (`kernels.Limits`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .kernel_inputs import STEPS, Arguments

Work = tuple[int, int]


def nbytes(*values: Tensor | Iterable | None) -> int:
    """Bytes of tensors, of nested lists of tensors, and of None (0)."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif value is not None:
            total += nbytes(*value)
    return total


def moves(a: Arguments, out: Tensor) -> int:
    """Number of positions that moved; each requires one row of logits."""
    return int((out != a["tokens"]).sum())


def row_bytes(a: Arguments) -> int:
    return a["logits"].shape[-1] * a["logits"].element_size()


def read_and_written(a: Arguments, out: Tensor | tuple[Tensor, ...]) -> Work:
    """Every input and output once, except keys and per-sample coefficients."""
    large = [v for v in a.values() if isinstance(v, Tensor) and v.ndim > 1 and v.shape[1:] != (5,)]
    return nbytes(*large) + nbytes(out), 0


def adaln_backward(a: Arguments, out: Tensor) -> Work:
    """x and the upstream gradient are read; the gradient of x is written. Also that of `bias_gelu`."""
    return 2 * nbytes(a["x"]) + nbytes(out), 0


def gate_backward(a: Arguments, out: Tensor) -> Work:
    """The branch and the upstream gradient are read; the gradient of the branch is written."""
    return 2 * nbytes(a["branch"]) + nbytes(out), 0


def gated_adaln(a: Arguments, out: tuple[Tensor, ...]) -> Work:
    """x and the branch are read; x' and y are written, without a branch y alone."""
    return nbytes(a["x"], a["branch"], out[1]) + (0 if a["branch"] is None else nbytes(out[0])), 0


def gated_adaln_backward(a: Arguments, out: tuple[Tensor, ...]) -> Work:
    """x', the branch and both upstream gradients are read; the gradients of x and of the branch are written."""
    return 2 * nbytes(a["x"], a["branch"]) + nbytes(out), 0


def head_flops(a: Arguments) -> int:
    """FLOPs of hidden · weightᵀ."""
    return 2 * len(a["hidden"]) * a["weight"].numel()


def attention(a: Arguments, out: Tensor) -> Work:
    q = a["q"]
    keys = int(a["key_mask"].sum()) if "key_mask" in a else q.shape[0] * q.shape[1]
    return 4 * nbytes(q), 4 * q.shape[1] * keys * q.shape[2] * q.shape[3]


def leap_linear(a: Arguments, out: Tensor) -> Work:
    rows, width = moves(a, out), a["hidden"].shape[-1]
    head = nbytes(a["weight"], a["bias"]) if rows else 0
    return 2 * nbytes(out) + head + rows * width * a["hidden"].element_size(), 2 * rows * a["weight"].numel()


def eps_mse_backward(a: Arguments, out: Tensor) -> Work:
    return 2 * nbytes(a["eps"]), 0


def leap(a: Arguments, out: Tensor) -> Work:
    """Tokens are read and written; a row of logits is read per move."""
    return 2 * nbytes(out) + moves(a, out) * row_bytes(a), 0


def leap_guided(a: Arguments, out: Tensor) -> Work:
    return 2 * nbytes(out) + 2 * moves(a, out) * row_bytes(a), 0


def leap_all_steps(a: Arguments, out: Tensor) -> Work:
    return 2 * STEPS * nbytes(out) + moves(a, out) * row_bytes(a), 0


def cross_entropy(a: Arguments, out: Tensor) -> Work:
    return nbytes(a["hidden"], a["weight"]), head_flops(a)


def cross_entropy_backward(a: Arguments, out: Tensor) -> Work:
    return 2 * nbytes(a["hidden"], a["weight"]), 2 * head_flops(a)


def unread(a: Arguments) -> int:
    """Bytes of keys, and as many of values, that nothing attends to: they are not read."""
    if "packing" not in a:
        return 0
    inner = a["qkv"][0].shape[-1] // 3
    return int((~a["packing"].attended()).sum()) * inner * a["qkv"][0].element_size()


def pack(a: Arguments, out: tuple[Tensor, ...]) -> Work:
    return 2 * nbytes(a["qkv"]) - 2 * unread(a), 0


def pack_backward(a: Arguments, out: tuple[Tensor, ...]) -> Work:
    """q, k and the gradients of q, k and v are read; the gradient of qkv is written."""
    return 8 * nbytes(a["qkv"]) // 3 - 3 * unread(a), 0


def attention_backward(a: Arguments, out: Tensor) -> Work:
    """Five matmuls instead of the two of the forward pass."""
    return 8 * nbytes(a["q"]), attention(a, out)[1] * 5 // 2
