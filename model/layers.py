"""The parts of a multimodal diffusion transformer: embedders, joint blocks, heads.

B samples, L positions of one stream, D its width, C its conditioning width, H heads of Dh features.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from ..kernels import LazyLogits, Packing
from ..kernels.backend import use_triton
from .residual import Residual, leading, matmul_dtype


class TimeEmbedding(nn.Module):
    """A scalar (B,) → (B, C): 256 sinusoids [cos, sin] of scale·value, periods up to 10000, then a two-layer MLP."""

    frequencies = 256

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        half = self.frequencies // 2
        self.register_buffer("omega", torch.exp(-math.log(10000.0) / half * torch.arange(half)), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Tensor) -> Tensor:
        angle = self.scale * value.float()[:, None] * self.omega
        return self.mlp(torch.cat([torch.cos(angle), torch.sin(angle)], -1))


class PatchEmbedding(nn.Module):
    """(B, channels, S, S) → (B, (S/p)², D): a linear map per patch plus a fixed 2-D sine table."""

    def __init__(self, channels: int, size: int, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, width)
        self.register_buffer("position", sincos_2d(size // patch, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch
        patches = rearrange(x, "b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=p, p2=p)
        return self.proj(patches) + self.position


class FrameEmbedding(nn.Module):
    """(B, channels, T), or (B, T) for channels None, → (B, T/p, D): a linear map per piece plus a fixed sine table."""

    def __init__(self, channels: int | None, steps: int, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear((channels or 1) * patch, width)
        self.register_buffer("position", sincos_1d(steps // patch, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] if x.ndim == 2 else x
        return self.proj(rearrange(x, "b c (l p) -> b l (c p)", p=self.patch)) + self.position


class TokenEmbedding(nn.Module):
    """(B, L) int64, mask token included → (B, L, D): a table of states plus a learned position."""

    def __init__(self, states: int, length: int, width: int):
        super().__init__()
        self.token = nn.Embedding(states, width)
        self.position = nn.Embedding(length, width)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]


class Modulate(nn.Module):
    """LayerNorm(x)·γ + β with γ, β linear in SiLU(c) — the final layer of both heads (β first, as official)."""

    def __init__(self, width: int, cond: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.linear = nn.Linear(cond, 2 * width)
        nn.init.zeros_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias.copy_(torch.cat([torch.zeros(width), torch.ones(width)]))

    def forward(self, x: Tensor, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: of the result, by default x's."""
        shift, scale = self.linear(c).chunk(2, -1)
        return kernels.adaln_modulate(x, scale, shift, self.eps, out_dtype=dtype)


