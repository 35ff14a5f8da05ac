"""MMDiT: a transformer with one stream of weights per modality and attention across all of them.

Streams are embedded, pass a joint trunk, then each an optional tower of its own, then its head. Every
modality has its own time. The architecture equals the official Diffuse Everything text+image network
(`model.official` maps its weights); the block is that of Stable Diffusion 3 (arXiv 2403.03206).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import LazyLogits, Places
from .layers import JointBlock, PatchEmbedding, PatchHead, StreamBlock, TimeEmbedding, TokenEmbedding, TokenHead, pick


@dataclasses.dataclass(frozen=True)
class Patches:
    """A Gaussian modality of square pictures (channels, size, size), cut into patches.

    cond is the width of its conditioning vector, default `width`; tower the depth of its own tower;
    head False leaves the modality without an output (a pure condition).
    """

    channels: int
    size: int
    patch: int
    width: int
    cond: int | None = None
    tower: int = 0
    head: bool = True

    def build(self) -> tuple[nn.Module, nn.Module]:
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the picture's size {self.size}")
        cond = self.cond or self.width
        return (
            PatchEmbedding(self.channels, self.size, self.patch, self.width),
            PatchHead(self.channels, self.size, self.patch, self.width, cond),
        )


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A discrete modality of at most `length` tokens with `states` real states (and the mask).

    columns: width of the head's output, default `states`; official heads have states + 1. The rest as in `Patches`.
    """

    length: int
    states: int
    width: int
    columns: int | None = None
    cond: int | None = None
    tower: int = 0
    head: bool = True

    def build(self) -> tuple[nn.Module, nn.Module]:
        cond = self.cond or self.width
        return (
            TokenEmbedding(self.states + 1, self.length, self.width),
            TokenHead(self.columns or self.states, self.width, cond),
        )


