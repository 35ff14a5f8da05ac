"""Ctrl-C (SIGINT) and SIGTERM: one line and an exit code for a command, the end of the current step for a training."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0  # torchrun passes on a signal that its workers may have had from the terminal already


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; the message is one line for the user.

    Args:
        number: of the signal.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number

    @classmethod
    def at_step(cls, step: int, number: int, kept: bool = True) -> Interrupted:
        """Of a training, with or without a folder from which it resumes."""
        resume = "run the same command again to resume" if kept else "to be able to resume, give out=FOLDER"
        return cls(f"interrupted at step {step}; {resume}", number)


class StopRequest:
    """The first signal, kept until the work comes to a point where it can stop; a second one ends it at once.

    Attributes:
        number: of the signal; 0 before there is one.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at, self._may_raise = 0.0, False

    def call(self, function: Callable[[], T]) -> T | None:
        """function(), cut short by the signal: None then. It must leave everything that is saved as it is."""
        try:
            self._may_raise = True
            return None if self.number else function()
        except KeyboardInterrupt:
            if not self.number:
                raise
            return None
        finally:
            self._may_raise = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._at = number, time.monotonic()
            if self._may_raise:
                raise Interrupted(number=number)
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._at > SAME_SECONDS:
            raise Interrupted(number=number)


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Let `handler` have these signals. Those that are ignored, as under nohup, stay so; threads other than the main
    one get no signals, and nothing is changed there."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)}
    try:
        for n in before:
            signal.signal(n, handler)
        yield
    finally:
        for n, old in before.items():
            signal.signal(n, old)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Signals become a `StopRequest` inside the block."""
    request = StopRequest()
    with handling(request, *SIGNALS):
        yield request


def raise_interrupted(number: int, _frame: FrameType | None) -> None:
    """A handler that ends the work at once."""
    raise Interrupted(number=number)
