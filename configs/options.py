"""Command-line options that several commands share. Nothing is imported here that is slow to import."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from .interruption import Interrupted

if TYPE_CHECKING:
    import torch

CLIP_MODEL = "openai/clip-vit-large-patch14"
VAE, VAE_SCALE = "stabilityai/sd-vae-ft-mse", 0.18215
METRICS = ("elbo", "labels", "fid", "clip", "agreement")  # of `anystate eval`

Checkpoint = Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")]
Override = Annotated[list[str] | None, typer.Argument(help="Settings of the config, key=value, e.g. train.lr=1e-3.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Output folder.")]
RunOut = Annotated[
    Path | None, typer.Option("-o", "--out", help="Run folder; the same folder resumes. Default runs/NAME.")
]
Json = Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")]
JsonOut = Annotated[Path | None, typer.Option("-o", "--out", "--json", help="Write the results to this JSON file.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if there is one.")]
Weights = Annotated[Literal["ema", "raw"], typer.Option(help="EMA weights or the raw ones.")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"] | None, typer.Option(help="Of the network in sampling; default the config's.")
]
SamplingSteps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; default the config's.")]
Compile = Annotated[Literal["always", "never"], typer.Option(help="Whether the fast path uses torch.compile.")]
Features = Annotated[str, typer.Option(help="Network of FID: inception, a TorchScript file, or module:function.")]
ClipModel = Annotated[str, typer.Option(help="CLIP model: folder or hub id.")]


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None or "auto" is a GPU if there is one.

    A GPU with an index becomes the current device, because Triton kernels are launched and CUDA graphs captured there
    whatever the device of the tensors.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch

    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def require_path(what: str, path: Path | None) -> None:
    """Raise ValueError unless the path exists or is None; `what` names it in the error."""
    if path is not None and not path.exists():
        raise ValueError(f"{what} {str(path)!r} not found")


def parse_pairs(option: str, values: list[str] | None) -> list[tuple[str, str]]:
    """(name, value) of every NAME=VALUE; `option` is named in errors."""
    pairs = []
    for value in values or []:
        name, separator, rest = value.partition("=")
        if not separator or not name:
            raise ValueError(f"{option} {value!r} is not of the form NAME=VALUE")
        pairs.append((name, rest))
    return pairs


def parse_conditions(option: str, values: list[str] | None) -> list[tuple[str, str | None]]:
    """(name, value) of every NAME=VALUE, and (name, None) of every NAME alone; `option` is named in errors."""
    conditions = []
    for value in values or []:
        name, separator, rest = value.partition("=")
        if not name:
            raise ValueError(f"{option} {value!r} is neither NAME=VALUE nor NAME")
        conditions.append((name, rest if separator else None))
    return conditions


def parse_choices(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """The names in a comma-separated list, each of which must be one of `allowed`."""
    names = text.split(",")
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} {name!r} is not one of {', '.join(allowed)}")
    return names


def parse_counts(option: str, text: str | None) -> list[int] | None:
    """The whole numbers, at least 1, in a comma-separated list; None stays None."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers separated by commas, got {text!r}") from None
    if min(numbers) < 1:
        raise ValueError(f"{option} must be at least 1, got {text!r}")
    return numbers


def renamed(old: dict[str, str]) -> type[TyperCommand]:
    """A command class that also accepts earlier names of options, {old: new}, which the help does not show."""

    class Renamed(TyperCommand):
        def parse_args(self, ctx, args: list[str]) -> list[str]:
            return super().parse_args(ctx, [_rename(arg, old) for arg in args])

    return Renamed


def _rename(arg: str, old: dict[str, str]) -> str:
    name, separator, value = arg.partition("=")
    return old.get(name, name) + separator + value


class Commands(TyperGroup):
    """The commands; an interrupted one ends in an error with a line of its own, where typer would say nothing."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise CommandInterrupted(str(error) or self.interruption(ctx), 128 + number) from None

    def interruption(self, ctx) -> str:
        """The line of the interrupted command; those that resume say so in their help."""
        command = self.commands.get(ctx.invoked_subcommand)
        resumes = command is not None and "resume" in (command.help or "")
        return "interrupted; run the same command again to resume" if resumes else "interrupted"


class CommandInterrupted(Exception):
    """(line for the user, exit code)"""
