"""`dataset.yaml`: what a packed data set holds of which modalities, in which shards."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ....model.codecs.base import ArraySpec
from ....model.storage import atomic_write, sha256
from .shards import Index, Shard
from .version1 import upgrade

VERSION = 2
MANIFEST = "dataset.yaml"


@dataclasses.dataclass(frozen=True)
class PackedModality:
    """What a data set holds of a modality.

    Args:
        names: {part: name of its arrays}.
        specs: {part: what its array is for one value}.
        codec: settings of the codec that stored the values.
        versions: a sample has several values along a first axis, or none where it lacks the modality; else it has one.
        absent: {split: number of samples that lack the modality}.
        raw: field of the annotations that holds the raw values, where these are texts or numbers.
        files: {name: place in the data set's folder} of the codec's files.
        settings: of a modality of a config that fits, where the data set was made without a config.
        about: statistics and counts.
    """

    names: dict[str, str]
    specs: dict[str, ArraySpec]
    codec: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: bool = True
    absent: dict[str, int] = dataclasses.field(default_factory=dict)
    raw: str | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def problem(self, arrays: Mapping[str, Any], split: str, batch: bool = False) -> str | None:
        """The fault of a sample, {name: array, None if it cannot be read}, or of a batch of samples; None: no fault."""
        counts = set()
        for part, name in self.names.items():
            x = arrays[name]
            if x is None:
                return f"its {name} cannot be read"
            if reason := self.specs[part].problem(name, x, batch + self.versions):
                return reason
            counts.add(x.shape[batch] if self.versions else 1)
        names = " and ".join(self.names.values())
        if len(counts) > 1:
            return f"its {names} differ in number"
        return None if counts != {0} or self.absent.get(split) else f"its {names} is empty"

    def dump(self) -> dict[str, Any]:
        """The entry of `dataset.yaml`."""
        parts = {self.names[part]: {"part": part, **_without_defaults(spec)} for part, spec in self.specs.items()}
        rest = {key: value for key, value in _without_defaults(self).items() if key not in ("names", "specs")}
        return {"parts": parts, **rest}

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> PackedModality:
        """The modality of an entry of `dataset.yaml`."""
        names, specs = {}, {}
        for name, about in raw["parts"].items():
            part, shape = about["part"], tuple(about["shape"])
            names[part] = name
            specs[part] = ArraySpec(**{key: v for key, v in about.items() if key != "part"} | {"shape": shape})
        for place in raw.get("files", {}).values():
            _check_relative(place)
        return cls(names, specs, **{key: value for key, value in raw.items() if key != "parts"})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `dataset.yaml`.

    Args:
        modalities: {name: what there is of it}, in the order of the arrays of a sample.
        splits: {split: shards}.
        skipped: {reason: number of samples left out}, with the key "total".
        source: what was packed, with the seed and the held-out share.
    """

    folder: Path
    modalities: dict[str, PackedModality]
    splits: dict[str, list[Shard]]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    source: dict = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the arrays of a sample."""
        return [name for modality in self.modalities.values() for name in modality.names.values()]

    def samples(self, split: str) -> int:
        """The number of samples of a split."""
        return sum(shard.samples for shard in self.splits[split])

    def codec_files(self, m: str) -> dict[str, bytes]:
        """{name: content} of the files of a modality's codec."""
        return {name: (self.folder / place).read_bytes() for name, place in self.modalities[m].files.items()}

    def save(self) -> None:
        """Write `dataset.yaml` atomically."""
        splits = {}
        for name, shards in self.splits.items():
            splits[name] = {"samples": self.samples(name), "shards": [dataclasses.asdict(s) for s in shards]}
        content = {
            "version": VERSION,
            "source": self.source,
            "modalities": {m: modality.dump() for m, modality in self.modalities.items()},
            "skipped": self.skipped,
            "splits": splits,
        }
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        atomic_write(self.folder / MANIFEST, text)

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """The manifest of a folder.

        Raises:
            ValueError: missing, not readable, or of another version.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{folder} is not a packed data set: it has no {MANIFEST}; make one with anystate data pack"
            )
        try:
            return cls._parse(path.parent, yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a readable description of a packed data set ({error})") from None

    @classmethod
    def _parse(cls, folder: Path, raw: dict) -> Manifest:
        if raw["version"] not in (1, VERSION):
            raise ValueError(f"version {raw['version']}, this program reads 1 and {VERSION}; pack it again")
        entries = upgrade(raw) if raw["version"] == 1 else raw["modalities"]
        modalities = {m: PackedModality.parse(entry) for m, entry in entries.items()}
        splits = {}
        for name, part in raw["splits"].items():
            splits[name] = [Shard(**shard) for shard in part["shards"]]
            for shard in splits[name]:
                _check_relative(shard.file)
                _check_relative(shard.index)
        return cls(folder, modalities, splits, raw.get("skipped", {}), raw.get("source", {}))

    def open(self, shard: Shard, checksum: bool = False) -> Index:
        """The index of a shard, after checking that the shard and its index are the ones that were packed.

        Args:
            checksum: also compare the shard's SHA-256, which reads the whole file.

        Raises:
            ValueError: a file is missing, truncated or changed, or the index belongs to another shard.
        """
        tar, index = self.folder / shard.file, self.folder / shard.index
        remedy = "delete it and run the same anystate data pack again, or copy it again"
        for path in (tar, index):
            if not path.is_file():
                raise ValueError(f"{path} is missing; {remedy}")
        size = tar.stat().st_size
        if size != shard.bytes:
            fault = "truncated" if size < shard.bytes else "not what was packed"
            raise ValueError(f"{tar} is {fault}: {size} bytes, {shard.bytes} were packed; {remedy}")
        data = index.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise ValueError(f"{index} does not match its shard {tar.name}: its checksum differs; {remedy}")
        if checksum and sha256(tar) != shard.sha256:
            raise ValueError(f"{tar} was changed: its checksum differs; {remedy}")
        return Index(data.decode().splitlines()[1:])


def _without_defaults(section: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not empty, tuples as lists."""
    fields = dataclasses.asdict(section).items()
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields if v not in (None, {}) and (v or k != "gaps")}


def _check_relative(name: str) -> None:
    """Raise ValueError for a path outside the data set's folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the data set's folder")
