"""What a run leaves behind: metrics.jsonl, TensorBoard and wandb on request; a bar on a screen, lines elsewhere."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path

from rich.console import Console

from ..configs.config import Config
from ..configs.load import dump_config
from ..model.storage import atomic_write
from .provenance import origin


class Log:
    """Context manager; `write` takes a step and named numbers, `advance` moves the bar by one step."""

    def __init__(self, out: Path, config: Config, start: int, stop: int, quiet: bool = False):
        self.out, self.config, self.start, self.stop, self.quiet = out, config, start, stop, quiet
        self.bar = self.board = self.run = None
        self.console = Console()

    def __enter__(self) -> Log:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "config.yaml").write_text(dump_config(self.config))
        (self.out / "environment.json").write_text(json.dumps(origin(), indent=1))
        self._trim()
        self.file = open(self.out / "metrics.jsonl", "a", buffering=1)
        settings = self.config.train
        if settings.tensorboard:
            self.board = _import("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(self.out / "tensorboard"))
        if settings.wandb:
            self.run = _import("wandb", "wandb").init(
                project=settings.wandb, name=self.config.name, config=self.config.model_dump(mode="json")
            )
        if not self.quiet and self.console.is_terminal:  # in a file, a bar would show at its end only
            self._show()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()
        self.file.close()
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        if not values:
            return
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        if self.run:
            self.run.log(values, step=step)
        if self.quiet:
            return
        shown = {name.split("/")[-1]: value for name, value in values.items() if name not in ("lr", "grad_norm")}
        text = "  ".join(f"{name.replace('samples_per_second', 'samples/s')} {v:.4g}" for name, v in shown.items())
        if self.bar:
            self.bar.update(self.task, note=text)
        else:
            left = (time.monotonic() - self.began) * (self.stop - step) / max(step - self.start, 1)
            print(f"step {step}/{self.stop}, {datetime.timedelta(seconds=round(left))} left: {text}", flush=True)

    def advance(self) -> None:
        if self.bar:
            self.bar.advance(self.task)

    def _trim(self) -> None:
        """Drop rows after the step we resume from: they belong to a run that was killed before its next save."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= self.start]
            atomic_write(path, "".join(line + "\n" for line in kept))

    def _show(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), refresh_per_second=4, console=self.console)
        self.task = self.bar.add_task("", total=self.stop, completed=self.start, note="")
        self.bar.start()


class Silent:
    """The log of every rank but the main one."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_):
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def advance(self) -> None:
        pass


def _step(line: str) -> int:
    """The step of a row; a row cut off by a kill counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return 2**62


def _import(package: str, module: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"train.{package} is on but {package} is not installed: pip install anystate[log]") from None
