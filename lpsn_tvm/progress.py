"""Progress of long work: one callable `progress(stage, done, total)` that every stage gets, and a bar with time
left for terminals.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lpsn_tvm.errors import RecipeError

ProgressCallback = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def show_detail(progress: ProgressCallback, stage: str, text: str) -> None:
    """A few words behind the name of a stage, where the callback has an attribute `detail(stage, text)` for them."""
    detail = getattr(progress, "detail", None)
    if detail is not None:
        detail(stage, text)


@contextmanager
def progress_bar(choice: bool | ProgressCallback | None) -> Iterator[ProgressCallback]:
    """The callback to hand to the stages.

    Parameters
    ----------
    choice : callable, bool or None
        A callable is used as it is; True shows bars on standard error, False nothing, None bars if standard error is
        a terminal.
    """
    if callable(choice):
        yield choice
        return
    if choice is not None and not isinstance(choice, bool):
        raise RecipeError(
            f"must be True, False, None or a function (stage, done, total), got {choice!r}", where="progress"
        )
    if choice is False or (choice is None and not sys.stderr.isatty()):
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        def detail(stage: str, text: str) -> None:
            if stage in tasks:
                bars.update(tasks[stage], description=f"{stage}: {text}")

        show.detail = detail  # type: ignore[attr-defined]
        yield show


class Stopwatch:
    """Seconds spent in each named stage, and its announcement to the progress callback."""

    def __init__(self, progress: ProgressCallback) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block; shown as one step unless the stage reports its own."""
        start = time.perf_counter()
        self._progress(name, 0, 1)
        yield
        self._progress(name, 1, 1)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
