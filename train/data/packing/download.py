"""Download of one file over HTTP that can be resumed."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ATTEMPTS = 4
Report = Callable[[int, int | None], None]  # (bytes received, bytes expected or None)


def download(
    url: str, path: Path, attempts: int = ATTEMPTS, timeout: float = 60.0, report: Report | None = None
) -> None:
    """Fetch `url` to `path`; an interrupted download is resumed if the server still has the same file.

    The partial file and the ETag of its content are kept beside `path` until the download is complete.

    Args:
        timeout: of the connection, in seconds.
        report: called with the bytes received so far and the bytes expected, if the server gave a length.

    Raises:
        ValueError: not available, or interrupted `attempts` times; what was received is kept for the next call.
    """
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    problem = ""
    for _ in range(attempts):
        try:
            expected = _attempt(url, part, tag, timeout, report)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise ValueError(f"{url}: {error.code} {error.reason}") from None
            part.unlink(missing_ok=True)
            continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = f"{url}: {' '.join(str(getattr(error, 'reason', error)).split())}"
            continue
        received = part.stat().st_size
        if expected is None or received == expected:
            os.replace(part, path)
            tag.unlink(missing_ok=True)
            return
        problem = f"{url} broke off after {received} of {expected} bytes; run again to resume"
    raise ValueError(problem or f"{url} could not be downloaded")


def _attempt(url: str, part: Path, tag: Path, timeout: float, report: Report | None) -> int | None:
    """Request the file, or the rest of it, into `part`; returns the expected size of the whole file, if known."""
    have = part.stat().st_size if part.exists() else 0
    etag = tag.read_text() if tag.exists() else ""
    request = urllib.request.Request(url)
    if have and etag:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", etag)
    else:
        have = 0
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if getattr(response, "status", None) != 206:
            have = 0
        tag.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        length = response.headers.get("Content-Length")
        expected = have + int(length) if length else None
        _write_body(response, part, have, expected, report)
    return expected


def _write_body(
    response: http.client.HTTPResponse, part: Path, have: int, expected: int | None, report: Report | None
) -> None:
    """Append a response to the first `have` bytes of a file."""
    with part.open("r+b" if have else "wb") as file:
        file.seek(have)
        file.truncate()
        try:
            while block := response.read(1 << 16):
                file.write(block)
                if report is not None:
                    report(file.tell(), expected)
        except http.client.IncompleteRead as error:
            file.write(error.partial)
