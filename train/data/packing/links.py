"""A list of links to tar files of pictures, as for the SAM data: download, encode, delete, one tar after the other."""

from __future__ import annotations

import hashlib
import re
import tarfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from ..packed.shards import members
from .caption_tables import CaptionIndex
from .download import download
from .sources import PICTURES, Job, Raw, Source


class Links(Source):
    """Lines `NAME.tar<tab>URL`; lines that start with # are left out, a first line of column names too.

    Each tar becomes a shard (and one of the held-out split), and is deleted once that is written; the next one is
    fetched meanwhile. Nothing in it is unpacked to disk, so a member cannot be written outside; members that would be
    are refused. The captions come from elsewhere, by the picture's name without folder and ending.

    Raises:
        ValueError: the list cannot be read, or holds something else.
    """

    def __init__(self, path: Path, captions: str | None):
        if captions is None:
            raise ValueError(f"{path}: a list of links needs --captions: a table of keys and captions, or a hub id")
        self.name, self.path, self.source = str(path), path, captions
        self.links: list[tuple[int, str, str]] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            fields = line.split()
            if not fields or line.startswith("#"):
                continue
            if len(fields) != 2 or urllib.parse.urlsplit(fields[1]).scheme not in ("http", "https"):
                if number == 0:
                    continue
                raise ValueError(f"{path}, line {number + 1}: expected NAME.tar and an http link, got {line[:80]!r}")
            self.links.append((number, *fields))
        self.fetching: dict[int, Fetching] = {}
        if not self.links:
            raise ValueError(f"{path} holds no links")

    def jobs(self, shard_size: int, test_share: float, seed: int) -> list[Job]:
        self.test_share, self.seed = test_share, seed
        return [
            Job(
                number,
                f"links/{number:05d}-{re.sub(r'[^A-Za-z0-9_-]', '_', Path(name).stem)}",
                None,
                (number, name, url),
            )
            for number, name, url in self.links
        ]

    def prepare(self, work: Path, main: bool) -> None:
        super().prepare(work, main)
        database = work / "captions.sqlite"
        self.index = CaptionIndex.build(self.source, database) if main else CaptionIndex(database)

    def captions(self) -> Iterator[str]:
        yield from self.index

    def read(self, job: Job) -> Iterator[Raw]:
        number, name, _ = job.rows
        file = self._file(job)
        self.ahead([job])
        fetching = self.fetching.pop(job.number)
        fetching.join()
        if fetching.error is not None:
            raise fetching.error
        self.note(name)
        try:
            with tarfile.open(file) as tar:
                pictures = (m for m in members(tar, name) if PurePosixPath(m.name).suffix.lower() in PICTURES)
                for k, member in enumerate(pictures):
                    key = PurePosixPath(member.name).stem
                    data = tar.extractfile(member).read()
                    split = "test" if self._draw(key) < self.test_share else "train"
                    yield Raw(number * 10**6 + k, split, f"{name}/{member.name}", data, self.index[key], {"key": key})
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{name}: cut off or not a tar file ({error}); {self._cure(file, number)}") from None
        except ValueError as error:
            raise ValueError(f"{error}; {self._cure(file, number)}") from None

    def ahead(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.number not in self.fetching:
                self.fetching[job.number] = Fetching(self._file(job), *job.rows[1:], lambda text: self.note(text))

    def done(self, job: Job) -> None:
        self._file(job).unlink(missing_ok=True)

    def close(self) -> None:
        for fetching in self.fetching.values():
            fetching.stopped = True
        for fetching in self.fetching.values():
            fetching.join()

    def _file(self, job: Job) -> Path:
        return self.work / "downloads" / f"{job.number:05d}.tar"

    def _cure(self, file: Path, number: int) -> str:
        return f"delete {file} to fetch it again, or put # before line {number + 1} of {self.path} to leave it out"

    def _draw(self, key: str) -> float:
        """A number in [0, 1) that belongs to a key."""
        digest = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


class Fetching(threading.Thread):
    """The download of one tar in the background; `error` is what went wrong, once it has ended."""

    def __init__(self, file: Path, name: str, url: str, note: Callable[[str], None]):
        super().__init__(daemon=True)
        self.file, self.url, self.tar, self.note = file, url, name, note
        self.error, self.stopped = None, False
        self.start()

    def run(self) -> None:
        try:
            self.file.parent.mkdir(exist_ok=True)
            if not self.file.is_file():
                download(self.url, self.file, report=self.report)
        except (ValueError, OSError) as error:
            self.error = error
        except Stopped:
            pass

    def report(self, got: int, size: int | None) -> None:
        if self.stopped:
            raise Stopped
        self.note(_amount(self.tar, got, size))


class Stopped(Exception):
    """The run ends, and with it a download; what came is kept."""


def _amount(name: str, got: int, size: int | None) -> str:
    return f"{name}: {got / 2**20:,.0f}" + (f" of {size / 2**20:,.0f} MiB" if size else " MiB")
