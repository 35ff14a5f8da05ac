"""Progress bars of long sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(show: bool | Callable[[], None], total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` pieces of work, which moves a bar.

    show: True for a bar, False for none, or a function that is called in place of the bar's.
    """
    if callable(show) or not show or not total:
        yield show if callable(show) else (lambda: None)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)
