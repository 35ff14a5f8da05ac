"""Matrix products in 8-bit floating point while training, through torchao.

Converted are the attention and feed-forward layers of the blocks (`qkv`, `out`, `ff`) whose dimensions K and N are
multiples of 16 and for which K·N/(K + N) reaches `LEAST`: of a product of M rows, M·K·N operations get cheaper while
about M·(K + N) numbers have to be scaled and cast, so narrow layers gain nothing. Embedders, time conditioning and
heads stay as they are. Inputs, weights and gradients get one scale per tensor, anew in each product: the fastest of
torchao's recipes.

Parameters and their names stay, so checkpoints do not tell, and need no torchao to be read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import nn

from .layers import StreamBlock

LEAST = 512  # of K·N/(K + N); the official network: qkv 614, out 341, ff 819
MULTIPLE = 16  # what the hardware asks of every dimension of a product
NEEDED = (8, 9)  # compute capability of a GPU
EMULATE = "ANYSTATE_EMULATE_FP8"  # environment variable: 1 rounds the same way without such a GPU, slowly; for tests


def convert(net: nn.Module, device: torch.device, samples: int) -> list[str]:
    """Convert a network's large layers in place, before it is compiled or sharded; returns their names.

    samples: how many the network gets at a time; a weight's gradient is a product over all their positions.

    Raises:
        ValueError: the device has no fp8, torchao is missing, or the shapes do not suit.
    """
    check(device)
    if samples % MULTIPLE:
        parts = "train.batch over ranks and train.gradient_accumulation_steps"
        raise ValueError(f"train.precision=fp8 needs multiples of {MULTIPLE} samples at a time, got {samples}: {parts}")
    names = list(_large(net))
    if not names:
        raise ValueError(
            f"train.precision=fp8 has nothing to convert: no layer reaches K·N/(K + N) = {LEAST}; "
            "set train.precision=bf16"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ValueError("train.precision=fp8 needs torchao: pip install 'anystate[fp8]'") from None
    emulates = os.environ.get(EMULATE) == "1"
    recipe = dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=emulates)
    convert_to_float8_training(net, module_filter_fn=lambda _, name: name in names, config=recipe)
    return names


def check(device: torch.device) -> None:
    """Raise ValueError unless the device computes in fp8, or emulates it."""
    if os.environ.get(EMULATE) != "1" and (reason := _lacks(device)):
        raise ValueError(f"train.precision=fp8 needs {reason}; set train.precision=bf16")


def _lacks(device: torch.device) -> str | None:
    """What a device would have to be, or None where it computes in fp8."""
    if device.type != "cuda":
        return f"a GPU, not {device.type}"
    has = torch.cuda.get_device_capability(device)
    return (
        None
        if has >= NEEDED
        else f"compute capability {NEEDED[0]}.{NEEDED[1]} (Ada, Hopper or later), not {has[0]}.{has[1]}"
    )


def _large(net: nn.Module) -> Iterator[str]:
    for prefix, block in net.named_modules():
        if not isinstance(block, StreamBlock):
            continue
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and name != "modulation":
                n, k = layer.weight.shape
                if n % MULTIPLE == k % MULTIPLE == 0 and k * n >= LEAST * (k + n):
                    yield f"{prefix}.{name}"
