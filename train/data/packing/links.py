"""A list of links to tar files of images, as for the SAM data: each tar is downloaded, encoded and deleted."""

from __future__ import annotations

import hashlib
import re
import tarfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..packed.shards import members
from .caption_tables import CaptionIndex
from .download import download
from .sources import IMAGE_SUFFIXES, Job, RawSample, RawSource, image_text


class LinkSource(RawSource):
    """A file of lines `NAME.tar<tab>URL`; a first line of column names and lines that start with # are ignored.

    Each tar becomes a shard (and one of the held-out split) and is deleted once that is written; the next tar is
    downloaded meanwhile. Tars are never unpacked to disk, and members with paths outside the folder are refused.
    Captions come from a separate table, by the image's file name without folder and suffix.

    Raises:
        ValueError: the list cannot be read or has other content.
    """

    def __init__(self, path: Path, captions: str | None):
        if captions is None:
            raise ValueError(f"{path}: a list of links needs --captions: a table of keys and captions, or a hub id")
        self.name, self.path, self.caption_source = str(path), path, captions
        self.links = _read_links(path)
        self.downloads: dict[int, Download] = {}

    def jobs(self, shard_size: int, test_share: float, seed: int) -> list[Job]:
        self.test_share, self.seed = test_share, seed
        jobs = []
        for number, name, url in self.links:
            safe_name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)
            jobs.append(Job(number, f"links/{number:05d}-{safe_name}", None, (number, name, url)))
        return jobs

    def prepare(self, work: Path, main: bool) -> None:
        super().prepare(work, main)
        database = work / "captions.sqlite"
        self.index = CaptionIndex.build(self.caption_source, database) if main else CaptionIndex(database)

    def captions(self) -> Iterator[str]:
        yield from self.index

    def read(self, job: Job) -> Iterator[RawSample]:
        number, name, _ = job.rows
        file = self._file(job)
        self.prefetch([job])
        pending = self.downloads.pop(job.number)
        pending.join()
        if pending.error is not None:
            raise pending.error
        self.note(name)
        try:
            yield from self._read_tar(file, number, name)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{name}: truncated or not a tar file ({error}); {self._remedy(file, number)}") from None
        except ValueError as error:
            raise ValueError(f"{error}; {self._remedy(file, number)}") from None

    def _read_tar(self, file: Path, number: int, name: str) -> Iterator[RawSample]:
        with tarfile.open(file) as tar:
            images = (m for m in members(tar, name) if PurePosixPath(m.name).suffix.lower() in IMAGE_SUFFIXES)
            for k, member in enumerate(images):
                key = PurePosixPath(member.name).stem
                data = tar.extractfile(member).read()
                split = "test" if self._uniform(key) < self.test_share else "train"
                where = f"{name}/{member.name}"
                yield RawSample(number * 10**6 + k, split, where, image_text(data, self.index[key]), {"key": key})

    def prefetch(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.number not in self.downloads:
                self.downloads[job.number] = Download(self, self._file(job), *job.rows[1:])

    def done(self, job: Job) -> None:
        self._file(job).unlink(missing_ok=True)

    def close(self) -> None:
        for pending in self.downloads.values():
            pending.cancelled = True
        for pending in self.downloads.values():
            pending.join()

    def _file(self, job: Job) -> Path:
        return self.work / "downloads" / f"{job.number:05d}.tar"

    def _remedy(self, file: Path, number: int) -> str:
        return f"delete {file} to download it again, or put # before line {number + 1} of {self.path} to leave it out"

    def _uniform(self, key: str) -> float:
        """A number in [0, 1), a function of the seed and the key."""
        digest = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


def _read_links(path: Path) -> list[tuple[int, str, str]]:
    """(line number from 0, name, url) of each link of a list."""
    links = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        if len(fields) == 2 and urllib.parse.urlsplit(fields[1]).scheme in ("http", "https"):
            links.append((number, *fields))
        elif number > 0:  # the first line may hold column names
            raise ValueError(f"{path}, line {number + 1}: expected NAME.tar and an http link, got {line[:80]!r}")
    if not links:
        raise ValueError(f"{path} holds no links")
    return links


class Download(threading.Thread):
    """The download of one tar in a thread that starts at once.

    `error` is the failure, if any, once the thread has ended; setting `cancelled` stops it, and the next run resumes.
    """

    def __init__(self, source: RawSource, file: Path, name: str, url: str):
        super().__init__(daemon=True)
        self.source, self.file, self.tar, self.url = source, file, name, url
        self.error: Exception | None = None
        self.cancelled = False
        self.start()

    def run(self) -> None:
        try:
            self.file.parent.mkdir(exist_ok=True)
            if not self.file.is_file():
                download(self.url, self.file, report=self._report)
        except (ValueError, OSError) as error:
            self.error = error
        except Cancelled:
            pass

    def _report(self, received: int, expected: int | None) -> None:
        if self.cancelled:
            raise Cancelled
        amount = f"{received / 2**20:,.0f}" + (f" of {expected / 2**20:,.0f} MiB" if expected else " MiB")
        self.source.note(f"{self.tar}: {amount}")


class Cancelled(Exception):
    """Ends a download when packing stops; the part received is kept."""
