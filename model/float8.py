"""Training with matrix products in 8-bit floating point (fp8, e4m3: 3 bits of mantissa, values to 448).

The attention and feed-forward layers of the blocks (`qkv`, `out`, `ff`) are converted if their dimensions K and N are
multiples of 16 and K·N/(K + N) is at least `MIN_SIZE`: in a product of M rows, M·K·N operations become cheaper, but
about M·(K + N) numbers have to be scaled and cast, so small layers gain nothing. Embedders, time conditioning and heads
are not converted.

Of the three products of a layer, with input x (M, K), weight W (N, K) and upstream gradient g (M, N),

    y = x Wᵀ and the gradient g W of x are products in fp8: every row of both factors has a scale of its own,
    the gradient gᵀ x of W is a product in bfloat16.

A scale is a power of two, so that scaling is exact and the forward and the backward pass round a weight alike, but for
numbers far below the largest one of their row. In the gradient of W the scaled rows would run along M: both factors
would have to be read two more times, and transposed. It is also the product in which rounding hurts most.

What makes x, a norm or GELU, has its forward pass compiled together with the cast (`compiled_forward` of
`kernels.gated_adaln` and `kernels.bias_gelu`): the numbers are still in registers. Besides products and attention, a
joint block of the official network moves 14.9 GB for 256 samples (`anystate bench counts`; 16.0 with casts apart), 12.2
in bfloat16. Counted likewise for torchao 0.18: 19.9 with a scale per tensor, 22.1 with rows in all three products
(`rowwise`), 18.8 with this recipe (`rowwise_with_gw_hp`).

Parameters keep their names and types, so checkpoints are the same as without fp8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .layers import StreamBlock
from .residual import matmul_dtype

MIN_SIZE = 512  # of K·N/(K + N); the official network: qkv 614, out 341, ff 819
MULTIPLE = 16  # the hardware needs K and N to be multiples of this
MIN_CAPABILITY = (8, 9)  # compute capability of the GPU
EMULATE = "ANYSTATE_EMULATE_FP8"  # environment variable: 1 emulates the rounding on other devices, slowly; for tests

FP8 = torch.float8_e4m3fn
MAX = torch.finfo(FP8).max
TINY = 2.0**-110  # rows of smaller numbers are rounded more coarsely; the inverse of a scale stays finite
MANTISSA, EXPONENT = 0x007FFFFF, 0x7F800000  # bits of a float32


def convert(net: nn.Module, device: torch.device) -> list[str]:
    """Convert the large layers of a network in place, before it is compiled or sharded; returns their names.

    Raises:
        ValueError: the device has no fp8, or no layer is suitable.
    """
    check(device)
    layers = dict(_large_layers(net))
    if not layers:
        raise ValueError(
            f"train.precision=fp8 has no layer to convert: none has multiples of {MULTIPLE} as dimensions and "
            f"reaches K·N/(K + N) = {MIN_SIZE}; set train.precision=bf16"
        )
    for name, layer in layers.items():
        net.set_submodule(name, Float8Linear(layer))
    return list(layers)


def check(device: torch.device) -> None:
    """Raise ValueError unless the device computes in fp8 or emulation is on."""
    if _emulated():
        return
    if device.type != "cuda":
        raise ValueError(f"train.precision=fp8 needs a GPU, not {device.type}; set train.precision=bf16")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        needed, found = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
        raise ValueError(
            f"train.precision=fp8 needs compute capability {needed} (Ada, Hopper or later), not {found}; "
            "set train.precision=bf16"
        )


class Float8Linear(nn.Module):
    """A linear layer with the parameters of another one, multiplied in fp8."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias, self.emulate = layer.weight, layer.bias, _emulated()

    def product(self, x: Tensor) -> Tensor:
        """x · Wᵀ, without the bias."""
        return _Product.apply(x.to(matmul_dtype(self)), self.weight, self.emulate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x (…, K) · Wᵀ of a weight (N, K)."""

    @staticmethod
    def forward(ctx, x, weight, emulate):
        ctx.save_for_backward(x, weight)
        ctx.emulate = emulate
        y = scaled_product(fp8_rows(x.flatten(0, -2)), fp8_rows(weight), x.dtype, emulate, fast=True)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, grad_x, grad_weight = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            grad_x = scaled_product(fp8_rows(grad), fp8_rows(weight.t()), x.dtype, ctx.emulate).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ x.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight, None


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) as v·s with v (M, K) in fp8 and s (M, 1) float32, the smallest powers of two that keep |v| ≤ 448."""
    largest = x.abs().amax(1, keepdim=True).float().clamp(min=TINY)
    scale = (((largest / MAX).view(torch.int32) + MANTISSA) & EXPONENT).view(torch.float32)
    return (x.float() * (1.0 / scale)).to(FP8).contiguous(), scale


def scaled_product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, emulate: bool, fast: bool = False
) -> Tensor:
    """a · bᵀ of (M, K) and (N, K), both from `fp8_rows`. fast: sums are kept with fewer bits than float32 has."""
    (values_a, scale_a), (values_b, scale_b) = a, b
    if emulate:  # autocast would round the sums too
        with torch.autocast(values_a.device.type, enabled=False):
            return ((values_a.float() @ values_b.float().t()) * scale_a * scale_b.t()).to(dtype)
    return torch._scaled_mm(
        values_a, values_b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=dtype, use_fast_accum=fast
    )


def _emulated() -> bool:
    return os.environ.get(EMULATE) == "1"


def _large_layers(net: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers to convert, with their names."""
    for prefix, block in net.named_modules():
        if not isinstance(block, StreamBlock):
            continue
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and name != "modulation":
                n, k = layer.weight.shape
                if n % MULTIPLE == k % MULTIPLE == 0 and k * n >= MIN_SIZE * (k + n):
                    yield f"{prefix}.{name}", layer
