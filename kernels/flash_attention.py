"""The installed flash-attn as functions for `attention.joint_attention`.

Flash-attn 4 (`flash_attn.cute`) compiles its kernels just in time, and not every flash-attn 3 (`flash_attn_interface`)
tells PyTorch the shapes of its results, so torch.compile cannot trace them. They are therefore called as operations of
our own: the forward pass returns the result and the log-sum-exp of the scores, and the backward pass calls the
library's backward function. These are private functions of the library, whose arguments differ between versions:
arguments are given by name, those that a version requires besides are None. Where a version has other functions, the
public ones are called, and the backward pass runs the forward pass again.

Flash-attn 2 (`flash_attn`) registers operations itself and is called as it is.

Every function here takes (q, k, v), (B, L, H, Dh) each, or (q, k, v, cu_q, cu_k, max_q, max_k) with rows (ΣL, H, Dh),
cumulative lengths and largest lengths.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import custom_op

# (module, compute capabilities from … to below …, whether torch.compile can trace it), in order of preference
MODULES = (
    ("flash_attn.cute", (9, 0), (12, 0), False),
    ("flash_attn_interface", (9, 0), (10, 0), False),
    ("flash_attn", (8, 0), (99, 0), True),
)
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")  # arguments of variable-length functions
FORWARD = {"q", "k", "v", *LENGTHS[:2]}  # arguments that a forward or backward function must have
BACKWARD = {*FORWARD, "out", "dout"}


class Functions(NamedTuple):
    """Attention of a batch, and of packed sequences."""

    fixed: Callable
    varlen: Callable


def installed(capability: tuple[int, int]) -> Functions | None:
    """The preferred flash-attn that is installed and runs on this GPU."""
    for name, lowest, end, traceable in MODULES:
        if lowest <= capability < end:
            try:
                module = importlib.import_module(name)
                fixed, varlen = module.flash_attn_func, flash_varlen(module.flash_attn_varlen_func)
            except (ImportError, AttributeError):
                continue
            if traceable:
                return Functions(fixed, varlen)
            function = as_operation(name.replace(".", "_"), *(private(module) or public(fixed, varlen)))
            return Functions(function, function)
    return None


def first_output(result: Tensor | tuple) -> Tensor:
    """The attention's result; some versions return the log-sum-exps as well."""
    return result[0] if isinstance(result, tuple) else result


# Arguments by name


def parameters(function: Callable) -> Iterator[tuple[str, bool]]:
    """(name, whether it has a default) of the arguments of a Python function or an operation of torch.library."""
    if isinstance(function, torch.library.CustomOpDef):
        for argument in function._opoverload._schema.arguments:
            yield argument.name, argument.has_default_value()
    else:
        for parameter in inspect.signature(function).parameters.values():
            yield parameter.name, parameter.default is not parameter.empty


def by_name(function: Callable) -> Callable:
    """The function with those of the given named arguments that it takes; None for others without a default."""
    known = dict(parameters(function))

    def call(**values):
        missing = {name: None for name, has_default in known.items() if not has_default}
        return function(**missing | {name: value for name, value in values.items() if name in known})

    return call


def flash_varlen(function: Callable) -> Callable:
    """flash-attn's public variable-length function with positional lengths; not all versions take all of LENGTHS."""
    known = {name for name, _ in parameters(function)}
    return functools.partial(call_varlen, function, tuple(name for name in LENGTHS if name in known))


def call_varlen(function: Callable, names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor | int):
    given = dict(zip(LENGTHS, lengths, strict=True))
    return function(q, k, v, **{name: given[name] for name in names})


# Forward: (q, k, v, cu_q, cu_k, max_q, max_k) → result, log-sum-exp. Backward: (grad, result, log-sum-exp, and these) →
# gradients of q, k, v. cu_q and cu_k are None for a batch.


