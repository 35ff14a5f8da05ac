"""Training with matrix products in 8-bit floating point (fp8), by torchao.

The attention and feed-forward layers of the blocks (`qkv`, `out`, `ff`) are converted if their dimensions K and N are
multiples of 16 and K·N/(K + N) is at least `MIN_SIZE`: in a product of M rows, M·K·N operations become cheaper, but
about M·(K + N) numbers have to be scaled and cast, so small layers gain nothing. Embedders, time conditioning and heads
are not converted. Inputs, weights and gradients are scaled dynamically with one scale per tensor (torchao's recipe
"tensorwise", its fastest).

Parameters keep their names and types, so checkpoints are the same as without fp8 and can be read without torchao.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import nn

from .layers import StreamBlock

MIN_SIZE = 512  # of K·N/(K + N); the official network: qkv 614, out 341, ff 819
MULTIPLE = 16  # the hardware needs every dimension of a product to be a multiple of this
MIN_CAPABILITY = (8, 9)  # compute capability of the GPU
EMULATE = "ANYSTATE_EMULATE_FP8"  # environment variable: 1 emulates the rounding on other devices, slowly; for tests


def convert(net: nn.Module, device: torch.device, samples: int) -> list[str]:
    """Convert the large layers of a network in place, before it is compiled or sharded; returns their names.

    Args:
        samples: number of samples per forward pass; the gradient of a weight is a product over all their positions.

    Raises:
        ValueError: the device has no fp8, torchao is missing, or the shapes are unsuitable.
    """
    check(device)
    if samples % MULTIPLE:
        raise ValueError(
            f"train.precision=fp8 needs a multiple of {MULTIPLE} samples per forward pass, got {samples}: that is "
            "train.batch divided by the number of ranks and by train.gradient_accumulation_steps"
        )
    names = list(_large_layers(net))
    if not names:
        raise ValueError(
            f"train.precision=fp8 has no layer to convert: none reaches K·N/(K + N) = {MIN_SIZE}; "
            "set train.precision=bf16"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ValueError("train.precision=fp8 needs torchao: pip install 'anystate[fp8]'") from None
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=_emulated())
    convert_to_float8_training(net, module_filter_fn=lambda _, name: name in names, config=config)
    return names


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


def _emulated() -> bool:
    return os.environ.get(EMULATE) == "1"


def _large_layers(net: nn.Module) -> Iterator[str]:
    """The names of the layers to convert."""
    for prefix, block in net.named_modules():
        if not isinstance(block, StreamBlock):
            continue
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and name != "modulation":
                n, k = layer.weight.shape
                if n % MULTIPLE == k % MULTIPLE == 0 and k * n >= MIN_SIZE * (k + n):
                    yield f"{prefix}.{name}"
