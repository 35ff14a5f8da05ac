"""Whether a packed data set is what a config needs, and the codecs with which it was packed."""

from __future__ import annotations

from typing import Any

from ....configs.config import Config
from ....diffusion import Process
from ....model.build import Codecs, build_space, modalities_of, part_names
from ....model.codecs.base import ArraySpec, Codec, NoFile
from .manifest import Manifest, PackedModality


def match(manifest: Manifest, config: Config, codecs: Codecs) -> dict[str, PackedModality]:
    """{modality of the config: what the data set holds of it}; `data.fields` names it in the data set if need be.

    codecs: those that are not fitted, or whose files are not to be had, are replaced by the data set's.

    Raises:
        ValueError: the data set lacks a modality, or has another one of that name.
    """
    found = {}
    for m, modality in modalities_of(config).items():
        name = _name_in(manifest, config, m)
        found[m] = manifest.modalities[name]
        for key, value in codecs[m].settings().items():
            _require_same(manifest, m, key, found[m].codec.get(key), value)
        packed = modality.build_codec(manifest.codec_files(name))
        own = _files_of(codecs[m])
        if own is None:
            codecs[m] = packed
        elif changed := [file for file, content in packed.files().items() if own.get(file) != content]:
            raise ValueError(
                f"the config's {changed[0]} of {m!r} is not the one that {manifest.folder} was packed with"
            )
    for m, specs in stored_specs(config, codecs).items():
        _require_same(manifest, m, "arrays", found[m].specs, specs)
    return found


def stored_specs(config: Config, codecs: Codecs) -> dict[str, dict[str, ArraySpec]]:
    """{modality: {part: what packed data keeps of one value}}."""
    space, names = build_space(config, codecs), part_names(config, codecs)
    diffused = {m: {part: _diffused(space[name]) for part, name in parts.items()} for m, parts in names.items()}
    return {m: codecs[m].specs(specs) for m, specs in diffused.items()}


def _diffused(process: Process) -> ArraySpec:
    """One value of a process as it is diffused."""
    return ArraySpec(process.shape, "int32" if process.discrete else "float32", getattr(process, "states", None))


def _name_in(manifest: Manifest, config: Config, m: str) -> str:
    """The name of a modality of the config in the data set."""
    fields, there = config.data.fields if config.data else {}, manifest.modalities
    name = m if m in there else fields.get(m, m)
    if name not in there:
        raise ValueError(f"{manifest.folder} has no modality {name!r}; it has {', '.join(there)} (see data.fields)")
    return name


def _require_same(manifest: Manifest, m: str, key: str, packed: Any, wanted: Any) -> None:
    if packed != wanted:
        raise ValueError(
            f"{manifest.folder} was packed with {key} = {packed!r}, the config has {wanted!r} for {m!r}; "
            f"anystate data check {manifest.folder} prints matching settings"
        )


def _files_of(codec: Codec) -> dict[str, bytes] | None:
    """The files of a codec; None if it is not fitted yet, or reads a file that is not there."""
    try:
        return codec.files() if codec.is_fitted else None
    except NoFile:
        return None
