"""When tuning stops: budget, Ctrl-C; and what is shown meanwhile."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lpsn_tvm.budget import Budget
from lpsn_tvm.progress import ProgressCallback, show_detail

SEARCH_SHARE = 0.8
"""Of a time budget; the rest is for comparing the finalists."""


class Control:
    """Counts trials and time against a budget.

    Parameters
    ----------
    budget : Budget
        Of all runs in a directory together.
    trials : int
        Finished before this run.
    seconds : float
        Spent before this run.
    progress : callable (stage, done, total)
    """

    def __init__(self, budget: Budget, trials: int, seconds: float, progress: ProgressCallback) -> None:
        self.budget, self.progress = budget, progress
        self.is_interrupted = False
        self._trials, self._before, self._start = trials, seconds, time.monotonic()

    @property
    def trials(self) -> int:
        """Started so far, those of earlier runs included."""
        return self._trials

    @property
    def seconds(self) -> float:
        """Spent so far, in earlier runs too."""
        return self._before + time.monotonic() - self._start

    def left(self) -> int:
        """Trials that may be started now."""
        if self.is_interrupted:
            return 0
        if self.budget.trials is not None:
            return max(0, self.budget.trials - self._trials)
        return 1 << 30 if self.seconds < SEARCH_SHARE * float(self.budget.seconds or 0) else 0

    def start(self, count: int) -> None:
        """Trials are about to be built."""
        self._trials += count

    def show(self) -> None:
        """How much of the budget is used."""
        if self.budget.trials is not None:
            self.progress("tune", min(self._trials, self.budget.trials), self.budget.trials)
            return
        total = int(SEARCH_SHARE * float(self.budget.seconds or 0)) or 1
        self.progress("tune", min(int(self.seconds), total), total)
        show_detail(self.progress, "tune", f"{self._trials} trials")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the search after the trials that run now; a second one at once. MetaSchedule's loop is compiled
        code, in which an exception of a signal handler would be lost or would end the process.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.is_interrupted:
                raise KeyboardInterrupt
            self.is_interrupted = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
