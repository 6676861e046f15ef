"""Searching several operators: each geometry once, the same results in worker processes, and without them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from vta_tile_ops import conv_op

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta import search_workers
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.search import find_schedule
from lpsn_tvm.targets.vta.search_workers import find_schedules

CONFIG = PRESETS["pynq"]
OPS = [conv_op(inputs=2, outputs=2, size=(height, 5)) for height in (3, 4, 5, 6)]


def test_workers_find_what_one_process_finds() -> None:
    alone = find_schedules(OPS, CONFIG, cache=False, budget_seconds=0.0, workers=1)
    lines: list[str] = []
    together = find_schedules(OPS, CONFIG, cache=False, budget_seconds=0.0, workers=2, progress=lines.append)
    assert together == alone
    assert len(lines) == len(OPS)


def test_equal_operators_are_searched_once(tmp_path: Path) -> None:
    again = [replace(OPS[0], name="again"), OPS[1], OPS[0]]
    lines: list[str] = []
    options = {"cache": tmp_path, "budget_seconds": 0.0, "workers": 1, "progress": lines.append}
    found = find_schedules(again, CONFIG, **options)  # type: ignore[arg-type]
    assert found[0] == found[2]
    assert len(lines) == 2
    assert all(result.is_cached for result in find_schedules(again, CONFIG, **options))  # type: ignore[arg-type]
    assert len(lines) == 2


@pytest.mark.parametrize("interpreter", ["/nonexistent/python", "/bin/false", "/bin/echo"])
def test_workers_that_fail_are_replaced_by_this_process(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", interpreter)
    found = find_schedules(OPS, CONFIG, cache=False, budget_seconds=0.0, workers=2)
    assert [result.cycles for result in found] == [
        find_schedule(op, CONFIG, cache=False, budget_seconds=0.0).cycles for op in OPS
    ]


def test_an_operator_that_does_not_fit_is_named() -> None:
    kernel = conv_op(inputs=1, outputs=1, size=(40, 40), kernel=(40, 40), padding=(0, 0))
    for workers in (1, 2):
        with pytest.raises(CompileError, match="huge"):
            find_schedules([*OPS, replace(kernel, name="huge")], CONFIG, cache=False, budget_seconds=0, workers=workers)


def test_nothing_to_search() -> None:
    assert find_schedules([], CONFIG) == []


def test_the_caller_is_told_and_may_stop_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while workers are busy ends them."""
    started: list[subprocess.Popen[str]] = []
    start = search_workers._start

    def recorded() -> subprocess.Popen[str] | None:
        process = start()
        started.extend([] if process is None else [process])
        return process

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done:
            raise KeyboardInterrupt

    told: list[tuple[int, int]] = []
    monkeypatch.setattr(search_workers, "_start", recorded)
    with pytest.raises(KeyboardInterrupt):
        find_schedules(OPS, CONFIG, cache=False, budget_seconds=0.0, workers=2, finished=stop)
    assert told == [(0, len(OPS)), (1, len(OPS))]
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)
