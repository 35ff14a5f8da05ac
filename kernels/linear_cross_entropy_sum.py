"""`linear_cross_entropy_sum`: the weighted sum of the cross-entropies of a linear head, gradients in the forward pass.

Where the weight of every row is known before its loss, the gradient of the sum is known up to the upstream gradient of
one number. The forward pass then computes logits, losses and gradients of one part of the rows after the other, with
all states of a part in a buffer of about CHUNK_BYTES, and keeps the gradients of hidden states, weight and bias, in
float32. The backward pass multiplies them by the upstream gradient. Unlike in `linear_cross_entropy` the logits are
computed once. The gradients of weight and bias are added up over the parts in a fixed order, so that results are
deterministic.

Floor: 6 N K D FLOPs forward, none backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import check_device, check_shape, custom_op, matmul_dtype, use_triton
from .linear_cross_entropy import check_head, linear_cross_entropy, row_losses
from .logit_slices import add_product, aligned, fold, gradient, multiple, slice_logits, spans
from .tiles import measured

CHUNK_BYTES = 2**29  # 4,096 rows of 49,408 states: the gradient of the weight is then added up eight times a batch


def row_parts(hidden: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    """(first, size) of each part of the rows."""
    chunk = measured("linear_cross_entropy_sum", hidden.shape[1], hidden.dtype).get("chunk_bytes", CHUNK_BYTES)
    return spans(len(hidden), multiple(chunk // (aligned(len(weight)) * hidden.element_size())))


def launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    z_loss: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum (), losses (N,), and the gradients of hidden, weight and bias, all in float32.

    dtype: that of the products. A gradient is empty where `needs` is False.
    """
    hidden, head = hidden.to(dtype), weight.to(dtype)
    offset = None if bias is None else bias.to(dtype)
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.empty(hidden.shape if needs_hidden else 0, device=hidden.device)
    grad_weight = torch.empty(weight.shape if needs_weight else 0, device=weight.device)
    grad_bias = torch.zeros(len(weight) if needs_bias else 0, device=weight.device)
    lse = torch.full_like(row_weight, -torch.inf)
    picked, parts = torch.zeros_like(lse), row_parts(hidden, head)
    buffer = hidden.new_empty(max(size for _, size in parts) * aligned(len(head)))
    for first, size in parts:
        rows = slice(first, first + size)
        logits = slice_logits(hidden[rows], head, offset, buffer)
        fold(logits, target[rows], lse[rows], picked[rows], 0)
        sums = gradient(logits, target[rows], lse[rows], row_weight[rows], 0, z_loss, needs_bias)
        if needs_hidden:
            add_product(grad_hidden[rows], logits, head, beta=0.0)
        if needs_weight:
            add_product(grad_weight, logits.t(), hidden[rows], beta=0.0 if first == 0 else 1.0)
        if sums is not None:
            grad_bias += sums
    losses = row_losses(lse, picked, target, z_loss)
    return (row_weight * losses).sum(), losses, grad_hidden, grad_weight, grad_bias


_sum = custom_op("linear_cross_entropy_sum", launch)


@_sum.register_fake
def _(hidden, weight, bias, target, row_weight, z_loss, dtype, needs):
    return (
        row_weight.new_empty(()),
        torch.empty_like(row_weight),
        hidden.new_empty(hidden.shape if needs[0] else 0, dtype=torch.float32),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=torch.float32),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=torch.float32),
    )


def scale(grads: Sequence[Tensor], factor: Tensor, dtypes: list[torch.dtype | None]) -> list[Tensor]:
    """The gradients times the upstream gradient, in the dtypes of their tensors."""
    pairs = zip(grads, dtypes, strict=True)
    return [torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype)) for grad, dtype in pairs]


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of the other outputs, which have none
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[2:])


def _autograd(ctx, grad, *_):
    grads = scale(ctx.saved_tensors, grad, ctx.dtypes)
    needs = ctx.needs_input_grad[:3]
    return *(value if needed else None for value, needed in zip(grads, needs, strict=True)), *[None] * 5


_sum.register_autograd(_autograd, setup_context=_setup)


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(Σ row_weight · losses, losses (N,)) of `linear_cross_entropy`, in float32; only the sum is differentiable.

    row_weight (N,) float32, which gets no gradient. The gradients of the others are computed together with the losses,
    in training only.
    """
    check_head(hidden, weight, bias, target)
    check_shape("row_weight", row_weight, hidden.shape[:1])
    check_device(hidden.device, row_weight=row_weight)
    row_weight = row_weight.detach().float()
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if not any(needs) or not use_triton(backend, hidden, hidden=hidden):
        losses = linear_cross_entropy(hidden, weight, bias, target, z_loss, backend)
        return (row_weight * losses).sum(), losses.detach()
    dtype = matmul_dtype(hidden=hidden, weight=weight, bias=bias)
    rows = target.contiguous(), row_weight.contiguous()
    total, losses, *_ = _sum(hidden.contiguous(), weight.contiguous(), bias, *rows, z_loss, dtype, needs)
    return total, losses.detach()
