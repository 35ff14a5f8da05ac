"""From a config to codecs, space and network, the last with weights drawn from the config's seed.

Names: a modality with one process gives it its own name. The parts of a modality with several are named
MODALITY_PART, or PART where the config has no other modality.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch

from ..configs.config import Config, Loss, MMDiTConfig, SamplerConfig, TableDiTConfig
from ..diffusion import Process, Space
from .codecs.base import Codec, require_fitted
from .mmdit import MMDiT
from .modalities.base import Modality
from .streams import Stream
from .table_dit import TableDiT

Codecs = dict[str, Codec]
Names = dict[str, dict[str, str]]  # {modality: {part: name of its process}}
OLD_FILES = ("codec.json",)  # in earlier checkpoints, of a model's only modality, without its name before them


def modalities_of(config: Config) -> dict[str, Modality]:
    """{name: modality}."""
    return cast("dict[str, Modality]", config.modalities)


def build_codecs(config: Config, folder: Path | None = None) -> Codecs:
    """{modality: its codec}.

    folder: a checkpoint, or a packed data set, that holds files of the codecs.

    Raises:
        ValueError: such a file is damaged; names the modality.
    """
    codecs = {}
    for m, modality in modalities_of(config).items():
        try:
            codecs[m] = modality.build_codec(_saved_files(m, folder, len(config.modalities) == 1))
        except ValueError as error:
            where = f"{folder}: " if folder else ""
            raise ValueError(f"{where}{m}: {error}") from None
    return codecs


def codec_files(codecs: Mapping[str, Codec]) -> dict[str, bytes]:
    """{name: content} of the files that checkpoints keep of their codecs."""
    return {f"{m}.{name}": content for m, codec in codecs.items() for name, content in codec.files().items()}


def _saved_files(m: str, folder: Path | None, alone: bool) -> dict[str, bytes]:
    if folder is None:
        return {}
    files = {name: (folder / name).read_bytes() for name in OLD_FILES if alone and (folder / name).is_file()}
    return files | {path.name.removeprefix(f"{m}."): path.read_bytes() for path in folder.glob(f"{m}.*")}


def part_names(config: Config, codecs: Codecs) -> Names:
    """{modality: {part: name of its process}}."""
    return {m: {part: _name(config, m, part) for part in _processes(config, codecs, m)} for m in config.modalities}


def build_space(config: Config, codecs: Codecs) -> Space:
    """The product of the processes of a config's modalities.

    Raises:
        NotFitted: a codec must be fitted first.
    """
    processes: dict[str, Process] = {}
    for m in config.modalities:
        for part, process in _processes(config, codecs, m).items():
            name = _name(config, m, part)
            if name in processes:
                raise ValueError(f"modalities.{m}: its process {name} is named like one before it: rename a modality")
            processes[name] = process
    return Space(processes)


def build_losses(config: Config, space: Space, names: Names) -> dict[str, Loss]:
    """{process: its loss}."""
    losses = {}
    for m, modality in modalities_of(config).items():
        own = modality.losses({part: space[name] for part, name in names[m].items()})
        losses |= {name: own[part] for part, name in names[m].items()}
    return losses


def build_samplers(config: Config, names: Names) -> dict[str, SamplerConfig]:
    """{process: settings of its sampler}."""
    samplers = {}
    for m, modality in modalities_of(config).items():
        own = modality.samplers()
        samplers |= {name: own[part] for part, name in names[m].items()}
    return samplers


def build_network(config: Config, codecs: Codecs) -> MMDiT | TableDiT:
    """The network of a config.

    Raises:
        NotFitted: a codec must be fitted first.
        ValueError: a modality that the network cannot take.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(config.network, TableDiTConfig):
            return _table_dit(config, config.network, codecs)
        return _mmdit(config, config.network, codecs)


def _mmdit(config: Config, n: MMDiTConfig, codecs: Codecs) -> MMDiT:
    streams: dict[str, Stream] = {}
    first: dict[str, str] = {}  # {modality: its first process}
    for m, modality in modalities_of(config).items():
        require_fitted(codecs[m], m)
        with naming(m):
            own = modality.build_stream(codecs[m])
        parts = own if isinstance(own, dict) else {"": own}
        for part, stream in parts.items():
            owner = _name(config, m, stream.share) if stream.share in parts else first.get(stream.share or "")
            if stream.share is not None and owner is None:
                there = f"there are {', '.join(first)}" if first else f"{m} is the first"
                raise ValueError(
                    f"modalities.{m}.stream.share names {stream.share!r}, no modality that comes before {m}: {there}"
                )
            streams[_name(config, m, part)] = stream if owner is None else _joined(stream, streams, owner)
        first[m] = _name(config, m, next(iter(parts)))
    return MMDiT(streams, n.depth, n.heads, n.head_dim, n.time_scale, n.qk_norm)


def _joined(stream: Stream, streams: Mapping[str, Stream], owner: str) -> Stream:
    """The stream of a process that joins the one of another process, or the one that this has joined."""
    first = streams[owner]
    sizes = {name: getattr(first, name) for name in ("width", "cond", "single_stream_depth")}
    return dataclasses.replace(stream, share=first.share or owner, **sizes)


def _table_dit(config: Config, n: TableDiTConfig, codecs: Codecs) -> TableDiT:
    ((m, modality),) = modalities_of(config).items()
    require_fitted(codecs[m], m)
    with naming(m):
        columns = modality.build_groups(codecs[m])
    groups = columns["groups"]
    seen = [g for g in n.time_conditioning if g in groups] or list(groups)
    return TableDiT(
        groups,
        n.width,
        n.depth,
        n.heads,
        seen[:1] if config.times.draw == "unified" else seen,
        n.mlp,
        n.deep_heads,
        columns["mask_logit"],
        columns["observed"],
        n.time_scale,
        n.sinusoids,
    )


def _processes(config: Config, codecs: Codecs, m: str) -> dict[str, Process]:
    """{part: process} of a modality."""
    require_fitted(codecs[m], m)
    with naming(m):
        own = modalities_of(config)[m].build_process(codecs[m])
    return own if isinstance(own, dict) else {"": own}


@contextlib.contextmanager
def naming(m: str) -> Iterator[None]:
    """Errors of a kind begin with the modality."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"modalities.{m}: {error}") from None


def _name(config: Config, m: str, part: str) -> str:
    if not part:
        return m
    return part if len(config.modalities) == 1 else f"{m}_{part}"
