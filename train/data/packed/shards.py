"""Packed data on disk: WebDataset tar shards and their DALI index files; `manifest` describes a data set of them.

A sample is one member of a tar for every part of its modalities, `KEY.NAME.npy`, in the order of the data set's
description, and `KEY.json` with annotations. DALI needs all members of all samples, with the same number of axes: a
modality that a sample lacks is an array of no versions, (0, …). An index file is identical to what NVIDIA's `wds2idx`
writes for the same tar: the line `v1.2 N`, then one line per sample with the extension, offset, size and name of each
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
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ....model.storage import atomic_write

LABELS = "json"  # extension of the annotations
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

    def add(self, key: str, arrays: Mapping[str, np.ndarray], labels: dict) -> None:
        """Append one sample: {name of a part: its array}, and annotations as JSON."""
        fields, content = [], {extension(name): npy(array) for name, array in arrays.items()}
        for ending, data in {**content, LABELS: _json(labels)}.items():
            entry = tarfile.TarInfo(f"{key}.{ending}")
            entry.size = len(data)
            fields.append(f"{ending} {self.tar.offset + BLOCK} {len(data)} {entry.name}")
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


def extension(name: str) -> str:
    """The extension of the member with the array of a part."""
    return f"{name}.npy"


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

    def member(self, sample: int, ending: str) -> tuple[int, int, str]:
        """Offset and size in bytes, and name, of the member of a sample with this extension."""
        fields = self.lines[sample].split(" ")
        start = fields.index(ending)
        offset, size, name = fields[start + 1 : start + 4]
        return int(offset), int(size), name


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
