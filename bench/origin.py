"""Where a measured number comes from, to lie beside it in `bench/results/`."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
from pathlib import Path

from ..train.log import environment

PACKAGES = ("numpy", "pandas", "scikit-learn", "xgboost", "xgboost-cpu", "sdmetrics", "triton")


def origin() -> dict[str, str | int]:
    """Machine, its load, versions, commit and UTC date."""
    found = environment()
    if found["device"] in ("", "cpu"):
        found["device"] = _processor()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores, now = os.cpu_count() or 1, datetime.datetime.now(datetime.UTC)
    return {**found, "cores": cores, "load": round(os.getloadavg()[0], 1), "date": now.strftime("%Y-%m-%d %H:%M")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
