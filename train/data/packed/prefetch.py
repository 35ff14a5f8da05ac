"""Prefetching: an iterator of batches runs in a thread, a few batches ahead of its consumer."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Generator

from torch import Tensor

PREFETCH = 4  # batches

Batches = Generator[dict[str, Tensor], None, None]


@dataclasses.dataclass
class _Failure:
    error: BaseException


class Prefetcher:
    """Runs a generator of batches in a thread; `first_step` is the step of its first batch."""

    def __init__(self, batches: Batches, first_step: int):
        self.next_step = first_step
        self.ready: queue.Queue = queue.Queue(PREFETCH)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(batches,), daemon=True, name="anystate-data")
        self.thread.start()

    def get(self) -> dict[str, Tensor]:
        """The next batch; raises the error of the thread, if it failed."""
        batch = self.ready.get()
        if isinstance(batch, _Failure):
            self.next_step = -1  # matches no step: the next request starts a new prefetcher
            raise batch.error
        self.next_step += 1
        return batch

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        self.stopped.set()
        while self.thread.is_alive():  # it may be blocked by a full queue
            with contextlib.suppress(queue.Empty):
                self.ready.get(timeout=0.01)
            self.thread.join(0.01)

    def _run(self, batches: Batches) -> None:
        try:
            while not self.stopped.is_set():
                self.ready.put(next(batches))
        except BaseException as error:
            self.ready.put(_Failure(error))
        finally:
            batches.close()
