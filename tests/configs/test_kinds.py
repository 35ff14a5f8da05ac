"""Kinds of modalities by name: those of the package, entry points, and classes of one's own."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from anystate import Modality, load_config
from anystate.configs.kinds import find_kind, import_object, shipped_kinds
from anystate.configs.load import ConfigError, parse_config

DIAL = """
    from anystate import GaussianModality
    from anystate.model.codecs.arrays import ArrayCodec
    from anystate.model.streams import Features


    class Dial(GaussianModality):
        size: int

        def build_codec(self, files):
            return ArrayCodec.from_files((self.size,), True, files)

        def build_process(self, codec):
            return self.gaussian(self.size)

        def build_stream(self, codec):
            return Features.of(self.stream, features=self.size, patch=1)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module("name", source) writes a module into the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    yield write
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def entry_point(folder: Path, line: str) -> None:
    """An installed package, as `importlib.metadata` sees it, with an entry point for kinds."""
    about = folder / "dials-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dials\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[anystate.modalities]\n{line}\n")
    sys.path.insert(0, str(folder))


def refusal(name) -> str:
    with pytest.raises(ValueError) as error:
        find_kind(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_file_of_the_package_is_a_kind():
    kinds = {name: find_kind(name) for name in shipped_kinds()}
    assert {"columns", "image", "label", "series", "text", "vector"} <= set(kinds)
    for name, kind in kinds.items():
        assert issubclass(kind, Modality)
        assert kind.__module__ == f"anystate.model.modalities.{name}"
        assert kind.__doc__


def test_a_class_in_the_working_directory(module):
    module("dial_here", DIAL)
    kind = find_kind("dial_here:Dial")
    assert (kind.__name__, kind.__module__) == ("Dial", "dial_here")
    assert find_kind("dial_here:Dial") is kind


def test_a_kind_of_an_installed_package(module, tmp_path):
    module("dial_installed", DIAL)
    with pytest.raises(ValueError, match="unknown kind 'dial'"):
        find_kind("dial")
    entry_point(tmp_path, "dial = dial_installed:Dial")
    assert find_kind("dial").__module__ == "dial_installed"
    assert "dial_installed" in sys.modules
    assert "and the plug-ins dial, or a class of your own" in refusal("dail")


def test_a_broken_entry_point_harms_no_other_kind(module, tmp_path):
    entry_point(tmp_path, "dial = nowhere_to_be_found:Dial")
    assert "'nowhere_to_be_found:Dial' cannot be imported" in refusal("dial")
    assert list(load_config("digits").modalities) == ["image", "text"]


@pytest.mark.parametrize("name", ["sond", "Image", "base", "__init__", "modalities.image"])
def test_unknown_kinds_name_those_there_are(name):
    line = refusal(name)
    assert line.startswith(f"unknown kind {name!r}; there are columns, image, label")
    assert line.endswith("or a class of your own as package.module:Class")


@pytest.mark.parametrize("name", [None, "", 3, ["image"]])
def test_kinds_that_are_no_names(name):
    assert "is not a name" in refusal(name)


@pytest.mark.parametrize(
    ("source", "name", "parts"),
    [
        (None, "no_such_module:Kind", ["cannot be imported", "No module named 'no_such_module'", "install it"]),
        ("import no_such_library", "broken_a:Kind", ["cannot be imported", "No module named 'no_such_library'"]),
        ("1 / 0", "broken_b:Kind", ["cannot be imported (ZeroDivisionError: division by zero)"]),
        ("raise OSError('first\\nsecond')", "broken_c:Kind", ["cannot be imported (OSError: first second)"]),
        ("class Kind:\n  pass\n def", "broken_d:Kind", ["cannot be imported (IndentationError"]),
        ("Other = 1", "broken_e:Kind", ["the module broken_e has no 'Kind'"]),
        ("Kind = 1", "broken_f:Kind", ["is not a class derived from anystate.Modality"]),
        ("class Kind:\n    pass", "broken_g:Kind", ["is not a class derived from anystate.Modality"]),
        (None, ":Kind", ["cannot be imported"]),
        ("Kind = 1", "broken_h:", ["has no ''"]),
    ],
)
def test_plug_ins_that_cannot_be_used(module, source, name, parts):
    if source is not None:
        module(name.partition(":")[0], source)
    line = refusal(name)
    assert line.startswith(f"kind {name!r}")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("method", ["build_codec", "build_process", "build_stream"])
def test_a_plug_in_that_lacks_a_method(module, method):
    name = f"dial_without_{method}"
    module(name, DIAL.replace(f"def {method}", "def another"))
    assert refusal(f"{name}:Dial") == f"kind '{name}:Dial' lacks the method {method}; see docs/own-modality.md"


def test_errors_of_a_config_name_the_modality(module):
    module("dial_config", DIAL)
    raw = load_config("digits").model_dump(mode="json")
    for section, message in (
        ({"kind": "sond"}, "here: modalities.dial: unknown kind 'sond'"),
        ({"kind": "no_such:Kind"}, "here: modalities.dial: kind 'no_such:Kind' cannot be imported"),
        ({"kind": "dial_config:Dial"}, "here: missing key 'modalities.dial.stream'"),
        ({"kind": "dial_config:Dial", "stream": {"width": 8}}, "here: missing key 'modalities.dial.size'"),
        (
            {"kind": "dial_config:Dial", "stream": {"width": 8}, "size": 3, "sise": 4},
            "here: unknown key 'modalities.dial.sise'; allowed here: kind, stream, loss, sampler, schedule",
        ),
        ({"stream": {"width": 8}}, "here: missing key 'modalities.dial.kind'"),
        ("image", "here: modalities.dial = 'image': expected a section with a kind"),
    ):
        with pytest.raises(ConfigError) as error:
            parse_config({**raw, "modalities": {**raw["modalities"], "dial": section}}, "here")
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


def test_objects_by_their_place():
    assert import_object("math:pi", "data.source") == pytest.approx(3.14159265)
    with pytest.raises(ValueError, match=r"data.source 'math:tau2': the module math has no 'tau2'"):
        import_object("math:tau2", "data.source")
