"""The parts of a call on a GPU and their arguments."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..speed.results import ResultLog

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Session:
    """The arguments of a part.

    log: receives the results. files: folder for further output. workdir: data and runs that stay on the machine between
    calls. tiny: small sizes, for a trial without a GPU. end: time (`time.time`) at which the part is interrupted.
    """

    device: str
    log: ResultLog
    files: Path
    workdir: Path
    tiny: bool
    end: float

    @property
    def runs(self) -> Path:
        return self.workdir / "runs"

    @property
    def size(self) -> str:
        return "tiny" if self.tiny else "official"

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device(self.device)

    @property
    def compile(self) -> str:
        return "never" if self.tiny else "always"

    def seconds_left(self) -> float:
        return self.end - time.time()

    def quiet_log(self) -> ResultLog:
        """A log of the same file that prints nothing, for functions that print their own lines."""
        from ..speed.results import ResultLog

        return ResultLog(self.device, self.log.file, lambda line: None)


@dataclasses.dataclass(frozen=True)
class Part:
    """A named measurement.

    seconds: its time limit; time that earlier parts did not use is added. interpreted: without a GPU its kernels need
    Triton's interpreter.
    """

    name: str
    seconds: int
    run: Callable[[Session], None]
    interpreted: bool = False


class Unfinished(Exception):
    """A part stopped in time and continues with the next call; the message is its progress."""
