"""Download of one file over HTTP, resumed where it broke off."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ATTEMPTS = 4


def download(
    url: str,
    path: Path,
    attempts: int = ATTEMPTS,
    timeout: float = 60.0,
    report: Callable[[int, int | None], None] = lambda got, expected: None,
) -> None:
    """Fetch `url` to `path`, going on where a broken-off download ended if the server still has the same file.

    report: called with the bytes got so far and those expected, if the server said.

    Raises:
        ValueError: it cannot be had, or broke off `attempts` times; what came is kept for the next call.
    """
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    problem = ""
    for _ in range(attempts):
        have = part.stat().st_size if part.exists() else 0
        known = tag.read_text() if tag.exists() else ""
        request = urllib.request.Request(url)
        if have and known:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", known)
        else:
            have = 0
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                if getattr(response, "status", None) != 206:
                    have = 0
                tag.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
                length = response.headers.get("Content-Length")
                expected = have + int(length) if length else None
                _stream(response, part, have, lambda got, expected=expected: report(got, expected))
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise ValueError(f"{url}: {error.code} {error.reason}") from None
            part.unlink(missing_ok=True)
            continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = f"{url}: {' '.join(str(getattr(error, 'reason', error)).split())}"
            continue
        got = part.stat().st_size
        if expected is None or got == expected:
            os.replace(part, path)
            tag.unlink(missing_ok=True)
            return
        problem = f"{url} broke off after {got} of {expected} bytes; run again to go on from there"
    raise ValueError(problem or f"{url} could not be downloaded")


def _stream(response, part: Path, have: int, report: Callable[[int], None]) -> None:
    with part.open("r+b" if have else "wb") as file:
        file.seek(have)
        file.truncate()
        try:
            while block := response.read(1 << 16):
                file.write(block)
                report(file.tell())
        except http.client.IncompleteRead as error:
            file.write(error.partial)
