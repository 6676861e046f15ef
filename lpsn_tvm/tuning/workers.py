"""Worker processes that may crash and hang: a call that does is an `Outcome` with its reason, the next one gets a new
process.

TVM's own pool (`tvm.support.popen_pool`) is not used: it imports torch into every worker, MetaSchedule starts it anew
for every generation, and its processes stay when the parent is killed. A process here belongs to a session of its own,
so that what it starts (nvcc, say) ends with it, and it ends itself when its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO, Any

CALLS_PER_PROCESS = 500
"""A process is replaced after so many calls: compilers leave memory behind."""
START_SECONDS, KILL_SECONDS = 120.0, 20.0
"""For the start of a process and its `prepare` call on a busy machine, and for its end."""


@dataclass(frozen=True)
class Call:
    """A function by import path "module:function", and its keyword arguments (JSON values)."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a call returned, or in one line why it returned nothing."""

    value: Any = None
    error: str = ""


@dataclass(frozen=True)
class Settings:
    """How worker processes are started.

    Parameters
    ----------
    prepare : Call, optional
        Called once in a new process (imports, say), outside of the time of calls.
    threads : int
        Threads of compiled code in a worker.
    cores : tuple of int
        Processors that a worker may use; empty: all.
    is_fresh_after_error : bool
        Whether a process that reported an error is replaced, as one whose GPU has faulted must be.
    """

    prepare: Call | None = None
    threads: int = 1
    cores: tuple[int, ...] = ()
    is_fresh_after_error: bool = False


class _Worker:
    """One process at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.is_closed = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._stderr: IO[bytes] | None = None
        self._calls = 0

    def call(self, call: Call, timeout: float) -> Outcome:
        """Answer one call; starts the process where there is none."""
        if self._calls >= CALLS_PER_PROCESS:
            self.end()
        if self._process is None:
            problem = self._start()
            if problem:
                return Outcome(error=problem)
        outcome = self._exchange(call, timeout)
        if outcome.error and self.settings.is_fresh_after_error:
            self.end()
        return outcome

    def _start(self) -> str:
        """Start a process; why that is not possible, or ""."""
        with self._lock:
            if self.is_closed:
                return "the workers were ended"
            self._calls = 0
            self._stderr = tempfile.TemporaryFile()
            reading, self._lifeline = os.pipe()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "lpsn_tvm.tuning.worker_process", str(reading)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                    env=environment(self.settings.threads),
                    pass_fds=(reading,),
                    # Ctrl-C reaches the parent only, which then ends the whole group.
                    start_new_session=True,
                )
            finally:
                os.close(reading)
            if self.settings.cores and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(self._process.pid, self.settings.cores)
        prepare = self.settings.prepare
        outcome = Outcome() if prepare is None else self._exchange(prepare, START_SECONDS)
        if outcome.error:
            self.end()
        return f"a worker could not be started: {outcome.error}" if outcome.error else ""

    def _exchange(self, call: Call, timeout: float) -> Outcome:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return Outcome(error="the workers were ended")
        self._calls += 1
        is_late = threading.Event()

        def expire() -> None:
            is_late.set()
            _kill(process)

        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        timer.start()
        request = {"function": call.function, "arguments": dict(call.arguments), "timeout": timeout}
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):  # The process, or our end of the channel, is gone.
            line = b""
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            reply = json.loads(line)
            return Outcome(reply.get("value"), str(reply.get("error", "")))
        words = self._last_words()
        self.end()
        if self.is_closed:
            return Outcome(error="the workers were ended")
        return Outcome(error=f"timed out after {timeout:g} s" if is_late.is_set() else _obituary(process, words))

    def _last_words(self) -> str:
        """The last line that the process wrote to its standard error."""
        with self._lock:
            if self._stderr is None or self._stderr.closed:
                return ""
            # Not a read of the file object: parent and child share its position.
            size = os.fstat(self._stderr.fileno()).st_size
            text = os.pread(self._stderr.fileno(), 2000, max(size - 2000, 0)).decode(errors="replace")
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

    def end(self) -> None:
        """End the process, if there is one, and what it started."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            _kill(process)
            for stream in (process.stdin, process.stdout, self._stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):  # A request that was never read cannot be flushed.
                        stream.close()
            os.close(self._lifeline)


def _obituary(process: subprocess.Popen[bytes], words: str) -> str:
    """One line about a process that ended by itself."""
    code = process.returncode
    if code is None:
        reason = "it does not end"
    elif code >= 0:
        reason = f"exit status {code}"
    else:
        reason = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"crashed: {reason}" + (f" ({words[:200]})" if words else "")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, and wait until it is gone."""
    if process.returncode is not None:
        return  # Its number may belong to somebody else by now.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    # A GPU that is hung may keep its process for long; nothing else is to wait for that.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)


def environment(threads: int) -> dict[str, str]:
    """Environment of a worker: the parent's import path, and as many threads as are asked for and not one more."""
    path = [entry or os.getcwd() for entry in sys.path]
    count = str(threads)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TVM_NUM_THREADS": count,
        # The pinned processors are the worker's own choice; TVM would bind its threads to other ones.
        "TVM_BIND_THREADS": "0",
    }


Item = tuple["Future[Outcome]", Call, float]


def _serve(work: queue.SimpleQueue[Item | None], worker: _Worker) -> None:
    """A thread of the parent: hands calls to one worker. Knows nothing of the pool, so that it can be collected."""
    while (item := work.get()) is not None:
        future, call, timeout = item
        if future.set_running_or_notify_cancel():
            future.set_result(worker.call(call, timeout))


def _shut(work: queue.SimpleQueue[Item | None], workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.is_closed = True
    while True:
        try:
            item = work.get_nowait()
        except queue.Empty:
            break
        if item is not None and item[0].set_running_or_notify_cancel():
            item[0].set_result(Outcome(error="the workers were ended"))
    for worker in workers:
        work.put(None)
        worker.end()


class WorkerPool:
    """Several worker processes, started when first needed.

    Ended by `close`, when the pool is collected, at the interpreter's exit, and, whatever becomes of this process, by
    themselves when it is gone.

    Parameters
    ----------
    size : int
        Processes.
    settings : Settings
    """

    def __init__(self, size: int, settings: Settings | None = None) -> None:
        self.size = size
        self._work: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        workers = [_Worker(settings or Settings()) for _ in range(size)]
        self._finalizer = weakref.finalize(self, _shut, self._work, workers)
        for worker in workers:
            # A daemon: at the interpreter's exit nobody waits for a kernel that hangs.
            threading.Thread(target=_serve, args=(self._work, worker), daemon=True).start()

    def submit(self, call: Call, timeout: float) -> Future[Outcome]:
        """Have a call answered by the next free worker.

        Parameters
        ----------
        call : Call
            The function and its arguments.
        timeout : float
            Seconds after which the worker is ended.
        """
        future: Future[Outcome] = Future()
        if self._finalizer.alive:
            self._work.put((future, call, timeout))
        else:
            future.set_result(Outcome(error="the workers were ended"))
        return future

    def run(self, calls: Sequence[Call], timeout: float) -> list[Outcome]:
        """Outcomes of all calls, in their order."""
        return [future.result() for future in [self.submit(call, timeout) for call in calls]]

    def close(self) -> None:
        """End all processes; calls under way and waiting end with an error."""
        self._finalizer()
