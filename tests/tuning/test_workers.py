"""Worker processes: answers, crashes, hangs, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import gone, is_running, numbers_in

from lpsn_tvm.tuning import workers
from lpsn_tvm.tuning.workers import Call, Settings, WorkerPool

HERE = Path(__file__).resolve().parents[1]


def call(name: str, **arguments: object) -> Call:
    return Call(f"worker_functions:{name}", arguments)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(1)
    yield made
    made.close()


def test_answers_come_in_order() -> None:
    pool = WorkerPool(2)
    values = [1, "two", [3.5, None], {"four": True}]
    assert [outcome.value for outcome in pool.run([call("echo", value=value) for value in values], 30)] == values
    pool.close()


def test_one_process_answers_many_calls(pool: WorkerPool) -> None:
    assert [outcome.value for outcome in pool.run([call("count")] * 3, 30)] == [1, 2, 3]


def test_what_is_printed_does_not_disturb(pool: WorkerPool) -> None:
    assert [outcome.value for outcome in pool.run([call("noise"), call("noise")], 30)] == ["done", "done"]


def test_an_error_is_one_line_and_the_process_goes_on(pool: WorkerPool) -> None:
    outcomes = pool.run([call("count"), call("fail"), call("count")], 30)
    assert [outcome.error for outcome in outcomes] == ["", "ValueError: last line", ""]
    assert outcomes[2].value == 2


def test_a_process_may_be_replaced_after_an_error() -> None:
    pool = WorkerPool(1, Settings(is_fresh_after_error=True))
    assert [outcome.value for outcome in pool.run([call("count"), call("fail"), call("count")], 30)] == [1, None, 1]
    pool.close()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (call("die", number=int(signal.SIGSEGV)), "crashed: SIGSEGV"),
        (call("die", number=int(signal.SIGKILL)), "crashed: SIGKILL"),
        (call("abort_with_words"), "crashed: SIGABRT (LLVM ERROR: cannot select)"),
        (call("leave"), "crashed: exit status 3"),
    ],
    ids=["segfault", "kill", "abort", "exit"],
)
def test_a_crash_is_an_outcome(pool: WorkerPool, what: Call, reason: str) -> None:
    first, crash, after = pool.run([call("count"), what, call("count")], 30)
    assert (first.value, crash.error, after.value) == (1, reason, 1)


@pytest.mark.parametrize("name", ["sleep", "sleep_in_c"])
def test_a_hang_is_an_outcome(pool: WorkerPool, name: str) -> None:
    assert pool.run([call("echo", value=1)], 30)[0].value == 1
    start = time.monotonic()
    hang = pool.run([call(name, seconds=1000)], 0.5)[0]
    assert hang.error == "timed out after 0.5 s"
    assert time.monotonic() - start < 200
    assert pool.run([call("echo", value=2)], 30)[0].value == 2


class Timer:
    """Expires when it is told to."""

    expire: Callable[[], None]

    def __init__(self, seconds: float, expire: Callable[[], None]) -> None:
        Timer.expire = staticmethod(expire)

    def start(self) -> None: ...

    def cancel(self) -> None: ...


def test_what_a_process_started_ends_with_it(pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.threading, "Timer", Timer)
    future = pool.submit(call("sleep_with_child", path=str(tmp_path / "numbers")), 2)
    numbers = numbers_in(tmp_path / "numbers")
    assert all(map(is_running, numbers))
    Timer.expire()
    assert future.result(60).error == "timed out after 2 s"
    assert gone(numbers)


def test_closing_ends_calls_under_way_and_waiting(pool: WorkerPool, tmp_path: Path) -> None:
    futures = [pool.submit(call("sleep_with_child", path=str(tmp_path / "numbers")), 600) for _ in range(3)]
    numbers = numbers_in(tmp_path / "numbers")
    pool.close()
    assert [future.result(60).error for future in futures] == ["the workers were ended"] * 3
    assert gone(numbers)
    assert pool.submit(call("echo", value=1), 1).result(60).error == "the workers were ended"


def test_a_prepare_call_that_fails_is_told() -> None:
    pool = WorkerPool(1, Settings(prepare=call("fail")))
    assert pool.run([call("count")], 30)[0].error == "a worker could not be started: ValueError: last line"
    pool.close()


def test_threads_and_processors_are_fixed() -> None:
    core = max(os.sched_getaffinity(0))
    pool = WorkerPool(1, Settings(threads=3, cores=(core,)))
    names = ("OMP_NUM_THREADS", "TVM_NUM_THREADS")
    assert [o.value for o in pool.run([call("environment", variable=name) for name in names], 30)] == ["3", "3"]
    assert pool.run([call("cores")], 30)[0].value == [core]
    pool.close()


PROGRAM = """
import sys
from lpsn_tvm.tuning.workers import Call, WorkerPool
pool = WorkerPool(1)
future = pool.submit(Call("worker_functions:sleep_with_child", {"path": sys.argv[1]}), 600)
print(future.result().error)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_nothing_is_left_when_the_parent_ends(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, or a kill that lets the parent do nothing any more."""
    path = os.pathsep.join([str(HERE.parent), str(HERE / "support")])
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "numbers")],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    numbers = numbers_in(tmp_path / "numbers")
    assert all(map(is_running, numbers))
    parent.send_signal(number)
    parent.wait(60)
    assert gone(numbers)