class PatchHead(nn.Module):
    """(B, (S/p)², D) → ε̂ (B, channels, S, S)."""

    def __init__(self, channels: int, size: int, patch: int, width: int, cond: int):
        super().__init__()
        self.channels, self.grid, self.patch = channels, size // patch, patch
        self.modulate = Modulate(width, cond)
        self.linear = nn.Linear(width, patch * patch * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out = self.linear(self.modulate(x, c, matmul_dtype(self.linear)))
        p = self.patch
        return rearrange(out, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=self.grid, p1=p, p2=p)


class FrameHead(nn.Module):
    """(B, T/p, D) → (B, channels, T), or (B, T) for channels None."""

    def __init__(self, channels: int | None, steps: int, patch: int, width: int, cond: int):
        super().__init__()
        self.channels, self.patch = channels, patch
        self.modulate = Modulate(width, cond)
        self.linear = nn.Linear(width, (channels or 1) * patch)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out = self.linear(self.modulate(x, c, matmul_dtype(self.linear)))
        out = rearrange(out, "b l (c p) -> b c (l p)", p=self.patch)
        return out[:, 0] if self.channels is None else out


class TokenHead(nn.Module):
    """(B, L, D) → `LazyLogits` over `columns` states."""

    def __init__(self, columns: int, width: int, cond: int):
        super().__init__()
        self.modulate = Modulate(width, cond)
        self.linear = nn.Linear(width, columns)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> LazyLogits:
        weight = self.linear.weight
        return LazyLogits(self.modulate(x, c, weight.dtype), weight, self.linear.bias)


class StreamBlock(nn.Module):
    """One modality's weights in one joint block.

    `modulation` makes six vectors of SiLU(c): γ, β and gate of the attention branch, γ, β and gate of the
    feed-forward branch. qk_norm: RMS norm of queries and keys.
    """

    def __init__(self, width: int, cond: int, heads: int, head_dim: int, expand: int = 4, qk_norm: bool = True):
        super().__init__()
        inner = heads * head_dim
        self.modulation = nn.Linear(cond, 6 * width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.q_gamma = nn.Parameter(torch.ones(heads, head_dim)) if qk_norm else None
        self.k_gamma = nn.Parameter(torch.ones(heads, head_dim)) if qk_norm else None
        self.out = nn.Linear(inner, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, expand * width), nn.GELU(), nn.Linear(expand * width, width))
        nn.init.zeros_(self.modulation.weight)
        with torch.no_grad():  # γ = 1, β = 0, gates open
            self.modulation.bias.copy_(torch.tensor([1.0, 0.0, 1.0] * 2).repeat_interleave(width))

    def residuals(
        self, x: Tensor, branch: Tensor, gate: Tensor, ff_scale: Tensor, ff_shift: Tensor, ff_gate: Tensor
    ) -> Residual:
        """x (B, L, D) plus the gated attention branch (B, L, H·Dh), plus the gated feed-forward branch of that."""
        x, y = Residual(x, self.out(branch), gate).modulated(ff_scale, ff_shift, self.ff[0])
        branch, bias = self.feed_forward(y)
        return Residual(x, branch, ff_gate, bias)

    def feed_forward(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feed-forward branch, and the bias that is still to be added to it, if any.

        Where the kernels run, they add the biases, because their backward passes then compute the gradients of the
        biases too. The second bias leaves the block as a copy: sharded weights are freed after the block.
        """
        first, _, second = self.ff
        if not (has_product(first) and has_product(second) and use_triton(None, y, y=y)):
            return self.ff(y), None
        y = kernels.bias_gelu(product(first, y), first.bias, compiled_forward=hasattr(second, "product"))
        return product(second, y), second.bias.clone()


def has_product(layer: nn.Linear) -> bool:
    """Whether `product` knows how the layer multiplies."""
    return type(layer) is nn.Linear or hasattr(layer, "product")


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """x · Wᵀ, a linear layer without its bias. Layers that multiply in a way of their own have a method for it.

    Such layers (`float8.Float8Linear`) begin with a pass over x, so what makes x is left to the compiler.
    """
    return nn.functional.linear(x, layer.weight) if type(layer) is nn.Linear else layer.product(x)


class JointBlock(nn.Module):
    """Attention over all streams at once, then a feed-forward layer in each. With one stream: a single-stream block."""

    def __init__(self, streams: dict[str, StreamBlock], heads: int):
        super().__init__()
        self.streams, self.heads = nn.ModuleDict(streams), heads

    def forward(
        self,
        x: dict[str, Residual],
        c: dict[str, Tensor],
        key_mask: Tensor | Packing | None,
        wanted: dict[str, int | None] | None = None,
    ) -> dict[str, Residual]:
        """One block over {stream: (B, L, D)}.

        key_mask: (B, ΣL) bool, True where keys are attended to, or its packing (`kernels.pack_keys`).
        wanted: {stream: number of leading samples, None for all}, the streams whose result is used, default all; the
            others only serve as keys and values.
        """
        names, wanted = list(x), dict.fromkeys(x) if wanted is None else wanted
        mods = {m: self.streams[m].modulation(c[m]).chunk(6, -1) for m in names}
        pairs = {m: x[m].modulated(mods[m][0], mods[m][1], self.streams[m].qkv) for m in names}
        y = {m: pair[1] for m, pair in pairs.items()}
        q, k, v = self._qkv(y, key_mask if isinstance(key_mask, Packing) else None)
        attended = kernels.joint_attention(q, k, v, key_mask).flatten(2)
        out = {}
        for m, branch in zip(names, attended.split([y[m].shape[1] for m in names], 1), strict=True):
            if m in wanted:
                n = wanted[m]
                parts = (leading(part, n) for part in (pairs[m][0], branch, *mods[m][2:]))
                out[m] = self.streams[m].residuals(*parts)
        return out

    def at_positions(self, x: Residual, c: Tensor, key_mask: Tensor | None, index: Tensor) -> Residual:
        """(R, 1, D): a single-stream block over (B, L, D) at the positions `index` (R,), sample · L + position."""
        ((name, stream),) = self.streams.items()
        mods = stream.modulation(c).chunk(6, -1)
        total, y = x.modulated(mods[0], mods[1], stream.qkv)
        q, k, v = self._qkv({name: y})
        samples = index // y.shape[1]
        q, total = (part.flatten(0, 1)[index][:, None] for part in (q, total))
        key_mask = None if key_mask is None else key_mask[samples]
        branch = kernels.joint_attention(q, k[samples], v[samples], key_mask).flatten(2)
        return stream.residuals(total, branch, *(part[samples] for part in mods[2:]))

    def _qkv(self, y: dict[str, Tensor], packing: Packing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized (with `qk_norm`) queries and keys, and values, of the joint sequence, (B, ΣL, H, Dh) each.

        With a packing keys and values are in their packed rows.
        """
        qkv = [self.streams[m].qkv(y[m]) for m in y]
        gammas = [self.streams[m].q_gamma for m in y], [self.streams[m].k_gamma for m in y]
        if gammas[0][0] is not None:
            return kernels.qk_norm_pack(qkv, *gammas, self.heads, packing)
        q, k, v = torch.cat(qkv, 1).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return (q, k, v) if packing is None else (q, packing.pack(k), packing.pack(v))


def sincos_1d(length: int, width: int) -> Tensor:
    """(length, width) float32: [sin, cos] of the position at `width`/2 frequencies."""
    if width % 2:
        raise ValueError(f"the width of a series' stream must be even, got {width}")
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat([torch.sin(angle), torch.cos(angle)], -1).float()


def sincos_2d(grid: int, width: int) -> Tensor:
    """(grid², width) float32: the first half of the features is the column, the second the row, each [sin, cos]."""
    if width % 4:
        raise ValueError(f"an image stream's width must be divisible by 4, got {width}")
    table = sincos_1d(grid, width // 2).double()
    column = table[None].expand(grid, -1, -1)
    row = table[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], -1).flatten(0, 1).float()