def private(module: ModuleType) -> tuple[Callable, Callable] | None:
    """Forward and backward by the library's own functions, if it has those that are known here."""
    for home in filter(None, (module, inspect.getmodule(module.flash_attn_func))):
        for suffixes, needed in ((("fwd", "bwd"), {"return_lse"}), (("forward", "backward"), set())):
            names = [f"_flash_attn_{suffix}" for suffix in suffixes]
            functions = [vars(home)[name] for name in names if name in vars(home)]
            if len(functions) == 2:
                forward, backward = (dict(parameters(function)) for function in functions)
                if forward.keys() >= FORWARD | needed and backward.keys() >= BACKWARD:
                    return run_forward(by_name(functions[0])), run_backward(by_name(functions[1]), "dq" in backward)
    return None


def run_forward(function: Callable) -> Callable:
    def forward(q, k, v, *lengths):
        about = {"softmax_scale": q.shape[-1] ** -0.5, "causal": False, "return_lse": True}
        return function(q=q, k=k, v=v, **lengths_by_name(*lengths), **about)[:2]

    return forward


def run_backward(function: Callable, takes_buffers: bool) -> Callable:
    """Some versions return the gradients, others write them into dq, dk and dv."""

    def backward(grad, out, lse, q, k, v, *lengths):
        into = {f"d{name}": torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))} if takes_buffers else {}
        about = {"softmax_scale": q.shape[-1] ** -0.5, "causal": False, "is_causal": False}
        values = {"q": q, "k": k, "v": v, "out": out, "dout": grad, "lse": lse, "softmax_lse": lse}
        result = function(**values, **about, **into, **lengths_by_name(*lengths))
        return tuple(into.values()) if takes_buffers else result[:3]

    return backward


def lengths_by_name(cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int) -> dict[str, object]:
    return {} if cu_q is None else dict(zip(LENGTHS, (cu_q, cu_k, max_q, max_k), strict=True))


def public(fixed: Callable, varlen: Callable) -> tuple[Callable, Callable]:
    """Forward and backward by the public functions, which save their tensors in an autograd graph."""

    def attend(q, k, v, cu_q, *others) -> Tensor:
        return first_output(fixed(q, k, v) if cu_q is None else varlen(q, k, v, cu_q, *others))

    def forward(q, k, v, cu_q, *others):
        return attend(q, k, v, cu_q, *others), q.new_empty(lse_shape(q, cu_q), dtype=torch.float32)

    def backward(grad, out, lse, q, k, v, *lengths):
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            out = attend(q, k, v, *lengths)
        return torch.autograd.grad(out, (q, k, v), grad)

    return forward, backward


def lse_shape(q: Tensor, cu_q: Tensor | None) -> tuple[int, ...]:
    """(B, H, L), of packed sequences (H, ΣL)."""
    return (q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0])


def as_operation(name: str, forward: Callable, backward: Callable) -> Callable:
    """The function of a batch or of packed sequences that calls a forward and a backward as anystate::`name`."""

    def launch(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, cu_q, cu_k, max_q, max_k)
        return out.contiguous(), lse.contiguous()

    def launch_backward(
        grad: Tensor,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = backward(grad.contiguous(), out, lse, q, k, v, cu_q, cu_k, max_q, max_k)
        return tuple(x.contiguous() for x in grads)

    operation, operation_backward = custom_op(name, launch), custom_op(f"{name}_backward", launch_backward)

    @operation.register_fake
    def _(q, k, v, cu_q, *others):
        return q.new_empty(q.shape), q.new_empty(lse_shape(q, cu_q), dtype=torch.float32)

    @operation_backward.register_fake
    def _(grad, out, lse, q, k, v, *lengths):
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def setup(ctx, inputs, output):
        *tensors, ctx.max_q, ctx.max_k = inputs
        ctx.save_for_backward(*output, *tensors)

    def gradients(ctx, grad, grad_lse):
        return *operation_backward(grad, *ctx.saved_tensors, ctx.max_q, ctx.max_k), None, None, None, None

    operation.register_autograd(gradients, setup_context=setup)

    def attend(q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor | int) -> Tensor:
        return operation(q, k, v, *(lengths or (None, None, 0, 0)))[0]

    return attend
