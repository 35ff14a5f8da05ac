"""From a config to its network, with weights drawn from the config's seed, and to its codecs."""

from __future__ import annotations

from pathlib import Path

import torch

from ..configs.config import Config, Image, Text
from ..configs.locate import locate
from ..configs.table import TableConfig
from .codecs.characters import CharCodec
from .codecs.pixels import PixelCodec
from .codecs.subwords import TokenizerCodec
from .codecs.table.codec import TableCodec
from .codecs.vae import LatentCodec
from .mmdit import MMDiT, Patches, Tokens
from .table_dit import Categorical, Numerical, TableDiT

Codec = PixelCodec | LatentCodec | CharCodec | TokenizerCodec
TOKENIZER = "{}.tokenizer.json"  # a modality's vocabulary inside a checkpoint


def build_network(config: Config) -> MMDiT:
    """The MMDiT of a config."""
    n = config.network
    streams = {name: _stream(c) for name, c in config.modalities.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MMDiT(streams, n.depth, n.heads, n.head_dim, n.time_scale)


def build_codecs(config: Config, folder: Path | None = None) -> dict[str, Codec]:
    """{modality: its codec}.

    folder: a checkpoint that holds its tokenizers (see `codec_files`); default: they are where the config says.
    """
    return {name: _codec(name, c, folder) for name, c in config.modalities.items()}


def codec_files(codecs: dict[str, Codec]) -> dict[str, bytes]:
    """{name: content} of the files that checkpoints need for their codecs: the vocabularies."""
    subwords = {name: codec for name, codec in codecs.items() if isinstance(codec, TokenizerCodec)}
    return {TOKENIZER.format(name): codec.json().encode() for name, codec in subwords.items()}


def build_table_network(config: TableConfig, codec: TableCodec) -> TableDiT:
    """The TableDiT of a config for the columns of a codec."""
    groups: dict[str, Numerical | Categorical] = {}
    if codec.numerical:
        groups["num"] = Numerical(len(codec.numerical))
    if codec.categorical:
        groups["cat"] = Categorical(tuple(codec.states))
    n = config.network
    time_conditioning: list[str] = [m for m in n.time_conditioning if m in groups] or list(groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TableDiT(
            groups,
            n.width,
            n.depth,
            n.heads,
            time_conditioning[:1] if config.times.draw == "unified" else time_conditioning,
            n.mlp,
            n.deep_heads,
            config.categorical.mask_logit is not None,
            config.conditioning_prob > 0,
            n.time_scale,
            n.sinusoids,
        )


def _stream(c: Image | Text) -> Patches | Tokens:
    s = c.stream
    if isinstance(c, Image):
        return Patches(c.channels, c.size, s.patch, s.width, s.cond, s.single_stream_depth, s.output)
    columns = c.states + 1 if c.mask_logit else None
    return Tokens(c.length, c.states, s.width, columns, s.cond, s.single_stream_depth, s.output)


def _codec(name: str, c: Image | Text, folder: Path | None) -> Codec:
    if isinstance(c, Image):
        if c.latents:
            return LatentCodec(c.latents.vae, c.latents.scale, c.channels, c.size)
        return PixelCodec(c.channels, c.size, c.pixel_max)
    if c.tokenizer is None:
        assert c.alphabet is not None  # a config has one of the two
        return CharCodec(c.alphabet, c.length)
    t, kept = c.tokenizer, folder and folder / TOKENIZER.format(name)
    path = kept if kept and kept.is_file() else locate(t.path) or t.path
    return TokenizerCodec(path, c.length, t.states, t.pad, t.start, t.end)