class MMDiT(nn.Module):
    """The network of a space of pictures and token sequences.

    Set `recompute` to run blocks again in the backward pass instead of keeping what they compute. Set `whole_blocks`
    where blocks are compiled one by one: every block then returns all of its streams, samples and positions and the
    unwanted ones are dropped afterwards, so that the compiler sees few kinds of inputs.

    Args:
        streams: {name: Patches or Tokens}; their order is the order of the joint sequence.
        depth: joint blocks; heads, head_dim: attention, of width heads · head_dim whatever the streams' widths.
        time_scale: factor on the time before its sinusoids; official 1.
    """

    selects_rows = True

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
        headed = {m: s for m, s in streams.items() if s.head}
        self.tower = nn.ModuleDict({m: nn.ModuleList([block([m]) for _ in range(s.tower)]) for m, s in headed.items()})
        self.tower_norm = nn.ModuleDict({m: norm(s.width) for m, s in headed.items() if s.tower})
        self.head = nn.ModuleDict({m: built[m][1] for m in headed})
        self.recompute = self.whole_blocks = False

    def part(self, name: str) -> list[nn.Module]:
        """The modules behind a name: "joint" is all that sees every modality (embedders, time embeddings, trunk), a
        modality's name is everything of its own."""
        if name == "joint":
            return [self.embed, self.time, self.trunk, self.trunk_norm]
        own = (self.embed, self.time, self.tower, self.tower_norm, self.head)
        return [modules[name] for modules in own if name in modules]

    def repeated(self) -> list[nn.Module]:
        """The blocks that repeat, for `model.compiling`."""
        return [*self.trunk, *(block for tower in self.tower.values() for block in tower)]

    def forward(
        self,
        x: dict[str, Tensor],
        t: dict[str, Tensor],
        mask: dict[str, Tensor] | None = None,
        outputs: Iterable[str] | Mapping[str, slice | Tensor | Places | None] | None = None,
    ) -> dict[str, Tensor | LazyLogits]:
        """ε̂ for pictures, `LazyLogits` for tokens, for the modalities in `outputs` (default: all with a head).

        Args:
            x: {name: (B, C, S, S) or (B, L)}, every stream of the model.
            t: {name: (B,)}, what each time embedding is told (see `Process.time_conditioning`).
            mask: {name: (B, L) bool, True = attend}; a missing name is attended to everywhere.
            outputs: names, or {name: rows}, a slice or indices of the samples whose output is wanted, None for all;
                {name: Places} for the output at single positions, (R, 1, …).
        """
        outputs = dict.fromkeys(self.head) if outputs is None else outputs
        outputs = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs)
        if missing := [m for m in outputs if m not in self.head]:
            raise ValueError(f"this model has no head for {missing[0]!r}; it has {', '.join(self.head)}")
        if missing := [m for m in self.embed if m not in x]:
            raise ValueError(f"this model also needs modality {missing[0]!r}")
        needed = {m: self._trunk_rows(m, rows) for m, rows in outputs.items()}
        streams = {m: embed(x[m]) for m, embed in self.embed.items()}
        c = {m: nn.functional.silu(embed(t[m])) for m, embed in self.time.items()}
        key_mask = joint_mask(streams, mask)
        streams = self._run_all(self.trunk, streams, c, key_mask, needed)
        answers = {}
        for m, rows in needed.items():
            x = streams[m] if self.trunk else pick(streams[m], rows)  # the last block has taken them
            hidden = None if mask is None or m not in mask else pick(mask[m], rows)
            single = isinstance(outputs[m], Places) and self.tower[m]  # without one, the trunk has picked them
            places = (outputs[m].row, outputs[m].position) if single else None
            answers[m] = self._branch(m, x, pick(c[m], rows), hidden, places)
        return answers

    def _run_all(self, blocks: nn.ModuleList, x: dict[str, Tensor], c: dict[str, Tensor], mask, needed: dict):
        """The blocks one after the other, and what is `needed` of the last one's result, see `JointBlock`."""
        if self.whole_blocks and not torch.is_grad_enabled():
            x, c = ({m: any_batch(value) for m, value in part.items()} for part in (x, c))
            mask = None if mask is None else any_batch(mask)
        for i, block in enumerate(blocks, 1):
            if i < len(blocks):
                x = self._run(block, x, c, mask, None)
            elif self.whole_blocks:
                x = self._run(block, x, c, mask, self._wanted_streams(x, needed))
                x = {m: pick(x[m], rows) for m, rows in needed.items()}
            else:
                x = self._run(block, x, c, mask, needed)
        return x

    def _wanted_streams(self, x: dict[str, Tensor], needed: dict) -> dict[str, None] | None:
        """`needed` of a last block that returns whole streams: None for all, which is what all other blocks are given.

        In training, weights that no loss depends on must get no gradients, rather than zeros, which would let weight
        decay act on them; a run asks for the same outputs in every step. In sampling the outputs vary and are not told.
        """
        wanted = needed if torch.is_grad_enabled() else self.head
        names = [m for m in x if m in wanted]
        return None if len(names) == len(x) else dict.fromkeys(names)

    def _run(self, block: JointBlock, *args) -> dict[str, Tensor]:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _trunk_rows(self, name: str, rows: slice | Tensor | Places | None):
        """What the trunk's last block hands over: a tower looks at whole sequences."""
        if isinstance(rows, Places):
            return rows.rows if self.tower[name] else (rows.samples, rows.position)
        return rows

    def _branch(self, name: str, x: Tensor, c: Tensor, mask: Tensor | None, places=None) -> Tensor | LazyLogits:
        """A modality's tower and head; places: of x, (R,) samples and (R,) positions, all if None."""
        x = self.trunk_norm[name](x)
        x = self._run_all(self.tower[name], {name: x}, {name: c}, mask, {name: places})[name]
        if name in self.tower_norm:
            x = self.tower_norm[name](x)
        return self.head[name](x, pick(c, places))


def any_batch(x: Tensor) -> Tensor:
    """The tensor, marked for torch.compile: batches of every size above 1 are one kind of input. A part of a larger
    tensor is copied, for the compiler tells parts from wholes."""
    x = x if x._base is None else x.clone()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def norm(width: int) -> nn.RMSNorm:
    """x/‖x‖ · √D · g: RMSNorm with an epsilon that never shows, as official."""
    return nn.RMSNorm(width, eps=1e-12)


def joint_mask(streams: dict[str, Tensor], mask: dict[str, Tensor] | None) -> Tensor | None:
    """(B, ΣL) bool key mask of the joint sequence, or None if nothing is hidden."""
    if not mask:
        return None
    whole = [mask[m] if m in mask else x.new_ones(x.shape[:2], dtype=torch.bool) for m, x in streams.items()]
    return torch.cat(whole, 1)
