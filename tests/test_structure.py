"""Structure of the package: folders are layers, imports are never circular, files and functions are short."""

from __future__ import annotations

import ast
import graphlib
import statistics
from pathlib import Path

import pytest

import anystate

ROOT = Path(anystate.__file__).parent
LAYERS = ["configs", "kernels", "diffusion", "model", "sample", "train", "bench"]  # a folder imports those before it
FILES = [path for folder in LAYERS for path in sorted((ROOT / folder).rglob("*.py"))]
TOP = [ROOT / "cli.py", ROOT / "__main__.py", ROOT / "__init__.py"]


def imports(path: Path, root: Path = ROOT) -> set[Path]:
    """The files of the package that a file imports, at its top or inside functions."""
    parts, found = path.relative_to(root).parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = root.joinpath(*parts[: len(parts) - node.level])
            elif node.module == "anystate" or node.module.startswith("anystate."):
                base = root
            else:
                continue
            names = (node.module or "").removeprefix("anystate").strip(".").split(".")
            base = base.joinpath(*[name for name in names if name])
            found |= {file_of(base / alias.name) or file_of(base) for alias in node.names}
        elif isinstance(node, ast.Import):
            ours = [alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("anystate.")]
            found |= {file_of(root.joinpath(*name)) for name in ours}
    return found - {None}


def file_of(place: Path) -> Path | None:
    """The file of a module, if it is one of this package."""
    for file in (place.with_name(place.name + ".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None


def layer(path: Path, root: Path = ROOT) -> int:
    """The layer of a file; the command line is above all folders."""
    folder = path.relative_to(root).parts[0]
    return LAYERS.index(folder) if folder in LAYERS else len(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_from_lower_layers_only(path):
    assert not [str(other.relative_to(ROOT)) for other in imports(path) if layer(other) > layer(path)]


def test_no_circular_imports():
    # a folder's __init__ gathers the names of its files, which do not import it back
    graph = {path: imports(path) for path in [*FILES, *TOP]}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_the_check_finds_imports(tmp_path):
    for folder in LAYERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    file, other = tmp_path / "kernels" / "bad.py", tmp_path / "train" / "trainer.py"
    other.touch()
    file.write_text(
        "from ..diffusion import Space\ndef f():\n    from .. import model\n    import anystate.train.trainer\n"
    )
    assert imports(file, tmp_path) == {tmp_path / "diffusion/__init__.py", tmp_path / "model/__init__.py", other}
    assert layer(other, tmp_path) > layer(file, tmp_path)


def test_files_and_functions_are_short():
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > 400 and "kernels" not in path.parts}
    assert sum(n for path, n in lines.items() if path.relative_to(ROOT).parts[0] == "train") <= 4500
    functions = (
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert statistics.median(functions) <= 8
