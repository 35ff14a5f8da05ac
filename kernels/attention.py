"""`joint_attention`: softmax attention over the joint sequence by whichever fused kernel is installed.

Without a key mask: flash-attn (4, 3 or 2, whichever imports first), else PyTorch's SDPA, which has flash kernels of its
own. With one: the variable-length function of flash-attn, else `torch.nn.attention.varlen.varlen_attn`, else SDPA with
a mask. The variable-length functions get every query, also those at masked positions (the network computes them), and
only the keys that are attended: keys and values of all samples packed one after the other. The packed buffer keeps the
size B·L, its tail unread, so nothing waits for the GPU; it is a permutation of the rows. Its gradient is that of
indexing: PyTorch adds rows into place by `index_put`, although no two fall on the same one. Gradients of unread rows,
which the kernels leave unwritten, are set to zero before.

Functions of flash-attn 4 call its own just-in-time compiler, which torch.compile cannot trace: in compiled networks
they are operations that it does not look into (`untraced`).

On the CPU: SDPA, but for short rows and narrow heads two batched products around a softmax whose rows are padded to
whole vectors (compiled, with 15 positions, 4 heads of 8: 2.3 times as fast; 12, 20: 1.8 times; 28, 32: 1.7 times).

Floor: 4 · ΣL · (attended keys) · H · Dh FLOPs; q, k, v read once, the result written once.
"""

import functools
import importlib
import inspect
import os

import torch
from torch import Tensor

from . import reference
from .backend import check, check_device, check_floating, check_shape, is_reference, use_triton

# (module, compute capability it needs, whether torch.compile can trace it)
FLASH_MODULES = (
    ("flash_attn.cute", (9, 0), False),
    ("flash_attn_interface", (9, 0), True),
    ("flash_attn", (8, 0), True),
)
VECTOR = 16  # float32 numbers in a vector register of current CPUs
FUNCTIONS = {"sdpa": reference.joint_attention}


def packing_order(key_mask: Tensor) -> Tensor:
    """(B·L,) permutation that brings the attended positions to the front, in order, without reading their number."""
    attended = key_mask.flatten()
    front, back = attended.cumsum(0) - 1, (~attended).cumsum(0) - 1
    place = torch.where(attended, front, back + attended.sum())
    return torch.empty_like(place).scatter_(0, place, torch.arange(place.shape[0], device=place.device))


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over few positions on a CPU; the softmax of a row that is no whole number of vectors would be slow."""
    batch, length, heads, width = k.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    padding = -length % VECTOR
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in (k, v))
    hidden = torch.arange(length + padding, device=q.device) >= length
    bias = torch.where(hidden, -1e30, 0.0).to(q.dtype).expand(1, 1, -1)
    scores = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5), -1)
    return torch.bmm(scores, v).unflatten(0, (batch, heads)).transpose(1, 2)


def short(q: Tensor, key_mask: Tensor | None) -> bool:
    """Whether `short_attention` is the faster one; see the module's text."""
    _, length, _, width = q.shape
    fits = q.device.type == "cpu" and q.dtype == torch.float32 and key_mask is None
    return fits and width <= 2 * VECTOR and length <= 4 * VECTOR and length % VECTOR > 0


