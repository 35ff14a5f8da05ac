"""The operations whose block sizes are swept on a GPU, with the block sizes to try."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator

import torch

from ...kernels import adaln, logit_slices, qk_norm
from ..speed.kernel_floors import nbytes
from ..speed.kernel_inputs import (
    SIZES,
    Inputs,
    cross_entropy,
    gelu,
    leap_guided,
    leap_linear,
    leap_uniform,
    pack,
)
from ..speed.kernel_inputs import gated_adaln as gated_adaln_inputs

# imported by path, because attributes of the package with these names are operations
tau_leap, tau_leap_linear, tau_leap_uniform, linear_cross_entropy, linear_cross_entropy_sum = (
    importlib.import_module(f"...kernels.{name}", __package__)
    for name in (
        *("tau_leap", "tau_leap_linear", "tau_leap_uniform"),
        *("linear_cross_entropy", "linear_cross_entropy_sum"),
    )
)
bias_gelu, gated_adaln, gated_residual = (
    importlib.import_module(f"...kernels.{name}", __package__)
    for name in ("bias_gelu", "gated_adaln", "gated_residual")
)

PROGRAMS = ({"programs": 1024}, {"programs": 2048})  # of a backward kernel; the default is 512
ROW_TILES = tuple({"ROWS": r, "num_warps": w} for r, w in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (2, 16)))
GELU_TILES = tuple(
    {"ROWS": r, "COLUMNS": c, "num_warps": 4} for r, c in ((16, 64), (4, 256), (8, 128), (4, 512), (16, 128))
)
PACK_TILES = tuple({"ROWS": r, "num_warps": w} for r, w in ((1, 1), (1, 2), (2, 2), (4, 4), (4, 8)))
HEAD_TILES = (
    {"maxnreg": 128},
    {"num_stages": 4},
    {"BLOCK_V": 128, "num_warps": 8, "maxnreg": 128},
    {"BLOCK_R": 128, "num_warps": 8, "maxnreg": 128},
    {"programs": 1},
)
GUIDED_HEAD_TILES = (
    {"maxnreg": 128},
    {"BLOCK_D": 64, "num_stages": 3},
    {"BLOCK_R": 128, "BLOCK_D": 64, "num_stages": 3, "num_warps": 8, "maxnreg": 128},
)
LEAP_TILES = (
    {"BLOCK": 1024, "num_warps": 2},
    {"BLOCK": 1024, "num_warps": 4},
    {"BLOCK": 4096, "num_warps": 8},
    {"programs": 32},
    {"programs": 512},
)
STEP = {"rule": "tau", "mask_logit": False}
ALONE = {"uncond": None, "guidance": None}  # without a second branch
SLICES = (2048, 4096, 8192)  # states in a slice of the head, rows in a part of the batch
FOLD_TILES = tuple(
    {"ROWS": r, "BLOCK": b, "num_warps": w} for r, b, w in ((1, 1024, 1), (1, 2048, 2), (1, 2048, 4), (4, 512, 2))
)
GRADIENT_TILES = tuple(
    {"ROWS": r, "BLOCK": b, "num_warps": w} for r, b, w in ((2, 1024, 4), (4, 512, 2), (4, 256, 1), (8, 1024, 4))
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """An operation and the launch arguments to try, which override the defaults of its launcher.

    Args:
        choices: are timed first.
        then: are timed together with the best of the choices.
        moved: least number of bytes, 0 if unknown.
    """

    op: str
    width: int
    dtype: torch.dtype
    launch: Callable[[], object]
    choices: tuple[dict[str, int], ...]
    then: tuple[dict[str, int], ...] = ()
    moved: int = 0


def trials(device: str, size: str) -> Iterator[Trial]:
    """All trials, in order of importance."""
    inputs = Inputs(SIZES[size], device, torch.bfloat16)
    yield from row_trials(inputs, torch.float32)
    yield from head_trials(inputs)
    yield from gelu_trials(inputs)
    yield from pack_trials(inputs)
    yield from leap_trials(inputs)
    yield from row_trials(inputs, torch.bfloat16)


def row_trials(i: Inputs, stream: torch.dtype) -> Iterator[Trial]:
    """adaLN and gated residual. In training the stream is float32, modulation and branch are bfloat16."""
    width, a = i.size.width, gated_adaln_inputs(i, stream)
    x, branch, gate, scale, shift = (a[name] for name in ("x", "branch", "gate", "scale", "shift"))
    total, _, moments = gated_adaln.launch_gated_adaln(x, branch, gate, None, scale, shift, 1e-5, False, i.dtype)
    yield Trial(
        "gated_adaln",
        width,
        stream,
        lambda: gated_adaln.launch_gated_adaln(x, branch, gate, None, scale, shift, 1e-5, False, i.dtype),
        ROW_TILES,
        moved=2 * nbytes(x, branch),
    )
    yield Trial(
        "gated_adaln_backward",
        width,
        stream,
        lambda: gated_adaln.launch_gated_adaln_backward(branch, x, total, moments, branch, gate, None, scale, False),
        ROW_TILES,
        PROGRAMS,
        moved=3 * nbytes(x, branch),
    )
    yield Trial(
        "adaln_modulate",
        width,
        stream,
        lambda: adaln.launch_adaln(x, scale, shift, 1e-5, False, i.dtype),
        ROW_TILES,
        moved=nbytes(x, branch),
    )
    yield Trial(
        "adaln_modulate_backward",
        width,
        stream,
        lambda: adaln.launch_adaln_backward(branch, None, x, moments, scale, False),
        ROW_TILES,
        PROGRAMS,
        moved=2 * nbytes(x) + nbytes(branch),
    )
    yield Trial(
        "gated_residual",
        width,
        stream,
        lambda: gated_residual.launch_gate(x, branch, gate, None),
        ROW_TILES,
        moved=2 * nbytes(x) + nbytes(branch),
    )
    yield Trial(
        "gated_residual_backward",
        width,
        stream,
        lambda: gated_residual.launch_gate_backward(x, branch, gate, None),
        ROW_TILES,
        PROGRAMS,
        moved=nbytes(x) + 2 * nbytes(branch),
    )


def gelu_trials(i: Inputs) -> Iterator[Trial]:
    """Bias and GELU of a feed-forward layer."""
    x, bias = gelu(i).values()
    yield Trial(
        "bias_gelu", x.shape[-1], i.dtype, lambda: bias_gelu.launch_gelu(x, bias), GELU_TILES, moved=2 * nbytes(x)
    )
    yield Trial(
        "bias_gelu_backward",
        x.shape[-1],
        i.dtype,
        lambda: bias_gelu.launch_gelu_backward(x, x, bias),
        GELU_TILES,
        ({"programs": 1536}, {"programs": 6144}),  # the default is 3072
        moved=3 * nbytes(x),
    )


def head_trials(i: Inputs) -> Iterator[Trial]:
    """Cross-entropy: slices of the head, parts of the batch."""
    size, head = i.size, cross_entropy(i)
    upstream = torch.rand(size.rows, generator=i.generator, device=i.device)

    def forward_and_backward() -> None:
        _, lse = linear_cross_entropy.launch_forward(**head, z_loss=0.0)
        linear_cross_entropy.launch_backward(upstream, **head, lse=lse, z_loss=0.0, needs=[True] * 3)

    def at_once() -> None:
        row_weight = {"row_weight": upstream, "z_loss": 0.0}
        linear_cross_entropy_sum.launch(**head, **row_weight, dtype=i.dtype, needs=[True] * 3)

    yield from slice_trials(i, head["target"], upstream)
    for op, function, whole, cut in (
        ("linear_cross_entropy_sum", at_once, size.states, size.rows),
        ("linear_cross_entropy", forward_and_backward, size.rows, size.states),
    ):
        chunks = tuple({"chunk_bytes": whole * min(n, cut) * i.dtype.itemsize} for n in SLICES)
        yield Trial(op, size.width, i.dtype, function, chunks)


def leap_trials(i: Inputs) -> Iterator[Trial]:
    """τ-leaping from hidden states (tiles of the head) and from logits (parts of the vocabulary), without and with
    guidance."""
    linear, width, states = leap_linear(i), i.size.width, i.size.states
    second = {"uncond": i.normal(*linear["hidden"].shape), "guidance": i.per_sample(i.size.sampled, 2.0)}
    head = nbytes(linear["weight"])
    for op, branch, choices in (
        ("tau_leap_linear", ALONE, HEAD_TILES),
        ("tau_leap_linear_guided", second, GUIDED_HEAD_TILES),
    ):
        launch = functools.partial(tau_leap_linear.launch, **linear, **STEP, **branch)
        yield Trial(op, width, i.dtype, launch, choices, moved=head)
    logits = leap_guided(i)
    for op, branch in (("tau_leap", ALONE), ("tau_leap_guided", {})):
        launch = functools.partial(tau_leap.launch, **logits | STEP | branch)
        yield Trial(op, states, i.dtype, launch, LEAP_TILES)
    uniform = leap_uniform(i)
    launch = functools.partial(tau_leap_uniform.launch, **uniform, rule="tau")
    yield Trial("tau_leap_uniform", states, i.dtype, launch, LEAP_TILES)


def slice_trials(i: Inputs, target: torch.Tensor, upstream: torch.Tensor) -> Iterator[Trial]:
    """The kernels of the cross-entropies on a slice of logits."""
    logits = i.normal(i.size.rows, min(4096, i.size.states))
    lse, picked = torch.zeros_like(upstream), torch.zeros_like(upstream)
    block, moved = logit_slices.block_size(logits.shape[1], logit_slices.BLOCK), nbytes(logits)
    yield Trial(
        "linear_cross_entropy_fold",
        block,
        i.dtype,
        lambda: logit_slices.fold(logits, target, lse, picked, 0),
        FOLD_TILES,
        moved=moved,
    )
    yield Trial(
        "linear_cross_entropy_gradient",
        block,
        i.dtype,
        lambda: logit_slices.gradient(logits, target, lse, upstream, 0, 0.0, True),
        GRADIENT_TILES,
        moved=2 * moved,
    )


def pack_trials(i: Inputs) -> Iterator[Trial]:
    """Normalization and packing of q, k, v."""
    a, size = pack(i), i.size
    qkv, q_gamma, k_gamma, width = a["qkv"], a["q_gamma"], a["k_gamma"], size.heads * size.head_width
    shape = size.batch, size.patches + size.length, size.heads, size.head_width
    grad_q, grad_k, grad_v = i.normal(*shape), i.normal(*shape), i.normal(*shape)
    yield Trial(
        "qk_norm_pack",
        width,
        i.dtype,
        lambda: qk_norm.launch_pack(qkv, q_gamma, k_gamma, None, None),
        PACK_TILES,
        moved=2 * nbytes(qkv),
    )
    yield Trial(
        "qk_norm_pack_backward",
        width,
        i.dtype,
        lambda: qk_norm.launch_pack_backward(grad_q, grad_k, grad_v, qkv, q_gamma, k_gamma, None, None),
        PACK_TILES,
        ({"programs": 512}, {"programs": 2048}),  # the default is 1024
        moved=8 * nbytes(qkv) // 3,
    )
