"""Logging of a training run: metrics.jsonl, optionally TensorBoard and wandb, and a progress bar or lines of text."""

from __future__ import annotations

import datetime
import importlib
import json
import time
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..configs.config import Config
from ..configs.load import dump_config
from ..model.provenance import provenance
from ..model.storage import atomic_write


class MetricLog:
    """Context manager that writes the metrics of a run from step `start` to step `stop` into the folder `out`.

    Args:
        quiet: print nothing.
    """

    def __init__(self, out: Path, config: Config, start: int, stop: int, quiet: bool = False):
        self.out, self.config, self.start, self.stop, self.quiet = out, config, start, stop, quiet
        self.bar: Progress | None = None
        self.tensorboard = self.wandb = None
        self.console = Console()

    def __enter__(self) -> MetricLog:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "config.yaml").write_text(dump_config(self.config))
        (self.out / "environment.json").write_text(json.dumps(provenance(), indent=1))
        self._drop_later_rows()
        self.file = open(self.out / "metrics.jsonl", "a", buffering=1)
        settings = self.config.train
        if settings.tensorboard:
            module = _import("tensorboard", "torch.utils.tensorboard")
            self.tensorboard = module.SummaryWriter(str(self.out / "tensorboard"))
        if settings.wandb:
            config = self.config.model_dump(mode="json")
            self.wandb = _import("wandb", "wandb").init(project=settings.wandb, name=self.config.name, config=config)
        if not self.quiet and self.console.is_terminal:  # in a file, a bar would appear only at its end
            self._start_bar()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record named values of a step."""
        if not values:
            return
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)
        if not self.quiet:
            self._print(step, _as_text(values))

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.bar:
            self.bar.advance(self.task)

    def _print(self, step: int, text: str) -> None:
        if self.bar:
            self.bar.update(self.task, note=text)
            return
        seconds_per_step = (time.monotonic() - self.began) / max(step - self.start, 1)
        left = datetime.timedelta(seconds=round(seconds_per_step * (self.stop - step)))
        print(f"step {step}/{self.stop}, {left} left: {text}", flush=True)

    def _drop_later_rows(self) -> None:
        """Drop rows after the step that the run resumes from: they were written after its last checkpoint."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= self.start]
            atomic_write(path, "".join(line + "\n" for line in kept))

    def _start_bar(self) -> None:
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), refresh_per_second=4, console=self.console)
        self.task = self.bar.add_task("", total=self.stop, completed=self.start, note="")
        self.bar.start()


class NullLog:
    """The log of every rank except the main one: it writes nothing."""

    def __enter__(self) -> NullLog:
        return self

    def __exit__(self, *_) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def advance(self) -> None:
        pass


def _as_text(values: dict[str, float]) -> str:
    """Values for the screen, with short names; learning rate and gradient norm are left out."""
    parts = []
    for name, value in values.items():
        if name not in ("lr", "grad_norm"):
            short = name.split("/")[-1].replace("samples_per_second", "samples/s")
            parts.append(f"{short} {value:.4g}")
    return "  ".join(parts)


def _step(line: str) -> int:
    """The step of a row; a row truncated by a kill counts as after every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return 2**62


def _import(package: str, module: str) -> ModuleType:
    """A module of an optional package; ValueError if the package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"train.{package} is on but {package} is not installed: pip install anystate[log]") from None
