"""Where the device is that candidates are timed on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from lpsn_tvm.tuning.workers import Call, Outcome, Settings, WorkerPool

EXECUTE, PREPARE = "lpsn_tvm.tuning.timing:execute", "lpsn_tvm.tuning.timing:prepare"


class Place(Protocol):
    """Answers what `timing.execute` answers, on the machine with the device."""

    def submit(self, command: str, paths: Sequence[str], rounds: int, timeout: float) -> Future[Outcome]:
        """Start a command on candidate files of this machine."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class LocalPlace:
    """The machine that this runs on: one worker process, for CPUs on as many processors as it has threads.

    Parameters
    ----------
    kind : str
        "llvm" or "cuda".
    threads : int
    execute : str
        Import path of the function that the worker calls.
    """

    def __init__(self, kind: str, threads: int = 1, execute: str = EXECUTE) -> None:
        self.kind, self._execute = kind, execute
        allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = tuple(allowed[-threads:]) if kind == "llvm" else ()
        # The first candidate's time does not count that of imports.
        prepare = Call(PREPARE, {"kind": kind})
        settings = Settings(prepare=prepare, threads=threads, cores=cores, is_fresh_after_error=kind == "cuda")
        self._pool = WorkerPool(1, settings)

    def submit(self, command: str, paths: Sequence[str], rounds: int, timeout: float) -> Future[Outcome]:
        """Start a command on candidate files."""
        arguments = {"command": command, "kind": self.kind, "files": list(paths), "rounds": rounds}
        return self._pool.submit(Call(self._execute, arguments), timeout)

    def close(self) -> None:
        """End the process."""
        self._pool.close()
