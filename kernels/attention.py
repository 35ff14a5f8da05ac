"""`joint_attention`: softmax attention over the joint sequence, by the fused kernels that are installed.

Without a key mask: flash-attn (4, 3 or 2, the first that can be imported), else PyTorch's SDPA. With a key mask: the
variable-length function of flash-attn, else `torch.nn.attention.varlen.varlen_attn`, else SDPA with a mask.

Variable-length functions get all queries, because the network computes masked positions too, and only the attended keys
and values, those of all samples packed one after the other. The packing is a permutation of the B·L rows: the buffer
keeps its size and its tail is not read, so that no synchronization is needed. The kernels leave gradients of the tail
unwritten; they are set to zero before the packing is differentiated.

Flash-attn 4 uses its own just-in-time compiler, which torch.compile cannot trace. Compiled networks call it as an
opaque operation (`untraced`).

On CPU short sequences with narrow heads use `short_attention`, two batched matrix products around a softmax with padded
rows. Compiled it was 2.3 times as fast as SDPA for 15 positions and 4 heads of 8, 1.8 times for 12 positions and heads
of 20, and 1.7 times for 28 positions and heads of 32.

Floor: 4 · ΣL · (attended keys) · H · Dh FLOPs; q, k, v read once, the result written once.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .backend import check, check_device, check_floating, check_shape, is_reference, use_triton

# (module, required compute capability, whether torch.compile can trace it)
FLASH_MODULES = (
    ("flash_attn.cute", (9, 0), False),
    ("flash_attn_interface", (9, 0), True),
    ("flash_attn", (8, 0), True),
)
VECTOR = 16  # float32 numbers in a vector register of current CPUs
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")  # arguments of variable-length functions
FUNCTIONS: dict[str, Callable[..., Tensor]] = {"sdpa": reference.joint_attention}


def packing_order(key_mask: Tensor) -> Tensor:
    """(B·L,) permutation that moves the attended positions to the front in order, without synchronization."""
    attended = key_mask.flatten()
    front, back = attended.cumsum(0) - 1, (~attended).cumsum(0) - 1
    target = torch.where(attended, front, back + attended.sum())
    return torch.empty_like(target).scatter_(0, target, torch.arange(target.shape[0], device=target.device))


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over few positions on CPU. Rows are padded to whole vectors, where the softmax is faster."""
    batch, length, heads, width = k.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    padding = -length % VECTOR
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in (k, v))
    padded = torch.arange(length + padding, device=q.device) >= length
    bias = torch.where(padded, -1e30, 0.0).to(q.dtype).expand(1, 1, -1)
    scores = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5), -1)
    return torch.bmm(scores, v).unflatten(0, (batch, heads)).transpose(1, 2)


def is_short(k: Tensor, key_mask: Tensor | None) -> bool:
    """Whether `short_attention` is expected to be faster than SDPA for the keys k (B, L, H, Dh)."""
    _, length, _, width = k.shape
    fits = k.device.type == "cpu" and k.dtype == torch.float32 and key_mask is None
    return fits and width <= 2 * VECTOR and length <= 4 * VECTOR and length % VECTOR > 0


def fixed_attention(function: Callable, q: Tensor, k: Tensor, v: Tensor, key_mask: None) -> Tensor:
    """Attention by `function(q, k, v)`, without a key mask."""
    return first_output(function(q, k, v))


def varlen_attention(function: Callable, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """Attention of all queries to the attended keys by `function(q, k, v, cu_q, cu_k, max_q, max_k)`."""
    (batch, length), queries = key_mask.shape, q.shape[1]
    order, counts = packing_order(key_mask), key_mask.sum(1)
    read = torch.arange(batch * length, device=q.device) < counts.sum()
    cu_q = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=q.device)
    cu_k = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    k, v = (torch.where(read[:, None, None], x.flatten(0, 1)[order], 0.0) for x in (k, v))
    return first_output(function(q.flatten(0, 1), k, v, cu_q, cu_k, queries, length)).view(q.shape)


def first_output(result: Tensor | tuple) -> Tensor:
    """The attention's result; some versions return the log-sum-exps as well."""
    return result[0] if isinstance(result, tuple) else result


def flash_varlen(function: Callable) -> Callable:
    """flash-attn's variable-length function with positional lengths; not all versions take all of LENGTHS."""
    parameters = inspect.signature(function).parameters
    return functools.partial(call_varlen, function, tuple(name for name in LENGTHS if name in parameters))


def call_varlen(function: Callable, names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor | int):
    by_name = dict(zip(LENGTHS, lengths, strict=True))
    return function(q, k, v, **{name: by_name[name] for name in names})


def untraced(name: str, function: Callable) -> Callable:
    """Wrap an attention `function(q, k, v, *lengths)` so that compiled networks call it as the operation
    anystate::`name`.

    Eager calls go to `function` itself. The backward pass of the operation runs the forward pass again, because
    flash-attn saves its tensors in an autograd graph, which an operation cannot return.
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
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            out = attend(q, k, v, cu_q, cu_k, max_q, max_k)
        return tuple(x.contiguous() for x in torch.autograd.grad(out, (q, k, v), grad))

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
    """Add the implementations that this GPU and installation support to FUNCTIONS."""
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
    """Names of the usable implementations in FUNCTIONS, in order of preference; "sdpa" is always the last."""
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    if not fits:
        return ("sdpa",)
    discover(torch.cuda.get_device_capability(device))
    preferred = ("flash_varlen", "torch_varlen", "sdpa") if masked else ("flash", "sdpa")
    return drop_disabled(tuple(name for name in preferred if name in FUNCTIONS))


def drop_disabled(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names without those listed, comma-separated, in ANYSTATE_ATTENTION_WITHOUT, for kernels that fail on a GPU.
    "sdpa" cannot be disabled."""
    disabled = os.environ.get("ANYSTATE_ATTENTION_WITHOUT", "").split(",")
    return tuple(name for name in names if name not in disabled or name == "sdpa")


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over the joint sequence with scale 1/√Dh: (B, Q, H, Dh) like q.

    q (B, Q, H, Dh), usually with Q = L; k, v (B, L, H, Dh); key_mask (B, L) bool, True where keys are attended to.
    Queries at masked positions are computed too. The result for a sample without any attended key is undefined.
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
        if is_short(k, key_mask) and not is_reference(backend):
            return short_attention(q, k, v)
        return reference.joint_attention(q, k, v, key_mask)
    name = candidates(q.device, q.dtype, q.shape[-1], key_mask is not None)[0]
    return FUNCTIONS[name](q, k, v, key_mask)
