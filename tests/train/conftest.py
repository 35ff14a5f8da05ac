"""A digits run small enough for tests: a few hundred parameters' worth of everything."""

from __future__ import annotations

import pytest

from anystate.configs import schema

TINY = [
    "modalities.image.stream.width=16",
    "modalities.text.stream.width=16",
    "network.depth=1",
    "network.heads=2",
    "network.head_dim=8",
    "train.batch=16",
    "train.steps=6",
    "train.save_every=3",
    "train.log_every=1",
    "train.warmup=2",
    "sample.steps=3",
    "sample.chunk=8",
]


@pytest.fixture(scope="session")
def tiny():
    """tiny("train.steps=3") → Config."""
    return lambda *overrides: schema.load("digits", [*TINY, *overrides])


@pytest.fixture(scope="session")
def tiny_overrides():
    return list(TINY)
