"""Memory traffic and matrix products of the cross-entropy of a linear head, forward and backward, by several ways.

Every way runs on tensors without memory, and each of its operations is counted: an operation reads its inputs and
writes its outputs once; a product reads its operands once. Ours are the launchers themselves, with their slices and
kernels as on a GPU; the others are written down here from their sources:

- before: this package up to commit e9bb234: slices of at most 128 MB, sums of gradients outside the products;
- plain: PyTorch, with all logits in memory;
- liger: linkedin/Liger-Kernel, src/liger_kernel/ops/fused_linear_cross_entropy.py: parts of the rows, gradients in the
  forward pass;
- cce: apple/ml-cross-entropy, cut_cross_entropy/cce_lse_forward.py and cce_backward.py, without its filter, which skips
  small gradients: logits stay on the chip and are computed twice; each tile of 128 × 128 adds to the gradients under
  locks. Counted are the additions that leave the L2 cache: it groups the tiles by eight blocks of rows, so that
  gradients of hidden states are written once and those of the weight once a group.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.backend import INTERPRETED, triton
from .kernel_cases import plain_cross_entropy
from .kernel_floors import nbytes

# imported by path, because attributes of the package with these names are operations
recomputed, at_once = (
    importlib.import_module(f"...kernels.{name}", __package__)
    for name in ("linear_cross_entropy", "linear_cross_entropy_sum")
)

ROWS, WIDTH, STATES = 30720, 1024, 49408  # of the official text+image network, with a batch of 256
NO_WORK = ("empty", "new_empty", "empty_like", "empty_strided", "detach")
FILLS = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "ones", "ones_like")
GATHERS = ("nll_loss_forward", "nll_loss_backward")  # read one element of each row
PASSES = {"_fold_kernel": 1, "_gradient_kernel": 2}  # times that a kernel reads or writes its logits
Head = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, weight, bias, target


class Count(TorchDispatchMode):
    """Counts bytes read and written, and FLOPs of products, of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.product(*args, beta=(kwargs or {}).get("beta", 1.0))
        elif name not in NO_WORK and not function.is_view:
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
            self.bytes += nbytes(out) + (0 if name in FILLS + GATHERS else nbytes(tensors))
        return out

    def product(self, *operands: Tensor, beta: float = 1.0) -> None:
        """Add a · b, or beta · sum + a · b."""
        *added, a, b = operands
        self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        written = a.shape[0] * b.shape[1] * (added[0] if added else a).element_size()
        self.bytes += nbytes(a, b) + written + (nbytes(added) if beta else 0)

    def launch(self, kernel, *args, grid, warmup, **kwargs) -> None:
        """Add a launch of a kernel of the cross-entropy."""
        logits = kwargs["rows"] * kwargs["width"] * kwargs["p_logits"].element_size()
        others = [x for name, x in kwargs.items() if isinstance(x, Tensor) and name != "p_logits"]
        self.bytes += PASSES[kernel.fn.__name__] * logits + nbytes(others)


class AsOnCuda(TorchFunctionMode):
    """Lets tensors without memory take the branches of CUDA tensors. Products with a float32 result are only counted,
    because PyTorch cannot run them there."""

    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == Tensor.is_cuda.__get__:
            return True
        if function is torch.addmm and "out_dtype" in kwargs:
            self.count.product(*args, beta=kwargs.get("beta", 1.0))
            return kwargs["out"]
        if function is torch.mm and "out_dtype" in kwargs:
            self.count.product(*args)
            self.count.bytes += args[0].shape[0] * args[1].shape[1] * (4 - args[0].element_size())
            return args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=kwargs["out_dtype"])
        return function(*args, **kwargs)


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Count the operations and kernel launches on meta tensors inside; not in Triton's interpreter, which runs them."""
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET: unset it to count the launches of kernels")
    count, run = Count(), triton.JITFunction.run
    triton.JITFunction.run = lambda kernel, *args, **kwargs: count.launch(kernel, *args, **kwargs)
    try:
        with AsOnCuda(count), count:
            yield count
    finally:
        triton.JITFunction.run = run


