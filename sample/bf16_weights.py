"""bfloat16 weights of linear layers while a network samples.

Autocast casts the weights of every matrix product in every evaluation: 6 bytes a weight. Here they are cast once a
sampling. Everything else keeps the precision that it has under autocast: embeddings, norms, and the biases that heads
of tokens hand on with their weights, which kernels add in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..model.layers import TokenHead


class Bf16Weights:
    """bfloat16 copies of the float32 weights and biases of a network's linear layers, at fixed addresses."""

    def __init__(self, net: nn.Module):
        lazy = {id(module.linear) for module in net.modules() if isinstance(module, TokenHead)}
        self.copies = []  # (the parameters of a layer, the name of one, its copy)
        for layer in net.modules():
            if type(layer) is not nn.Linear:  # layers that derive from it may use their weights in other ways
                continue
            for name in ("weight",) if id(layer) in lazy else ("weight", "bias"):
                p = layer._parameters[name]
                if p is not None and p.dtype == torch.float32:
                    copy = nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16), requires_grad=False)
                    self.copies.append((layer._parameters, name, copy))

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let the network use the copies, with the values that its weights have now.

        The layers stay the same objects, and so does their compiled code, which is compiled for bfloat16 weights once.
        """
        originals = [(parameters, name, parameters[name]) for parameters, name, _ in self.copies]
        try:
            with torch.no_grad():
                for parameters, name, copy in self.copies:
                    copy.copy_(parameters[name])
                    parameters[name] = copy
            yield
        finally:
            for parameters, name, original in originals:
                parameters[name] = original
