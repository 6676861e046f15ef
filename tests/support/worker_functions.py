"""What tests have worker processes do: answer, fail, crash, hang."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from typing import Any

calls = 0


def echo(value: Any) -> Any:
    return value


def count() -> int:
    """Calls of this process so far."""
    global calls
    calls += 1
    return calls


def noise() -> str:
    """Prints from Python and from machine code must not end up in the answer."""
    print("noise of Python")
    ctypes.CDLL(None).puts(b"noise of C")
    return "done"


def fail() -> None:
    raise ValueError("first line\nlast line")


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def abort_with_words() -> None:
    print("LLVM ERROR: cannot select", file=sys.stderr, flush=True)
    os.abort()


def leave() -> None:
    os._exit(3)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def sleep_in_c(seconds: int) -> None:
    """Holds the interpreter's lock, so that no other thread of the process runs."""
    ctypes.PyDLL(None).sleep(seconds)


def sleep_with_child(path: str) -> None:
    """Starts a process of its own, as a compiler's driver does, writes both numbers and hangs."""
    child = subprocess.Popen(["sleep", "1000"])
    with open(path + ".new", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(path + ".new", path)
    time.sleep(1000)


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def environment(variable: str) -> str | None:
    return os.environ.get(variable)
