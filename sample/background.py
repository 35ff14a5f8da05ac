"""Decoding and writing one batch while the next is drawn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

DEVICES = ("cuda",)  # on a CPU drawing and decoding want the same cores: measured, nothing is gained


class Behind:
    """Calls functions in a thread, one after the other and in order, at most one behind the caller.

    On a GPU they get a stream of their own, which first waits for what the caller has launched; they must end with
    their results on the host. Elsewhere they are called at once.

    Used as a context; a call that fails raises at the next one, or where the context ends. Where the context is left by
    an exception, Ctrl-C too, the call under way is finished first.
    """

    def __init__(self, device: torch.device):
        self.device, self.last = device, None
        self.thread = ThreadPoolExecutor(1, "decoding") if device.type in DEVICES else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.thread is None:
            return
        self.thread.shutdown()
        if kind is None:
            self._settle()

    def __call__(self, function: Callable[..., object], *args) -> None:
        if self.thread is None:
            function(*args)
            return
        self._settle()
        launched = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        self.last: Future | None = self.thread.submit(self._run, launched, function, args)

    def _settle(self) -> None:
        last, self.last = self.last, None
        if last is not None:
            last.result()

    def _run(self, launched: torch.cuda.Event | None, function: Callable[..., object], args: tuple) -> None:
        if launched is None:
            function(*args)
            return
        with torch.cuda.stream(self.stream):  # the current device, too, belongs to a thread
            self.stream.wait_event(launched)
            function(*args)
