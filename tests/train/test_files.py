"""Files that are whole or not there."""

from __future__ import annotations

import os

import pytest

from anystate.train.files import write_whole


def test_a_kill_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "new" / "rows.json"
    write_whole(file, "β\n")
    assert file.read_bytes() == "β\n".encode()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_whole(file, b"half")
    assert file.read_bytes() == "β\n".encode()
    write_whole(file, b"whole")
    assert file.read_bytes() == b"whole"
    assert os.listdir(file.parent) == ["rows.json"]
