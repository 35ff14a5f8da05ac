"""Every command in README and docs exists, with its options, shipped configs and settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

import anystate
from anystate.cli import app
from anystate.configs.load import load_config

ROOT = Path(anystate.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, list[str]]]:
    """(page, arguments after `anystate`) of every line in a bash block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                arguments = shlex.split(line, comments=True)
                if "anystate" in arguments:
                    found.append((page.name, arguments[arguments.index("anystate") + 1 :]))
    return found


COMMANDS = commands()


def resolve(arguments: list[str]):
    """The command, and the arguments after its name."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"no command {name!r}; there are {', '.join(command.commands)}"
        command = command.commands[name]
    return command, arguments


@pytest.mark.parametrize(
    ("page", "arguments"), COMMANDS, ids=[f"{page}: {' '.join(arguments)}" for page, arguments in COMMANDS]
)
def test_shown_commands_exist(page, arguments):
    command, rest = resolve(arguments)
    # the parser itself: unknown options, wrong types and missing arguments raise
    parameters = command.make_context(command.name, list(rest), resilient_parsing=False).params
    if command.name not in ("train", "fit"):
        return
    config = parameters["config"]
    if Path(config).suffix == "":  # a shipped one
        load_config(config, parameters["override"])


def settings(text: str, sections: list[str]) -> list[str]:
    """`train.lr`, `modalities.text.length` and the like in a page."""
    return re.findall(rf"`'?((?:{'|'.join(sections)})(?:\.(?!py\b)[a-z_]+)+)", text)


def test_settings_named_in_tables_exist():
    """Of the page for users of the official code: first text and images, then tables."""
    pairs, tables = (ROOT / "docs/from-official.md").read_text(encoding="utf-8").split("\n## Tables\n")
    for page, config in (
        (pairs, load_config("text_image/stage2")),
        (tables, load_config("table/paper")),
    ):
        names = settings(page, list(type(config).model_fields))
        assert len(names) > 10
        for name in names:
            node = config
            for key in name.split("."):
                assert node is None or key in (node if isinstance(node, dict) else type(node).model_fields), name
                node = node.get(key) if isinstance(node, dict) else getattr(node, key, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample RUN --stepz 3", "stepz"),
        ("train", "Missing"),
        ("paint it", "no command 'paint'"),
        ("sample RUN -n many", "valid integer"),
        ("train text_image/stage1 train.stepz=3", "train.stepz"),
    ],
)
def test_the_check_fails_for_wrong_commands(line, message):
    with pytest.raises(Exception, match=message):
        test_shown_commands_exist("", shlex.split(line))
