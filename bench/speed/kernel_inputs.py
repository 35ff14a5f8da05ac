"""Inputs of every operation at three sizes, for measuring and verifying the kernels.

`tiny` is for Triton's interpreter, `small` for a laptop; `official` has the shapes of the official text+image network.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...kernels import Draw, Packing, Rng

Arguments = dict[str, Any]  # keyword arguments of an operation


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes: `batch` samples in training, `sampled` in sampling, `rows` positions in the cross-entropy."""

    batch: int
    sampled: int
    latent: tuple[int, int, int]
    patches: int
    length: int
    states: int
    width: int
    heads: int
    head_width: int
    rows: int


SIZES = {
    "tiny": Size(2, 2, (2, 5, 5), 4, 6, 70, 24, 2, 8, 9),
    "small": Size(8, 4, (4, 16, 16), 64, 32, 1000, 128, 4, 32, 256),
    "official": Size(256, 64, (4, 32, 32), 256, 120, 49408, 1024, 8, 64, 30720),
}
STEPS = 50  # of a trajectory


class Inputs:
    """Creates tensors from a fixed seed on one device; `dtype` is that of the network."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype):
        self.size, self.device, self.dtype = size, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return x.to(dtype or self.dtype)

    def tokens(self, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, self.size.states, shape, generator=self.generator, device=self.device)

    def half_masked(self) -> Tensor:
        """(sampled, length) tokens, half of them masked, as at t = ½."""
        tokens = self.tokens(self.size.sampled, self.size.length)
        tokens[torch.rand(tokens.shape, generator=self.generator, device=self.device) < 0.5] = self.size.states
        return tokens

    def keys(self, n: int) -> Tensor:
        return Rng.for_batch(0, n, device=self.device).keys("bench", Draw.STEP)

    def per_sample(self, n: int, value: float) -> Tensor:
        return torch.full((n,), value, device=self.device, dtype=torch.float64)


# Inputs of one operation each, as keyword arguments


def gaussian(i: Inputs) -> Arguments:
    x = i.normal(i.size.batch, *i.size.latent, dtype=torch.float32)
    rows = i.per_sample(i.size.batch, 0.6)
    return {"x": x, "alpha": rows, "sigma": rows, "keys": i.keys(i.size.batch)}


def mask(i: Inputs) -> Arguments:
    n = i.size.batch
    return {
        "tokens": i.tokens(n, i.size.length),
        "prob": i.per_sample(n, 0.5),
        "keys": i.keys(n),
        "mask_id": i.size.states,
    }


def uniform(i: Inputs) -> Arguments:
    n = i.size.batch
    return {
        "tokens": i.tokens(n, i.size.length),
        "prob": i.per_sample(n, 0.5),
        "keys": i.keys(n),
        "states": i.size.states,
    }


def eps(i: Inputs) -> Arguments:
    return {"eps": i.normal(i.size.batch, *i.size.latent), "keys": i.keys(i.size.batch)}


def step(i: Inputs) -> Arguments:
    """A guided step of a float32 state; eps and uncond in the dtype of the network."""
    n = i.size.sampled
    return {
        "x": i.normal(n, *i.size.latent, dtype=torch.float32),
        "eps": i.normal(n, *i.size.latent),
        "uncond": i.normal(n, *i.size.latent),
        "guidance": i.per_sample(n, 3.0),
        "beta": i.per_sample(n, 1.5),
        "sigma": i.per_sample(n, 0.8),
        "dt": i.per_sample(n, -0.02),
    }


def correct(i: Inputs) -> Arguments:
    arguments = step(i)
    return arguments | {"x_hat": arguments["x"] + 0.1}


def sde(i: Inputs) -> Arguments:
    return step(i) | {"keys": i.keys(i.size.sampled)}


def dpmpp(i: Inputs) -> Arguments:
    arguments, n = step(i), i.size.sampled
    return {
        "x": arguments["x"],
        "eps": arguments["eps"],
        "uncond": arguments["uncond"],
        "guidance": arguments["guidance"],
        "x0_prev": arguments["x"],
        "alpha": i.per_sample(n, 0.7),
        "sigma": i.per_sample(n, 0.7),
        "decay": i.per_sample(n, 0.9),
        "gain": i.per_sample(n, 0.1),
        "mix": i.per_sample(n, 0.5),
    }


def leap(i: Inputs) -> Arguments:
    n, length, states = i.size.sampled, i.size.length, i.size.states
    return {
        "logits": i.normal(n, length, states),
        "tokens": i.half_masked(),
        "rate": i.per_sample(n, 2.0 / STEPS),
        "keys": i.keys(n),
        "states": states,
    }


def leap_all_steps(i: Inputs) -> Arguments:
    arguments = leap(i)
    return arguments | {"tokens": torch.full_like(arguments["tokens"], i.size.states)}


def leap_guided(i: Inputs) -> Arguments:
    arguments = leap(i)
    uncond = i.normal(*arguments["logits"].shape)
    return arguments | {"uncond": uncond, "guidance": i.per_sample(i.size.sampled, 2.0)}


def leap_uniform(i: Inputs) -> Arguments:
    n, length = i.size.sampled, i.size.length
    rate = i.per_sample(n, 1.0 / (STEPS * i.size.states))
    return {
        "logits": i.normal(n, length, i.size.states),
        "tokens": i.tokens(n, length),
        "rate": rate,
        "odds": i.per_sample(n, float(i.size.states)),
        "keys": i.keys(n),
    }


def leap_linear(i: Inputs) -> Arguments:
    n, length, states, width = i.size.sampled, i.size.length, i.size.states, i.size.width
    return {
        "hidden": i.normal(n, length, width),
        "weight": i.normal(states, width) * width**-0.5,
        "bias": i.normal(states),
        "tokens": i.half_masked(),
        "rate": i.per_sample(n, 2.0 / STEPS),
        "keys": i.keys(n),
        "states": states,
    }


def cross_entropy(i: Inputs) -> Arguments:
    rows, states, width = i.size.rows, i.size.states, i.size.width
    weight = i.normal(states, width) * width**-0.5
    return {
        "hidden": i.normal(rows, width),
        "weight": weight,
        "bias": i.normal(states),
        "target": i.tokens(rows, low=-1),
    }


def cross_entropy_sum(i: Inputs) -> Arguments:
    """With weights of the rows as those of a mean over the batch, 1 to 2 times its share."""
    weight = 1.0 + torch.rand(i.size.rows, generator=i.generator, device=i.device)
    return cross_entropy(i) | {"row_weight": weight / i.size.rows}


def adaln(i: Inputs, stream: torch.dtype | None = None) -> Arguments:
    n, width = i.size.batch, i.size.width
    x = i.normal(n, i.size.patches, width, dtype=stream)
    return {"x": x, "scale": i.normal(n, width), "shift": i.normal(n, width)}


def gate(i: Inputs, stream: torch.dtype | None = None) -> Arguments:
    shape = i.size.batch, i.size.patches, i.size.width
    x, branch = i.normal(*shape, dtype=stream), i.normal(*shape)
    return {"x": x, "branch": branch, "gate": i.normal(i.size.batch, i.size.width)}


def gated_adaln(i: Inputs, stream: torch.dtype | None = None) -> Arguments:
    shape = i.size.batch, i.size.width
    return gate(i, stream) | {"scale": i.normal(*shape), "shift": i.normal(*shape)}


# As in training under autocast: float32 residual stream and parameters, bfloat16 branch and modulation


def adaln_fp32_stream(i: Inputs) -> Arguments:
    return adaln(i, torch.float32) | {"out_dtype": i.dtype}


def adaln_fp32_result(i: Inputs) -> Arguments:
    """As in the heads of tokens."""
    return adaln(i, torch.float32)


def gate_fp32_stream(i: Inputs) -> Arguments:
    return gate(i, torch.float32) | {"bias": i.normal(i.size.width, dtype=torch.float32)}


def gated_adaln_fp32_stream(i: Inputs) -> Arguments:
    """As inside a block, after the attention."""
    return gated_adaln(i, torch.float32) | {"out_dtype": i.dtype}


def gated_adaln_next_block(i: Inputs) -> Arguments:
    """As between blocks, after the feed-forward layer, whose bias is added here."""
    return gated_adaln_fp32_stream(i) | {"bias": i.normal(i.size.width, dtype=torch.float32)}


def gated_adaln_first_block(i: Inputs) -> Arguments:
    """As at the start of the first block."""
    return gated_adaln_fp32_stream(i) | {"branch": None, "gate": None}


def gelu(i: Inputs) -> Arguments:
    """As in the feed-forward layer of a block under autocast."""
    width = 4 * i.size.width
    return {"x": i.normal(i.size.batch, i.size.patches, width), "bias": i.normal(width, dtype=torch.float32)}


def pack(i: Inputs) -> Arguments:
    heads, width = i.size.heads, i.size.head_width
    qkv = [i.normal(i.size.batch, length, 3 * heads * width) for length in (i.size.patches, i.size.length)]
    gammas = [[i.normal(heads, width, dtype=torch.float32) for _ in qkv] for _ in range(2)]
    return {"qkv": qkv, "q_gamma": gammas[0], "k_gamma": gammas[1], "heads": heads}


def pack_keys(i: Inputs) -> Arguments:
    """With the packing of a key mask: a third of the text positions, which come last, are attended to."""
    return pack(i) | {"packing": Packing.of(padded(i))}


def padded(i: Inputs) -> Tensor:
    """A key mask of the joint sequence: a third of the text positions are attended to."""
    key_mask = torch.ones(i.size.batch, i.size.patches + i.size.length, dtype=torch.bool, device=i.device)
    key_mask[:, i.size.patches + i.size.length // 3 :] = False
    return key_mask


def attention(i: Inputs) -> Arguments:
    shape = (i.size.batch, i.size.patches + i.size.length, i.size.heads, i.size.head_width)
    return {"q": i.normal(*shape), "k": i.normal(*shape), "v": i.normal(*shape)}


def attention_padded(i: Inputs) -> Arguments:
    """With a key mask, which is packed in the call; a network packs it once per evaluation."""
    return attention(i) | {"key_mask": padded(i)}
