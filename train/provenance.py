"""Where a number comes from, to lie beside it: a result without its machine and versions says little."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..configs.version import __version__

PACKAGES = ("triton", "flash_attn", "flash-attn-4", "liger_kernel", "numpy", "pandas", "scikit-learn")
PACKAGES += ("xgboost", "xgboost-cpu", "sdmetrics")


def origin(device: torch.device | str | None = None) -> dict:
    """Device, threads, cores and load of the machine, versions, commit and UTC date.

    device: what computed the number; default the GPU, where there is one.
    """
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    versions = {"anystate": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    revision = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed copy without a repository
        commit = os.environ.get("ANYSTATE_COMMIT", "unknown")  # a machine that got the files alone is told
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "cpu"
