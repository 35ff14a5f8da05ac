"""Structure of the package: folders are layers, imports are never circular, files and functions are short."""

from __future__ import annotations

import ast
import graphlib
import re
import statistics
from pathlib import Path

import pytest

import anystate
from anystate.configs.kinds import shipped_kinds

ROOT = Path(anystate.__file__).parent
LAYERS = ["configs", "kernels", "diffusion", "model", "sample", "train", "bench"]  # a folder imports those before it
FILES = [path for folder in LAYERS for path in sorted((ROOT / folder).rglob("*.py"))]
TOP = [ROOT / "cli.py", ROOT / "__main__.py", ROOT / "__init__.py"]
KINDS = shipped_kinds()
CLASSES = [kind.capitalize() for kind in KINDS]
# These write sections of configs for files and options of earlier versions, and may say {"kind": …} there, no more;
# `configs/aliases.py` also has a table of them.
EARLIER = ["configs/aliases.py", "train/data/packed/version1.py", "train/data/packing/image_text.py"]


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
    assert sum(n for path, n in lines.items() if path.relative_to(ROOT).parts[0] == "train") <= 5600
    functions = (
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert statistics.median(functions) <= 8


def kinds_named_in(source: str, sections: bool = True) -> list[str]:
    """What in a source code depends on a kind of modality: the place and the code.

    sections: dict displays of a config's section, {"kind": "image", …}, count as well.
    """
    tree, found = ast.parse(source), []
    foreign = foreign_names(tree)
    for node in ast.walk(tree):
        if _depends_on_a_kind(node, foreign) or (sections and _is_section(node)):
            found.append(f"{node.lineno}: {ast.unparse(node)[:100]}")
    return found


def foreign_names(tree: ast.AST) -> set[str]:
    """The names that are imported from other packages: PIL has a class Image too."""
    names = set()
    for node in ast.walk(tree):
        is_from = isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("anystate")
        if is_from or isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names - {"anystate"}


def _depends_on_a_kind(node: ast.AST, foreign: set[str]) -> bool:
    """Whether it imports a kind, asks for one by name, compares or matches with a name, or tests for its class."""
    names = "|".join(KINDS)
    if isinstance(node, ast.ImportFrom):
        place, imported = f".{node.module or ''}", {alias.name for alias in node.names}
        of_kind = re.search(rf"\.modalities\.({names})$", place) is not None
        return of_kind or (place.endswith(".modalities") and bool(imported & set(KINDS)))
    if isinstance(node, ast.Import):
        return any(re.search(rf"\.modalities\.({names})$", alias.name) for alias in node.names)
    if isinstance(node, ast.Constant):  # of import_module, or package.module:Class
        return isinstance(node.value, str) and re.search(rf"\bmodel\.modalities\.({names})\b", node.value) is not None
    if isinstance(node, ast.Compare):
        return any(constant in KINDS for side in (node.left, *node.comparators) for constant in constants(side))
    if isinstance(node, ast.MatchValue):
        return any(constant in KINDS for constant in constants(node.value))
    if isinstance(node, ast.Call):
        asked = name_of(node.func) in ("find_kind", "import_object")
        tested = name_of(node.func) in ("isinstance", "issubclass") and _has_class(node.args[1], foreign)
        return tested or (asked and any(constant in KINDS for constant in constants(node.args[0])))
    return False


def _has_class(node: ast.AST, foreign: set[str]) -> bool:
    """Whether a class, or one of a tuple or union, has the name of a kind's and is not of another package."""
    parts = [n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)]
    return any(name_of(n) in CLASSES and ast.unparse(n).split(".")[0] not in foreign for n in parts)


def name_of(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return getattr(node, "id", getattr(node, "attr", ""))


def _is_section(node: ast.AST) -> bool:
    """A dict display or call with kind = the name of a kind."""
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return any("kind" in constants(key) and set(constants(value)) & set(KINDS) for key, value in pairs if key)
    if isinstance(node, ast.Call):
        return any(k.arg == "kind" and set(constants(k.value)) & set(KINDS) for k in node.keywords)
    return False


def constants(node: ast.AST) -> list[str]:
    """The string of a constant, or those of a tuple, list or set display."""
    elements = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return [e.value for e in elements if isinstance(e, ast.Constant) and isinstance(e.value, str)]


@pytest.mark.parametrize("path", [*FILES, *TOP], ids=lambda path: str(path.relative_to(ROOT)))
def test_kinds_are_named_in_their_files_only(path):
    """A kind is one file of model/modalities/ (and its codec): no other file knows which kinds there are."""
    place = str(path.relative_to(ROOT))
    if not place.startswith(("model/modalities/", "model/codecs/")):
        assert not kinds_named_in(path.read_text(encoding="utf-8"), sections=place not in EARLIER)


@pytest.mark.parametrize(
    "source",
    [
        "from .modalities.image import Image",
        "from ..model.modalities import text",
        "from anystate.model.modalities.columns import Columns",
        "import anystate.model.modalities.label",
        "find('anystate.model.modalities.vector:Vector')",
        "m.kind == 'image'",
        "'text' in names",
        "kind in ('label', 'other')",
        "'image' != kind",
        "match kind:\n  case 'series':\n    pass",
        "isinstance(m, Image)",
        "isinstance(m, (int, kinds.Columns))",
        "from .modalities import base\nisinstance(m, base.Text | None)",
        "find_kind('image')",
        "section = {'kind': 'vector', 'size': 3}",
        "dict(kind='label')",
    ],
)
def test_the_check_finds_kinds(source):
    assert kinds_named_in(source)


@pytest.mark.parametrize(
    "source",
    [
        "from .modalities.base import Modality",
        "from PIL import Image",
        "x['image'] = x.get('text')",
        "KINDS = {'gaussian': 'image'}",
        "column.kind == 'identifier'",
        "{'kind': 'mmdit'}",
        "isinstance(m, Modality)",
        "from PIL import Image\nisinstance(m, Image.Image)",
        "import datasets\nisinstance(m, datasets.Image)",
        "load_config('digits', ['modalities.text.length=3'])",
        "f('image', 'text')",
    ],
)
def test_the_check_finds_nothing_else(source):
    assert not kinds_named_in(source)


def test_a_kind_is_one_short_file():
    lines = {
        kind: len((ROOT / f"model/modalities/{kind}.py").read_text(encoding="utf-8").splitlines()) for kind in KINDS
    }
    assert all(n <= 150 for kind, n in lines.items() if kind != "columns"), lines