def head(rows: int, width: int, states: int) -> Head:
    """Hidden states, weight, bias and targets without memory."""
    hidden, weight, bias = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((rows, width), (states, width), (states,))
    )
    return hidden, weight, bias, torch.empty(rows, dtype=torch.int64, device="meta")


# Ways: forward and backward pass, with the gradients of hidden states, weight and bias


def recompute(count: Count, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    losses, lse = recomputed.launch_forward(hidden, weight, bias, target, 0.0)
    recomputed.launch_backward(losses, hidden, weight, bias, target, lse, 0.0, [True] * 3)


def in_forward(count: Count, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    row_weight = torch.empty(len(hidden), device="meta")
    total, _, *grads = at_once.launch(hidden, weight, bias, target, row_weight, 0.0, hidden.dtype, [True] * 3)
    at_once.scale(grads, total, [x.dtype for x in (hidden, weight, bias)])


def before(count: Count, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    step = max(128, 2**27 // (len(hidden) * hidden.element_size()) // 128 * 128)
    grad_hidden, grad_weight = torch.zeros(hidden.shape, device="meta"), torch.empty_like(weight)
    for backward in (False, True):
        for first in range(0, len(weight), step):
            states = weight[first : first + step]
            logits = torch.addmm(bias[first : first + step], hidden, states.t())
            count.bytes += nbytes(logits) * (2 if backward else 1)
            if backward:
                grad_hidden += torch.mm(logits, states, out_dtype=torch.float32)
                torch.mm(logits.t(), hidden, out=grad_weight[first : first + step])
                logits.sum(0, dtype=torch.float32)
    grad_hidden.to(hidden.dtype)


def plain(count: Count, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    torch.autograd.grad(plain_cross_entropy(hidden, weight, bias, target).sum(), leaves)


def liger(count: Count, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    rows, width = hidden.shape
    step = triton.next_power_of_2(triton.cdiv(rows, triton.cdiv(len(weight), width)))
    grad_hidden, grad_weight, grad_bias = (torch.zeros_like(x) for x in (hidden, weight, bias))
    for first in range(0, rows, step):
        part = hidden[first : first + step]
        logits = torch.mm(part, weight.t())
        logits.add_(bias)
        count.bytes += 3 * nbytes(logits)  # its kernel reads them twice and writes the gradient
        torch.mm(logits, weight, out=grad_hidden[first : first + step])
        torch.addmm(grad_weight, logits.t(), part, out=grad_weight)
        torch.add(grad_bias, logits.sum(0), out=grad_bias)
    for grad in (grad_hidden, grad_weight, grad_bias):
        grad.mul_(2.0)  # by the upstream gradient


def cce(count: Count, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    rows, width = hidden.shape
    groups = triton.cdiv(rows, 8 * 128)
    count.flops += 4 * 2 * rows * width * len(weight)
    count.bytes += 2 * nbytes(hidden, weight)  # logits, in both passes
    count.bytes += 2 * nbytes(hidden) + 2 * groups * nbytes(weight)  # additions


WAYS: dict[str, Callable[..., None]] = {
    "ours before": before,
    "ours, logits computed again": recompute,
    "ours, gradients in the forward pass": in_forward,
    "plain": plain,
    "liger": liger,
    "cce": cce,
}


def count_rows(rows: int = ROWS, width: int = WIDTH, states: int = STATES) -> list[dict[str, str | float]]:
    """Memory traffic in GB, and products of 2 · rows · width · states FLOPs, of every way."""
    found: list[dict[str, str | float]] = []
    for name, way in WAYS.items():
        inputs = head(rows, width, states)
        with counted() as count:
            way(count, *inputs)
        products = count.flops / (2 * rows * width * states)
        found.append({"name": f"cross-entropy, {name}: memory traffic", "value": count.bytes / 1e9, "unit": "GB"})
        found.append({"name": f"cross-entropy, {name}: products", "value": products, "unit": "products"})
    return found
