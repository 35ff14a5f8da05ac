"""Atomic writing of files."""

from __future__ import annotations

import os

import pytest

from anystate.model.storage import atomic_write


def test_a_kill_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "new" / "rows.json"
    atomic_write(file, "β\n")
    assert file.read_bytes() == "β\n".encode()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            atomic_write(file, b"half")
    assert file.read_bytes() == "β\n".encode()
    atomic_write(file, b"whole")
    assert file.read_bytes() == b"whole"
    assert os.listdir(file.parent) == ["rows.json"]