def fixed_attention(function, q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
    return first_output(function(q, k, v))


def varlen_attention(function, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """Attention by a variable-length `function(q, k, v, cu_q, cu_k, max_q, max_k)`: all queries, attended keys."""
    (batch, length), queries = key_mask.shape, q.shape[1]
    order, counts = packing_order(key_mask), key_mask.sum(1)
    read = torch.arange(batch * length, device=q.device) < counts.sum()
    cu_q = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=q.device)
    cu_k = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    k, v = (torch.where(read[:, None, None], x.flatten(0, 1)[order], 0.0) for x in (k, v))
    return first_output(function(q.flatten(0, 1), k, v, cu_q, cu_k, queries, length)).view(q.shape)


def first_output(result):
    """Some versions return the log-sum-exps beside the result."""
    return result[0] if isinstance(result, tuple) else result


def flash_varlen(function):
    """flash-attn's variable-length function by position; not every version takes the longest lengths."""
    known = inspect.signature(function).parameters

    def call(q, k, v, cu_q, cu_k, max_q, max_k):
        lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return function(q, k, v, **{name: value for name, value in lengths.items() if name in known})

    return call


def untraced(name: str, function):
    """An attention `function(q, k, v, *lengths)` as it is, and in compiled networks as the operation anystate::`name`.

    The operation's backward runs the forward pass again: flash-attn keeps what it needs in an autograd graph, which an
    operation cannot hand on.
    """

    def attend(q, k, v, cu_q, cu_k, max_q, max_k) -> Tensor:
        lengths = () if cu_q is None else (cu_q, cu_k, max_q, max_k)
        return first_output(function(q, k, v, *lengths)).contiguous()

    @torch.library.custom_op(f"anystate::{name}", mutates_args=())
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
    ) -> Tensor:
        return attend(q, k, v, cu_q, cu_k, max_q, max_k)

    @torch.library.custom_op(f"anystate::{name}_backward", mutates_args=())
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attend(*leaves, cu_q, cu_k, max_q, max_k)
        return tuple(x.contiguous() for x in torch.autograd.grad(out, leaves, grad))

    def setup(ctx, inputs, output):
        *tensors, ctx.max_q, ctx.max_k = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx, grad):
        return *backward(grad.contiguous(), *ctx.saved_tensors, ctx.max_q, ctx.max_k), None, None, None, None

    forward.register_fake(lambda q, *_: q.new_empty(q.shape))
    backward.register_fake(lambda grad, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
    forward.register_autograd(gradients, setup_context=setup)

    def call(q, k, v, *lengths):
        if torch.compiler.is_compiling():
            return forward(q, k, v, *(lengths or (None, None, 0, 0)))
        return function(q, k, v, *lengths)

    return call


@functools.cache
def discover(capability: tuple[int, int]) -> None:
    """Adds to FUNCTIONS what this GPU and installation offer."""
    for name, needed, traceable in FLASH_MODULES:
        try:
            module = importlib.import_module(name)
            fixed, varlen = module.flash_attn_func, flash_varlen(module.flash_attn_varlen_func)
        except (ImportError, AttributeError):
            continue
        if capability >= needed:
            if not traceable:
                fixed, varlen = untraced("flash", fixed), untraced("flash_varlen", varlen)
            FUNCTIONS["flash"] = functools.partial(fixed_attention, fixed)
            FUNCTIONS["flash_varlen"] = functools.partial(varlen_attention, varlen)
            break
    if capability >= (8, 0):
        try:
            function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except (ImportError, AttributeError):
            return
        FUNCTIONS["torch_varlen"] = functools.partial(varlen_attention, function)


@torch.compiler.assume_constant_result
def candidates(device: torch.device, dtype: torch.dtype, width: int, masked: bool) -> tuple[str, ...]:
    """Names in FUNCTIONS that can run, the preferred one first; "sdpa" always can."""
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    if not fits:
        return ("sdpa",)
    discover(torch.cuda.get_device_capability(device))
    wanted = ("flash_varlen", "torch_varlen", "sdpa") if masked else ("flash", "sdpa")
    return without_left_out(tuple(name for name in wanted if name in FUNCTIONS))


def without_left_out(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names less those in ANYSTATE_ATTENTION_WITHOUT, separated by commas: the way round one that fails on a GPU;
    "sdpa" stays."""
    left_out = os.environ.get("ANYSTATE_ATTENTION_WITHOUT", "").split(",")
    return tuple(name for name in names if name not in left_out or name == "sdpa")


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over the joint sequence, (B, L, H, Dh). key_mask (B, L) bool, True = attend. Scale 1/√Dh.

    There may be fewer queries, q (B, Q, H, Dh). Those at masked positions are computed too. A sample that attends to no
    key at all gets whatever the chosen implementation makes of it.
    """
    check(q.ndim == 4, "q", f"must be (B, L, H, Dh), got {tuple(q.shape)}")
    check_shape("k", k, (q.shape[0], *k.shape[1:2], *q.shape[2:]))
    check_shape("v", v, k.shape)
    check_floating(q=q, k=k, v=v)
    check_device(q.device, k=k, v=v, key_mask=key_mask)
    if key_mask is not None:
        check(key_mask.dtype == torch.bool, "key_mask", f"must be bool, got {key_mask.dtype}")
        check_shape("key_mask", key_mask, k.shape[:2])
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not use_triton(backend, q):
        if short(k, key_mask) and not is_reference(backend):
            return short_attention(q, k, v)
        return reference.joint_attention(q, k, v, key_mask)
    name = candidates(q.device, q.dtype, q.shape[-1], key_mask is not None)[0]
    return FUNCTIONS[name](q, k, v, key_mask)
