"""A setting of the process for computing on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_memory() -> None:
    """Make glibc keep freed memory instead of returning large blocks to the system; other systems are left alone.

    By default a block that the next operation needs again comes back page by page, zeroed: a tenth of the time of
    training on digits (docs/performance.md).
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(M_MMAP_THRESHOLD, 2**30)
