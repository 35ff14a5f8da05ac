"""Decoding and writing of one batch in a thread while the next batch is sampled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

DEVICES = ("cuda",)  # on a CPU, sampling and decoding compete for the same cores: measured, there is no gain


class BackgroundWriter:
    """Calls functions in a thread, in order, with at most one call pending.

    On a GPU the functions run on their own CUDA stream, after the work that the caller has launched so far; their
    results must be on the host when they return. On other devices they are called at once in the caller's thread.

    Used as a context manager. An exception in a function is raised by the next call or at the end of the context. When
    the context is left by an exception, also by Ctrl-C, the pending call is completed first.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pending: Future | None = None
        self.thread = ThreadPoolExecutor(1, "decoding") if device.type in DEVICES else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.thread is None:
            return
        self.thread.shutdown()
        if kind is None:
            self._wait()

    def __call__(self, function: Callable[..., object], *args: object) -> None:
        """Call `function(*args)` in the thread, after the pending call has ended."""
        if self.thread is None:
            function(*args)
            return
        self._wait()
        launched = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        self.pending = self.thread.submit(self._run, launched, function, args)

    def _wait(self) -> None:
        """Wait for the pending call; raises its exception."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _run(self, launched: torch.cuda.Event | None, function: Callable[..., object], args: tuple) -> None:
        if launched is None:
            function(*args)
            return
        with torch.cuda.stream(self.stream):  # also sets the current device, which belongs to a thread
            self.stream.wait_event(launched)
            function(*args)
