"""Processes as /proc shows them: which still run, which a test has to wait for."""

from __future__ import annotations

import time
from pathlib import Path


def is_running(number: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(numbers: list[int], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(is_running, numbers)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, numbers))


def numbers_in(path: Path, seconds: float = 120.0) -> list[int]:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return [int(word) for word in path.read_text().split()]


def children_of(number: int) -> list[int]:
    """Numbers of the processes that a process started and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_running(int(entry.name)):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            found += [int(entry.name)] if parent == number else []
    return found
