"""The house keeps its order: imports run one way, files stay about one thing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import anystate

ROOT = Path(anystate.__file__).parent
ALLOWED = {  # folder: the folders it may import
    "kernels": set(),
    "configs": set(),
    "diffusion": {"kernels"},
    "model": {"kernels", "configs"},
    "sample": {"kernels", "diffusion"},
    "train": {"kernels", "diffusion", "model", "sample", "configs"},
    "bench": {"kernels", "diffusion", "model", "sample", "train", "configs"},
}
FILES = [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_folders(path: Path) -> set[str]:
    """Top-level folders of ours that a file imports, relative and absolute imports alike."""
    found = set()
    parts = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = list(parts[: len(parts) - node.level])
                target = base + (node.module.split(".") if node.module else [])
                names = [target[0]] if target else [alias.name for alias in node.names]
            else:
                names = node.module.split(".")[1:2] if node.module.startswith("anystate.") else []
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("anystate."))
    return found & set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    assert imported_folders(path) <= ALLOWED[folder] | {folder}


def test_the_check_sees_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "bad.py"
    file.write_text("from ..diffusion import Space\nfrom .. import model\nimport anystate.train.loop\n")
    assert imported_folders(file) == {"diffusion", "model", "train"}


def test_no_grab_bags_and_no_giants():
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 500}
    assert not long
