"""MMDiT: a transformer with one stream of weights per modality and attention across all of them.

Streams are embedded, pass a joint trunk, then each its own single-stream blocks, if any, and its heads. Every process
has its own time. Several processes may share a stream. The architecture equals the official Diffuse Everything
text+image network (`model.official` maps its weights); the block is that of Stable Diffusion 3 (arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import LazyLogits, Packing, pack_keys
from .layers import JointBlock, StreamBlock, TimeEmbedding
from .residual import Residual, any_batch, leading, matmul_dtype
from .streams import Stream


class MMDiT(nn.Module):
    """The network of a space of any processes.

    With `activation_checkpointing` blocks are run again in the backward pass instead of keeping their activations. With
    `whole_blocks`, for blocks that are compiled one by one, every block returns all of its streams and samples, and
    the unused ones are dropped afterwards: the compiler then sees few input signatures.

    Args:
        parts: {process: its stream}; their order is the order of the joint sequence.
        depth: joint blocks; heads, head_dim: of the attention, heads · head_dim wide whatever the streams' widths.
        time_scale: factor on the time before its sinusoids; official 1.
        qk_norm: RMS norm of queries and keys.

    Raises:
        ValueError: processes that cannot share a stream.
    """

    partial_outputs = True  # see `diffusion.guidance.partial_outputs`
    narrow = False

    def __init__(
        self,
        parts: Mapping[str, Stream],
        depth: int,
        heads: int,
        head_dim: int,
        time_scale: float = 1.0,
        qk_norm: bool = True,
    ):
        super().__init__()
        self.parts, self.head_dim = dict(parts), head_dim
        shared = {m: [k for k, s in parts.items() if s.share == m] for m in parts}
        self.members = {m: [m, *shared[m]] for m in parts if parts[m].share is None}
        _check_shared(self.parts, self.members)
        streams = {m: parts[m] for m in self.members}

        def block(names: Iterable[str]) -> JointBlock:
            sizes = {m: (streams[m].width, streams[m].condition_width) for m in names}
            return JointBlock(
                {m: StreamBlock(w, c, heads, head_dim, qk_norm=qk_norm) for m, (w, c) in sizes.items()}, heads
            )

        built = {k: _build(k, part) for k, part in parts.items()}
        self.embed = nn.ModuleDict({k: embed for k, (embed, _) in built.items()})
        self.time = nn.ModuleDict({k: TimeEmbedding(s.condition_width, time_scale) for k, s in parts.items()})
        self.trunk = nn.ModuleList([block(streams) for _ in range(depth)])
        self.trunk_norm = nn.ModuleDict({m: norm(s.width) for m, s in streams.items()})
        predicted = {m: s for m, s in streams.items() if any(parts[k].output for k in self.members[m])}
        # `tower`: the single-stream blocks, under the name that checkpoints hold
        self.tower = nn.ModuleDict(
            {m: nn.ModuleList([block([m]) for _ in range(s.single_stream_depth)]) for m, s in predicted.items()}
        )
        self.tower_norm = nn.ModuleDict({m: norm(s.width) for m, s in predicted.items() if s.single_stream_depth})
        self.head = nn.ModuleDict({k: built[k][1] for k, s in parts.items() if s.output})
        self.activation_checkpointing = self.whole_blocks = False

    @property
    def outputs(self) -> list[str]:
        """The processes that the network predicts."""
        return list(self.head)

    @property
    def observes(self) -> list[str]:
        """The Gaussian processes whose observed elements the network was trained with, see `forward`."""
        return [k for k, embed in self.embed.items() if getattr(embed, "observes", False)]

    def part(self, name: str) -> list[nn.Module]:
        """The modules of "joint" (embedders, time embeddings, trunk), or all that a process of this name has alone."""
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
        observed: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor | LazyLogits]:
        """Predictions of the processes in `outputs`: tensors of x's shape, or `LazyLogits` or logits of tokens.

        Args:
            x: {process: (B, *shape)}, every process of the model.
            t: {process: (B,)}, the input of its time embedding (see `Process.time_conditioning`).
            mask: {process: (B, L) bool, True = attend}; without one, all positions are attended to.
            outputs: names, default all with a head; {process: n} for the first n samples only, None for all.
            positions: {process of tokens: (R,) int64, sample · L + position}, the only positions whose logits will be
                used: the last single-stream block and the head skip all others, whose logits have no meaning.
            observed: {process in `observes`: bool of x's shape}, elements that are clean whatever the time.
        """
        wanted = self._wanted(outputs)
        if missing := [k for k in self.embed if k not in x]:
            raise ValueError(f"this model also needs modality {missing[0]!r}")
        embedded = {k: self._embed(k, x[k], observed or {}) for k in self.embed}
        times = {k: embed(t[k]) for k, embed in self.time.items()}
        streams = {m: self._join(m, embedded) for m in self.members}
        c = {m: nn.functional.silu(sum(times[k] for k in keys)) for m, keys in self.members.items()}
        masks = self._stream_masks(embedded, mask or {})
        needed = {m: _most(wanted, keys) for m, keys in self.members.items() if any(k in wanted for k in keys)}
        keys = self._pack(joint_mask(streams, masks), self.trunk)
        totals = {m: x.total() for m, x in self._run_all(self.trunk, streams, c, keys, needed).items()}
        out = {}
        for m, n in needed.items():
            stream = totals[m] if self.trunk else leading(totals[m], n)
            key_mask = leading(masks[m], n) if m in masks else None
            index = (positions or {}).get(m) if len(self.members[m]) == 1 else None
            out |= self._branch(m, stream, leading(c[m], n), key_mask, index, wanted)
        return {k: out[k] for k in wanted}

    def _embed(self, name: str, x: Tensor, observed: Mapping[str, Tensor]) -> Tensor:
        embed = self.embed[name]
        return embed(x, observed.get(name)) if getattr(embed, "observes", False) else embed(x)

    def _join(self, stream: str, embedded: Mapping[str, Tensor]) -> Tensor:
        """(B, L, D): the processes of a stream one after the other, aligned ones added to the first."""
        first, *others = self.members[stream]
        x = embedded[first]
        for k in others:
            x = x + embedded[k] if self.parts[k].aligned else x
        rest = [embedded[k] for k in others if not self.parts[k].aligned]
        return torch.cat([x, *rest], 1) if rest else x

    def _stream_masks(self, embedded: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{stream: (B, L) key mask} of the streams with a process that has one."""
        masks = {}
        for m, keys in self.members.items():
            if any(k in mask for k in keys):
                whole = {k: mask.get(k, embedded[k].new_ones(embedded[k].shape[:2], dtype=torch.bool)) for k in keys}
                apart = [k for k in keys[1:] if not self.parts[k].aligned]
                first = whole[keys[0]]
                for k in keys[1:]:
                    first = first & whole[k] if self.parts[k].aligned else first
                masks[m] = torch.cat([first, *(whole[k] for k in apart)], 1) if apart else first
        return masks

    def _wanted(self, outputs: Iterable[str] | Mapping[str, int | None] | None) -> dict[str, int | None]:
        """{process: number of leading samples, None for all}."""
        outputs = self.head if outputs is None else outputs
        wanted = dict(outputs) if isinstance(outputs, Mapping) and outputs is not self.head else dict.fromkeys(outputs)
        if missing := [k for k in wanted if k not in self.head]:
            raise ValueError(f"this model has no head for {missing[0]!r}; it has {', '.join(self.head)}")
        return wanted

    def _run_all(
        self, blocks: nn.ModuleList, streams: dict[str, Tensor], c: dict[str, Tensor], mask, wanted: dict
    ) -> dict[str, Residual]:
        """The blocks one after the other; the last one returns the `wanted` streams and samples."""
        x = {m: Residual(stream) for m, stream in streams.items()}
        any_size = self.whole_blocks and not torch.is_grad_enabled()
        if any_size:
            c = {m: any_batch(value) for m, value in c.items()}
            if mask is not None:
                mask = Packing(*map(any_batch, mask)) if isinstance(mask, Packing) else any_batch(mask)
        for i, block in enumerate(blocks, 1):
            if any_size:
                x = {m: part.any_batch() for m, part in x.items()}
            if i < len(blocks):
                x = self._run(block, x, c, mask, None)
            elif self.whole_blocks:
                x = self._run(block, x, c, mask, self._wanted_streams(x, wanted))
                x = {m: x[m].leading(n) for m, n in wanted.items()}
            else:
                x = self._run(block, x, c, mask, wanted)
        return x

    def _pack(self, key_mask: Tensor | None, blocks: nn.ModuleList) -> Tensor | Packing | None:
        """The key mask as the blocks take it: packed once, where attention of variable lengths will run."""
        if key_mask is None or not blocks:
            return None
        stream = next(iter(blocks[0].streams.values()))
        return pack_keys(key_mask, matmul_dtype(stream.qkv), self.head_dim)

    def _wanted_streams(self, x: dict[str, Tensor], wanted: dict) -> dict[str, None] | None:
        """`wanted` for a last block that returns whole streams: None for all, as for every other block.

        In training, weights that no loss depends on must get no gradients rather than zeros, on which weight decay
        would act, and every step of a run has the same outputs. In sampling the outputs vary, so all with a head are
        computed.
        """
        streams = wanted if torch.is_grad_enabled() else self.tower
        names = [m for m in x if m in streams]
        return None if len(names) == len(x) else dict.fromkeys(names)

    def _run(self, block: JointBlock, x: dict[str, Residual], *others) -> dict[str, Residual]:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            x = {m: Residual(part.total()) for m, part in x.items()}  # inputs of blocks are kept: one, not two
            return checkpoint(block, x, *others, use_reentrant=False)
        return block(x, *others)

    def _branch(
        self, name: str, x: Tensor, c: Tensor, mask: Tensor | None, index: Tensor | None, wanted: dict
    ) -> dict[str, Tensor | LazyLogits]:
        """A stream's single-stream blocks and heads; index: of the positions that are used, all if None."""
        blocks, (n, length) = self.tower[name], x.shape[:2]
        x = self.trunk_norm[name](x)
        keys = self._pack(mask, blocks)
        if index is None or not blocks:
            x = self._run_all(blocks, {name: x}, {name: c}, keys, {name: None})[name].total()
        else:
            before = self._run_all(blocks[:-1], {name: x}, {name: c}, keys, {name: None})[name]
            x, c = blocks[-1].at_positions(before, c, mask, index).total(), c[index // length]
        if name in self.tower_norm:
            x = self.tower_norm[name](x)
        if index is not None and blocks:
            return {name: self.head[name](x, c).scatter_positions(index, n, length)}
        out = {}
        for k, piece in self._split(name, x).items():
            if k in wanted:
                out[k] = self.head[k](leading(piece, wanted[k]), leading(c, wanted[k]))
        return out

    def _split(self, stream: str, x: Tensor) -> dict[str, Tensor]:
        """{process: its positions of a stream}, the inverse of `_join`."""
        first, *others = self.members[stream]
        if not others:
            return {first: x}
        apart = [k for k in others if not self.parts[k].aligned]
        pieces = x.split([self.parts[k].tokens for k in (first, *apart)], 1)
        out = dict(zip((first, *apart), pieces, strict=True))
        return out | {k: out[first] for k in others if self.parts[k].aligned}


def _build(name: str, part: Stream) -> tuple[nn.Module, nn.Module]:
    try:
        return part.build()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_shared(parts: Mapping[str, Stream], members: Mapping[str, list[str]]) -> None:
    """Raise ValueError unless every shared stream exists and aligned processes have as many positions."""
    for k, part in parts.items():
        if part.share is None:
            continue
        if part.share not in members:
            raise ValueError(f"{k}: stream.share names {part.share!r}, which has no stream of its own")
        owner = parts[part.share]
        if part.aligned and part.tokens != owner.tokens:
            raise ValueError(
                f"{k} has {part.tokens} positions, {part.share} has {owner.tokens}: they cannot be aligned"
            )
        if (part.width, part.condition_width) != (owner.width, owner.condition_width):
            sizes = f"width {owner.width} and cond {owner.condition_width}"
            raise ValueError(f"{k} shares the stream of {part.share}, so it has its {sizes}")


def _most(wanted: Mapping[str, int | None], keys: Iterable[str]) -> int | None:
    """The most samples that a process of a stream is wanted for; None for all."""
    counts = [wanted[k] for k in keys if k in wanted]
    return None if None in counts else max(n for n in counts if n is not None)


def norm(width: int) -> nn.RMSNorm:
    """x/‖x‖ · √D · g: RMSNorm with a negligible epsilon, as official."""
    return nn.RMSNorm(width, eps=1e-12)


def joint_mask(streams: dict[str, Tensor], mask: dict[str, Tensor] | None) -> Tensor | None:
    """(B, ΣL) bool key mask of the joint sequence, or None if nothing is hidden."""
    if not mask:
        return None
    whole = [mask[m] if m in mask else x.new_ones(x.shape[:2], dtype=torch.bool) for m, x in streams.items()]
    return torch.cat(whole, 1)
