"""MMDiT: a transformer with one stream of weights per modality and attention across all of them.

Streams are embedded, pass a joint trunk, then each its own single-stream blocks, if any, and its head. Every
modality has its own time. The architecture equals the official Diffuse Everything text+image network
(`model.official` maps its weights); the block is that of Stable Diffusion 3 (arXiv 2403.03206).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import LazyLogits
from .layers import (
    JointBlock,
    PatchEmbedding,
    PatchHead,
    StreamBlock,
    TimeEmbedding,
    TokenEmbedding,
    TokenHead,
    leading,
)


@dataclasses.dataclass(frozen=True)
class Patches:
    """The stream of a Gaussian modality of square images (channels, size, size), cut into patches.

    cond: width of the conditioning vector, default `width`. single_stream_depth: blocks of its own after the trunk.
    output: False for a modality that is never predicted (a pure condition).
    """

    channels: int
    size: int
    patch: int
    width: int
    cond: int | None = None
    single_stream_depth: int = 0
    output: bool = True

    def build(self) -> tuple[nn.Module, nn.Module]:
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the image's size {self.size}")
        cond = self.cond or self.width
        return (
            PatchEmbedding(self.channels, self.size, self.patch, self.width),
            PatchHead(self.channels, self.size, self.patch, self.width, cond),
        )


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The stream of a discrete modality of `length` tokens with `states` real states (and the mask).

    columns: outputs of the head, default `states`; official heads have states + 1. The rest as in `Patches`.
    """

    length: int
    states: int
    width: int
    columns: int | None = None
    cond: int | None = None
    single_stream_depth: int = 0
    output: bool = True

    def build(self) -> tuple[nn.Module, nn.Module]:
        cond = self.cond or self.width
        return (
            TokenEmbedding(self.states + 1, self.length, self.width),
            TokenHead(self.columns or self.states, self.width, cond),
        )


