"""Pages of docs/ that follow the code: generated ones are up to date, and what the others name exists."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import anystate
from anystate.configs import page as settings_page

ROOT = Path(anystate.__file__).parent
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
FOLDERS = ["configs", "kernels", "diffusion", "model", "sample", "train", "bench"]
FILES = re.findall(r"`((?:\w+/)*\w+\.(?:py|md|json|sh))(?::([\w.]+))?`", ARCHITECTURE)


def names_in(path: Path) -> set[str]:
    """Functions, classes and `Class.method`s at the top level of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "name"), sorted(set(FILES)))
def test_what_the_architecture_names_exists(file, name):
    assert (ROOT / file).is_file()
    assert not name or name in names_in(ROOT / file)


def test_the_architecture_lists_every_file():
    files = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    missing = sorted(file for file in files - {file for file, _ in FILES} if not file.endswith("__init__.py"))
    assert not missing, "docs/architecture.md needs a line for each"


def test_the_page_of_settings_is_up_to_date():
    written = settings_page.PATH.read_text(encoding="utf-8")
    assert written == settings_page.page(), "run: make pages"


def test_the_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert make_api.PATH.read_text(encoding="utf-8") == make_api.page(), "run: make pages"


def test_every_environment_variable_is_listed():
    code = [
        path for folder in [*FOLDERS, "tests"] for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")
    ]
    used = {name for path in code for name in re.findall(r"ANYSTATE_[A-Z0-9_]+", path.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"`(ANYSTATE_[A-Z0-9_]+)`", (ROOT / "docs/environment.md").read_text(encoding="utf-8")))
    assert used == listed
