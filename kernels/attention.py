"""`joint_attention`: softmax attention over the joint sequence, by the fused kernels that are installed.

Without a key mask: flash-attn (4, 3 or 2, the first that is installed), else PyTorch's SDPA. With a key mask: the
variable-length function of flash-attn, else `torch.nn.attention.varlen.varlen_attn`, else SDPA with a mask.

Variable-length functions get all queries and the packed keys and values. A network packs its key mask once per
evaluation (`pack_keys`) and hands the `Packing` to `qk_norm_pack` and `joint_attention`; a plain mask is packed here.

On CPU short sequences with narrow heads use `short_attention`, two batched matrix products around a softmax with padded
rows. Compiled it was 2.3 times as fast as SDPA for 15 positions and 4 heads of 8, 1.8 times for 12 positions and heads
of 20, and 1.7 times for 28 positions and heads of 32.

Floor: 4 · ΣL · (attended keys) · H · Dh FLOPs; q, k, v read once, the result written once.
"""

import functools
import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

from . import flash_attention, reference
from .backend import check, check_device, check_floating, check_shape, constant_in_graphs, is_reference, use_triton
from .flash_attention import first_output
from .packing import Packing

VECTOR = 16  # float32 numbers in a vector register of current CPUs
FUNCTIONS: dict[str, Callable[..., Tensor]] = {"sdpa": reference.joint_attention}


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


def narrow_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over few positions with narrow heads as sums of products, which a compiler fuses with what is around
    them; matrix products need copies of q, k and v."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * q.shape[-1] ** -0.5
    return (torch.softmax(scores, -1)[..., None] * v[:, :, None]).sum(-2).transpose(1, 2)


def is_narrow(k: Tensor, key_mask: Tensor | Packing | None) -> bool:
    """Whether compiled code uses `narrow_attention` for the keys k (B, L, H, Dh) where it runs the reference."""
    return torch.compiler.is_compiling() and key_mask is None and k.shape[1] <= 64 and k.shape[3] <= 16


def is_short(k: Tensor, key_mask: Tensor | Packing | None) -> bool:
    """Whether `short_attention` is expected to be faster than SDPA for the keys k (B, L, H, Dh)."""
    _, length, _, width = k.shape
    fits = k.device.type == "cpu" and k.dtype == torch.float32 and key_mask is None
    return fits and width <= 2 * VECTOR and length <= 4 * VECTOR and length % VECTOR > 0


def fixed_attention(function: Callable, q: Tensor, k: Tensor, v: Tensor, key_mask: None) -> Tensor:
    """Attention by `function(q, k, v)`, without a key mask."""
    return first_output(function(q, k, v))


def varlen_attention(function: Callable, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | Packing) -> Tensor:
    """Attention of all queries to the attended keys by `function(q, k, v, cu_q, cu_k, max_q, max_k)`."""
    queries, length = q.shape[1], k.shape[1]
    if isinstance(key_mask, Tensor):
        key_mask = Packing.of(key_mask, queries)
        k, v = key_mask.pack(k), key_mask.pack(v)
    rows = (x.flatten(0, 1) for x in (q, k, v))
    return first_output(function(*rows, key_mask.cu_q, key_mask.cu_k, queries, length)).view(q.shape)


@functools.cache
def discover(capability: tuple[int, int]) -> None:
    """Add the implementations that this GPU and installation support to FUNCTIONS."""
    flash = flash_attention.installed(capability)
    if flash is not None:
        FUNCTIONS["flash"] = functools.partial(fixed_attention, flash.fixed)
        FUNCTIONS["flash_varlen"] = functools.partial(varlen_attention, flash.varlen)
    if capability >= (8, 0):
        try:
            function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except (ImportError, AttributeError):
            return
        FUNCTIONS["torch_varlen"] = functools.partial(varlen_attention, function)


@constant_in_graphs
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


def pack_keys(key_mask: Tensor, dtype: torch.dtype, head_width: int, backend: str | None = None) -> Tensor | Packing:
    """The packing of a key mask (B, L) where a variable-length function will run, otherwise the mask itself.

    Made once per evaluation and given to `qk_norm_pack` and `joint_attention` of every block. dtype, head_width: of the
    queries, and their features per head.
    """
    name = candidates(key_mask.device, dtype, head_width, True)[0]
    return key_mask if name == "sdpa" or not use_triton(backend, key_mask) else Packing.of(key_mask)


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | Packing | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over the joint sequence with scale 1/√Dh: (B, Q, H, Dh) like q.

    q (B, Q, H, Dh), usually with Q = L; k, v (B, L, H, Dh); key_mask (B, L) bool, True where keys are attended to, or
    its `Packing`, if k and v are packed and Q = L. Queries at masked positions are computed too. The result for a
    sample without any attended key is undefined, as are the gradients of packed keys that are not attended to.
    """
    check(q.ndim == 4, "q", f"must be (B, L, H, Dh), got {tuple(q.shape)}")
    check_shape("k", k, (q.shape[0], *k.shape[1:2], *q.shape[2:]))
    check_shape("v", v, k.shape)
    check_floating(q=q, k=k, v=v)
    check_key_mask(q, k, v, key_mask)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not use_triton(backend, q):
        if is_reference(backend) and is_narrow(k, key_mask):
            return narrow_attention(q, k, v)
        if is_short(k, key_mask) and not is_reference(backend):
            return short_attention(q, k, v)
        return reference.joint_attention(q, k, v, key_mask)
    name = candidates(q.device, q.dtype, q.shape[-1], key_mask is not None)[0]
    return FUNCTIONS[name](q, k, v, key_mask)


def check_key_mask(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | Packing | None) -> None:
    mask = key_mask.rows if isinstance(key_mask, Packing) else key_mask
    check_device(q.device, k=k, v=v, key_mask=mask)
    check_shape("key_mask", mask, k.shape[:2])
    if isinstance(key_mask, Packing):
        check(q.shape == k.shape, "q", f"must have the shape of packed keys, {tuple(k.shape)}, got {tuple(q.shape)}")
    elif key_mask is not None:
        check(key_mask.dtype == torch.bool, "key_mask", f"must be bool, got {key_mask.dtype}")