class MMDiT(nn.Module):
    """The network of a space of images and token sequences.

    With `activation_checkpointing` blocks are run again in the backward pass instead of keeping their activations. With
    `whole_blocks`, for blocks that are compiled one by one, every block returns all of its streams and samples, and
    the unused ones are dropped afterwards: the compiler then sees few input signatures.

    Args:
        streams: {modality: Patches or Tokens}; their order is the order of the joint sequence.
        depth: joint blocks; heads, head_dim: of the attention, heads · head_dim wide whatever the streams' widths.
        time_scale: factor on the time before its sinusoids; official 1.
    """

    partial_outputs = True  # see `diffusion.guidance.partial_outputs`

    def __init__(
        self, streams: dict[str, Patches | Tokens], depth: int, heads: int, head_dim: int, time_scale: float = 1.0
    ):
        super().__init__()

        def block(names: Iterable[str]) -> JointBlock:
            parts = {m: (streams[m].width, streams[m].cond or streams[m].width) for m in names}
            return JointBlock({m: StreamBlock(w, c, heads, head_dim) for m, (w, c) in parts.items()}, heads)

        built = {m: spec.build() for m, spec in streams.items()}
        self.embed = nn.ModuleDict({m: embed for m, (embed, _) in built.items()})
        self.time = nn.ModuleDict({m: TimeEmbedding(s.cond or s.width, time_scale) for m, s in streams.items()})
        self.trunk = nn.ModuleList([block(streams) for _ in range(depth)])
        self.trunk_norm = nn.ModuleDict({m: norm(s.width) for m, s in streams.items()})
        outputs = {m: s for m, s in streams.items() if s.output}
        # `tower`: the single-stream blocks, under the name that checkpoints hold
        self.tower = nn.ModuleDict(
            {m: nn.ModuleList([block([m]) for _ in range(s.single_stream_depth)]) for m, s in outputs.items()}
        )
        self.tower_norm = nn.ModuleDict({m: norm(s.width) for m, s in outputs.items() if s.single_stream_depth})
        self.head = nn.ModuleDict({m: built[m][1] for m in outputs})
        self.activation_checkpointing = self.whole_blocks = False

    def part(self, name: str) -> list[nn.Module]:
        """The modules of "joint" (embedders, time embeddings, trunk), or all that a modality of this name has alone."""
        if name == "joint":
            return [self.embed, self.time, self.trunk, self.trunk_norm]
        own = (self.embed, self.time, self.tower, self.tower_norm, self.head)
        return [modules[name] for modules in own if name in modules]

    def repeated(self) -> list[nn.Module]:
        """The blocks that repeat, for `model.compilation`."""
        return [*self.trunk, *(block for tower in self.tower.values() for block in tower)]

    def forward(
        self,
        x: dict[str, Tensor],
        t: dict[str, Tensor],
        mask: dict[str, Tensor] | None = None,
        outputs: Iterable[str] | Mapping[str, int | None] | None = None,
        positions: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor | LazyLogits]:
        """Predictions of the modalities in `outputs`: (B, C, S, S) for images, `LazyLogits` for tokens.

        Args:
            x: {modality: (B, C, S, S) or (B, L)}, every stream of the model.
            t: {modality: (B,)}, the input of its time embedding (see `Process.time_conditioning`).
            mask: {modality: (B, L) bool, True = attend}; without one, all positions are attended to.
            outputs: names, default all modalities with a head; {modality: n} for the first n samples only, None for
            all.
            positions: {modality of tokens: (R,) int64, sample · L + position}, the only positions whose logits will be
                used: the last single-stream block and the head skip all others, whose logits have no meaning.
        """
        wanted = self._wanted(outputs)
        if missing := [m for m in self.embed if m not in x]:
            raise ValueError(f"this model also needs modality {missing[0]!r}")
        streams = {m: embed(x[m]) for m, embed in self.embed.items()}
        c = {m: nn.functional.silu(embed(t[m])) for m, embed in self.time.items()}
        streams = self._run_all(self.trunk, streams, c, joint_mask(streams, mask), wanted)
        out = {}
        for m, n in wanted.items():
            stream = streams[m] if self.trunk else leading(streams[m], n)
            key_mask = leading(mask[m], n) if mask and m in mask else None
            out[m] = self._branch(m, stream, leading(c[m], n), key_mask, (positions or {}).get(m))
        return out

    def _wanted(self, outputs: Iterable[str] | Mapping[str, int | None] | None) -> dict[str, int | None]:
        """{modality: number of leading samples, None for all}."""
        outputs = self.head if outputs is None else outputs
        wanted = dict(outputs) if isinstance(outputs, Mapping) and outputs is not self.head else dict.fromkeys(outputs)
        if missing := [m for m in wanted if m not in self.head]:
            raise ValueError(f"this model has no head for {missing[0]!r}; it has {', '.join(self.head)}")
        return wanted

    def _run_all(self, blocks: nn.ModuleList, x: dict[str, Tensor], c: dict[str, Tensor], mask, wanted: dict):
        """The blocks one after the other; the last one returns the `wanted` streams and samples."""
        if self.whole_blocks and not torch.is_grad_enabled():
            x, c = ({m: any_batch(value) for m, value in part.items()} for part in (x, c))
            mask = None if mask is None else any_batch(mask)
        for i, block in enumerate(blocks, 1):
            if i < len(blocks):
                x = self._run(block, x, c, mask, None)
            elif self.whole_blocks:
                x = self._run(block, x, c, mask, self._wanted_streams(x, wanted))
                x = {m: leading(x[m], n) for m, n in wanted.items()}
            else:
                x = self._run(block, x, c, mask, wanted)
        return x

    def _wanted_streams(self, x: dict[str, Tensor], wanted: dict) -> dict[str, None] | None:
        """`wanted` for a last block that returns whole streams: None for all, as for every other block.

        In training, weights that no loss depends on must get no gradients rather than zeros, on which weight decay
        would act, and every step of a run has the same outputs. In sampling the outputs vary, so all with a head are
        computed.
        """
        streams = wanted if torch.is_grad_enabled() else self.head
        names = [m for m in x if m in streams]
        return None if len(names) == len(x) else dict.fromkeys(names)

    def _run(self, block: JointBlock, *args) -> dict[str, Tensor]:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _branch(
        self, name: str, x: Tensor, c: Tensor, mask: Tensor | None, index: Tensor | None
    ) -> Tensor | LazyLogits:
        """A modality's single-stream blocks and head; index: of the positions that are used, all if None."""
        blocks, (n, length) = self.tower[name], x.shape[:2]
        x = self.trunk_norm[name](x)
        if index is None or not blocks:
            x = self._run_all(blocks, {name: x}, {name: c}, mask, {name: None})[name]
        else:
            x = self._run_all(blocks[:-1], {name: x}, {name: c}, mask, {name: None})[name]
            x, c = blocks[-1].at_positions(x, c, mask, index), c[index // length]
        if name in self.tower_norm:
            x = self.tower_norm[name](x)
        out = self.head[name](x, c)
        return out if index is None or not blocks else out.scatter_positions(index, n, length)


def any_batch(x: Tensor) -> Tensor:
    """The tensor, marked for torch.compile: one compilation serves batches of every size above 1.

    A view is copied first, because the compiler specializes on views.
    """
    x = x if x._base is None else x.clone()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def norm(width: int) -> nn.RMSNorm:
    """x/‖x‖ · √D · g: RMSNorm with a negligible epsilon, as official."""
    return nn.RMSNorm(width, eps=1e-12)


def joint_mask(streams: dict[str, Tensor], mask: dict[str, Tensor] | None) -> Tensor | None:
    """(B, ΣL) bool key mask of the joint sequence, or None if nothing is hidden."""
    if not mask:
        return None
    whole = [mask[m] if m in mask else x.new_ones(x.shape[:2], dtype=torch.bool) for m, x in streams.items()]
    return torch.cat(whole, 1)
