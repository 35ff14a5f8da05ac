"""Packed data on disk: WebDataset tar shards, their DALI index files, and the `dataset.yaml` that describes them.

A sample is three members of a tar in this order: `KEY.image.npy`, `KEY.text.npy`, `KEY.json`. An index file is
what NVIDIA's `wds2idx` writes for the same tar: `v1.2 N`, then per sample extension, offset, size and name of each
member.
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

from ....model.storage import atomic_write

VERSION = 1
MANIFEST = "dataset.yaml"
IMAGE, TEXT, LABELS = "image.npy", "text.npy", "json"
BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar and what it must be; paths are relative to the data set's folder."""

    file: str
    index: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


class ShardWriter:
    """Writes a tar and its index under temporary names; `close` renames both, so a shard is whole or not there."""

    def __init__(self, folder: Path, file: str):
        self.folder, self.file, self.index = folder, file, str(Path(file).with_suffix(".idx"))
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        self.partial = folder / f"{file}.partial"
        self.raw = _Hashed(self.partial)
        self.tar = tarfile.open(fileobj=self.raw, mode="w|", format=tarfile.USTAR_FORMAT, bufsize=BLOCK * 128)  # noqa: SIM115
        self.lines: list[str] = []

    def add(self, key: str, image: np.ndarray, tokens: np.ndarray, labels: dict) -> None:
        """Append one sample: image as it is stored, tokens (M, L) int32, labels as JSON."""
        parts = []
        for extension, data in ((IMAGE, npy(image)), (TEXT, npy(tokens)), (LABELS, _json(labels))):
            entry = tarfile.TarInfo(f"{key}.{extension}")
            entry.size = len(data)
            parts.append(f"{extension} {self.tar.offset + BLOCK} {len(data)} {entry.name}")
            self.tar.addfile(entry, io.BytesIO(data))
        self.lines.append(" ".join(parts))

    def close(self) -> Shard:
        self.tar.close()
        size, digest = self.raw.close()
        index = index_text(self.lines).encode()
        atomic_write(self.folder / self.index, index)
        os.replace(self.partial, self.folder / self.file)
        return Shard(self.file, self.index, len(self.lines), size, digest, hashlib.sha256(index).hexdigest())

    def discard(self) -> None:
        """Give up: nothing stays behind."""
        self.raw.close()
        self.partial.unlink(missing_ok=True)


class _Hashed:
    """A file that is written in order and knows its size and SHA-256 at the end."""

    def __init__(self, path: Path):
        self.file, self.digest, self.size = open(path, "wb"), hashlib.sha256(), 0  # noqa: SIM115

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def close(self) -> tuple[int, str]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.size, self.digest.hexdigest()


def npy(array: np.ndarray) -> bytes:
    """An array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _json(labels: dict) -> bytes:
    return json.dumps(labels, ensure_ascii=False).encode()


def index_text(lines: list[str]) -> str:
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


@dataclasses.dataclass(frozen=True)
class Index:
    """The samples of a shard: their index lines, and where each member lies."""

    lines: list[str]

    def member(self, sample: int, extension: str) -> tuple[int, int, str]:
        """Offset, size and name of one member."""
        fields = self.lines[sample].split(" ")
        at = fields.index(extension)
        return int(fields[at + 1]), int(fields[at + 2]), fields[at + 3]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`dataset.yaml`: what is stored and how to read it.

    Args:
        image: kind (pixels or latents), channels and size of the diffused tensor, pixel_max; for latents vae, scale.
        text: kind (characters, bpe or clip), length, states, pad, start, end, alphabet or file.
        splits: {split: shards}.
    """

    folder: Path
    image: dict
    text: dict
    splits: dict[str, list[Shard]]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    source: dict = dataclasses.field(default_factory=dict)

    def samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.splits[split])

    def save(self) -> None:
        """Write it whole or not at all."""
        splits = {
            name: {"samples": self.samples(name), "shards": [dataclasses.asdict(s) for s in shards]}
            for name, shards in self.splits.items()
        }
        head = {"version": VERSION, "source": self.source, "image": self.image, "text": self.text}
        text = yaml.safe_dump(
            {**head, "skipped": self.skipped, "splits": splits}, sort_keys=False, allow_unicode=True, width=120
        )
        atomic_write(self.folder / MANIFEST, text)

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """The manifest of a folder.

        Raises:
            ValueError: not there, not readable, or of another version.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{folder} is not a packed data set: it has no {MANIFEST}; make one with anystate data pack"
            )
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
            if raw["version"] != VERSION:
                raise ValueError(f"version {raw['version']}, this program reads {VERSION}; pack it again")
            splits = {name: [Shard(**s) for s in part["shards"]] for name, part in raw["splits"].items()}
            for shard in (s for part in splits.values() for s in part):
                _inside(shard.file), _inside(shard.index)
            _inside(raw["text"].get("file") or "")
            return cls(path.parent, raw["image"], raw["text"], splits, raw.get("skipped", {}), raw.get("source", {}))
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a readable description of a packed data set ({error})") from None

    def open(self, shard: Shard, checksum: bool = False) -> Index:
        """The index of a shard, after checking that shard and index are the ones that were packed.

        Raises:
            ValueError: a file is missing, cut off, changed, or index and shard do not belong together.
        """
        tar, index = self.folder / shard.file, self.folder / shard.index
        cure = "delete it and run the same anystate data pack again, or copy it afresh"
        for path in (tar, index):
            if not path.is_file():
                raise ValueError(f"{path} is missing; {cure}")
        size = tar.stat().st_size
        if size != shard.bytes:
            what = "cut off" if size < shard.bytes else "not what was packed"
            raise ValueError(f"{tar} is {what}: {size} bytes, {shard.bytes} were packed; {cure}")
        data = index.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise ValueError(f"{index} does not match its shard {tar.name}: another checksum than was packed; {cure}")
        if checksum and sha256(tar) != shard.sha256:
            raise ValueError(f"{tar} was changed: another checksum than was packed; {cure}")
        return Index(data.decode().splitlines()[1:])


def _inside(name: str) -> None:
    """Refuse a path that leads out of the data set's folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the data set's folder")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(tar: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a foreign tar; nothing is ever unpacked under a name the tar chooses.

    Raises:
        ValueError: a member is absolute, climbs with `..`, is a link or a device; or the tar is cut off.
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
        raise ValueError(f"{where}: cut off or not a tar file ({error})") from None


def read_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file's bytes; never unpickles.

    Raises:
        ValueError: not one, or cut off.
    """
    header = HEADERS.get(data[: BLOCK // 4])
    if header is None:
        buffer = io.BytesIO(data)
        try:
            version = np.lib.format.read_magic(buffer)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(buffer)
        except (ValueError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"not an .npy array ({error})") from None
        if fortran or dtype.hasobject:
            raise ValueError("not a plain array in C order")
        header = shape, dtype, buffer.tell()
        if buffer.tell() == BLOCK // 4 and len(HEADERS) < 256:
            HEADERS[data[: BLOCK // 4]] = header
    shape, dtype, start = header
    count = math.prod(shape)
    if len(data) != start + count * dtype.itemsize:
        raise ValueError(f"an array {shape} of {dtype} with {len(data) - start} bytes")
    return np.frombuffer(data, dtype, count, start).reshape(shape)


HEADERS: dict[bytes, tuple] = {}  # parsed headers: the samples of a set share theirs
