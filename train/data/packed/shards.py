"""Packed data on disk: WebDataset tar shards, their DALI index files, and the `dataset.yaml` that describes them.

A sample is three members of a tar, in this order: `KEY.image.npy`, `KEY.text.npy`, `KEY.json`. An index file is
identical to what NVIDIA's `wds2idx` writes for the same tar: the line `v1.2 N`, then one line per sample with the
extension, offset, size and name of each member.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from ....model.storage import atomic_write, sha256

VERSION = 1
MANIFEST = "dataset.yaml"
IMAGE, TEXT, LABELS = "image.npy", "text.npy", "json"
BLOCK = 512  # bytes of a tar block
NPY_HEADER = 128  # bytes of the usual .npy header


@dataclasses.dataclass(frozen=True)
class Shard:
    """A tar and its index with their sizes and checksums; paths are relative to the data set's folder."""

    file: str
    index: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


class ShardWriter:
    """Writes a tar and its index under temporary names; `close` renames both, so a shard is complete or absent."""

    def __init__(self, folder: Path, file: str):
        self.folder, self.file, self.index = folder, file, str(Path(file).with_suffix(".idx"))
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        self.partial = folder / f"{file}.partial"
        self.raw = _HashingFile(self.partial)
        self.tar = tarfile.open(fileobj=self.raw, mode="w|", format=tarfile.USTAR_FORMAT, bufsize=BLOCK * 128)  # noqa: SIM115
        self.lines: list[str] = []

    def add(self, key: str, image: np.ndarray, tokens: np.ndarray, labels: dict) -> None:
        """Append one sample: the image as stored, tokens (M, L) int32, labels as JSON."""
        fields = []
        for extension, data in ((IMAGE, npy(image)), (TEXT, npy(tokens)), (LABELS, _json(labels))):
            entry = tarfile.TarInfo(f"{key}.{extension}")
            entry.size = len(data)
            fields.append(f"{extension} {self.tar.offset + BLOCK} {len(data)} {entry.name}")
            self.tar.addfile(entry, io.BytesIO(data))
        self.lines.append(" ".join(fields))

    def close(self) -> Shard:
        """Finish and rename both files; returns their description."""
        self.tar.close()
        size, digest = self.raw.close()
        index = index_text(self.lines).encode()
        atomic_write(self.folder / self.index, index)
        os.replace(self.partial, self.folder / self.file)
        return Shard(self.file, self.index, len(self.lines), size, digest, hashlib.sha256(index).hexdigest())

    def discard(self) -> None:
        """Delete the unfinished shard."""
        self.raw.close()
        self.partial.unlink(missing_ok=True)


class _HashingFile:
    """A file written sequentially, with its size and SHA-256 computed on the way."""

    def __init__(self, path: Path):
        self.file, self.digest, self.size = open(path, "wb"), hashlib.sha256(), 0  # noqa: SIM115

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def close(self) -> tuple[int, str]:
        """Sync and close the file; returns its size in bytes and its SHA-256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.size, self.digest.hexdigest()


def npy(array: np.ndarray) -> bytes:
    """The bytes of an .npy file with this array."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _json(labels: dict) -> bytes:
    return json.dumps(labels, ensure_ascii=False).encode()


def index_text(lines: list[str]) -> str:
    """The content of an index file with one line per sample."""
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


@dataclasses.dataclass(frozen=True)
class Index:
    """The index lines of the samples of a shard."""

    lines: list[str]

    def member(self, sample: int, extension: str) -> tuple[int, int, str]:
        """Offset and size in bytes, and name, of one member of a sample."""
        fields = self.lines[sample].split(" ")
        start = fields.index(extension)
        offset, size, name = fields[start + 1 : start + 4]
        return int(offset), int(size), name


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `dataset.yaml`.

    Args:
        image: kind (pixels or latents), channels and size of the diffused tensor, pixel_max; for latents vae, scale.
        text: kind (characters, bpe or clip), length, states, pad, start, end, alphabet or file.
        splits: {split: shards}.
        skipped: {reason: number of samples left out}, with the key "total".
        source: what was packed, with the seed and the held-out share.
    """

    folder: Path
    image: dict
    text: dict
    splits: dict[str, list[Shard]]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    source: dict = dataclasses.field(default_factory=dict)

    def samples(self, split: str) -> int:
        """The number of samples of a split."""
        return sum(shard.samples for shard in self.splits[split])

    def save(self) -> None:
        """Write `dataset.yaml` atomically."""
        splits = {}
        for name, shards in self.splits.items():
            splits[name] = {"samples": self.samples(name), "shards": [dataclasses.asdict(s) for s in shards]}
        content = {
            "version": VERSION,
            "source": self.source,
            "image": self.image,
            "text": self.text,
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
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}, this program reads {VERSION}; pack it again")
        splits = {}
        for name, part in raw["splits"].items():
            splits[name] = [Shard(**shard) for shard in part["shards"]]
            for shard in splits[name]:
                _check_relative(shard.file)
                _check_relative(shard.index)
        _check_relative(raw["text"].get("file") or "")
        return cls(folder, raw["image"], raw["text"], splits, raw.get("skipped", {}), raw.get("source", {}))

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


def _check_relative(name: str) -> None:
    """Raise ValueError for a path outside the data set's folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the data set's folder")


def members(tar: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of an untrusted tar; nothing is ever unpacked under a name that the tar chooses.

    Args:
        where: the name of the tar in error messages.

    Raises:
        ValueError: a member has an absolute path or one with `..`, or is a link or a device; or the tar is truncated.
    """
    try:
        for member in tar:
            name = member.name.replace("\\", "/")
            if name.startswith("/") or ".." in name.split("/") or ":" in name.split("/")[0]:
                raise ValueError(f"{where}: refused, member {member.name!r} leads out of the folder")
            if member.issym() or member.islnk():
                raise ValueError(f"{where}: refused, member {member.name!r} is a link")
            if member.isdir():
                continue
            if not member.isreg():
                raise ValueError(f"{where}: refused, member {member.name!r} is not a regular file")
            yield member
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{where}: truncated or not a tar file ({error})") from None


_HEADERS: dict[bytes, tuple] = {}  # parsed headers (shape, dtype, start): most samples of a data set share theirs


def read_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file's bytes; pickled objects are refused.

    Raises:
        ValueError: not an .npy file, or truncated.
    """
    header = _HEADERS.get(data[:NPY_HEADER])
    if header is None:
        header = _parse_npy_header(data)
        if header[2] == NPY_HEADER and len(_HEADERS) < 256:
            _HEADERS[data[:NPY_HEADER]] = header
    shape, dtype, start = header
    count = math.prod(shape)
    if len(data) != start + count * dtype.itemsize:
        raise ValueError(f"an array {shape} of {dtype} with {len(data) - start} bytes")
    return np.frombuffer(data, dtype, count, start).reshape(shape)


def _parse_npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of the array, and the offset of its values in bytes."""
    buffer = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(buffer)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(buffer)
    except (ValueError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"not an .npy array ({error})") from None
    if fortran or dtype.hasobject:
        raise ValueError("not a plain array in C order")
    return shape, dtype, buffer.tell()
