"""Schedules for the operators of a network: equal ones once, the others side by side in worker processes.

Emission is Python, so threads would wait for each other. A worker is a fresh interpreter that reads one JSON task per
line and answers with one line: nothing of the caller's program (its `__main__`, its threads, its devices) is copied. A
worker that cannot be started or dies is no error; its tasks are done in this process.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lpsn_tvm
from lpsn_tvm.errors import CompileError, LpsnError
from lpsn_tvm.schedules.vta.ops import TileOp
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.cycle_model import CycleModel, cycle_model
from lpsn_tvm.targets.vta.schedule_cache import ScheduleCache, open_cache
from lpsn_tvm.targets.vta.search import (
    BUDGET_SECONDS,
    CacheOption,
    Progress,
    ScheduleResult,
    find_schedule,
    known_schedule,
)
from lpsn_tvm.targets.vta.search_key import canonical
from lpsn_tvm.targets.vta.serialize import from_record, to_record

_Done = Callable[[TileOp, ScheduleResult], None]

# A worker takes half a second to start: fewer operators than this are not worth a second process.
WORTH_A_WORKER = 2


def find_schedules(
    ops: Sequence[TileOp],
    config: VtaConfig,
    *,
    model: str | CycleModel = "pynq",
    cache: CacheOption = None,
    budget_seconds: float = BUDGET_SECONDS,
    progress: Progress | None = None,
    workers: int | None = None,
    finished: Callable[[int, int], None] | None = None,
) -> list[ScheduleResult]:
    """`find_schedule` of every operator.

    Parameters
    ----------
    ops : sequence of TileOp
        Operators of equal geometry are searched once.
    config, model, cache, budget_seconds
        As in `find_schedule`; the budget is that of one operator.
    progress : callable, optional
        Told in one line about every operator that is done.
    workers : int, optional
        Processes; by default one per processor that this process may use.
    finished : callable, optional
        Told how many of how many different operators are done, those in the cache first.

    Raises
    ------
    CompileError
        An operator does not fit the accelerator under any schedule; names it.
    """
    forms = [canonical(op) for op in ops]
    names = {form: op.name for form, op in reversed(list(zip(forms, ops, strict=True)))}
    found = _known(names, config, cycle_model(model), open_cache(cache))
    # The longest first, so that no worker is left alone with one at the end.
    missing = sorted((form for form in names if form not in found), key=lambda form: -form.micro_operations)
    count = min(_processors() if workers is None else workers, len(missing) // WORTH_A_WORKER)
    if finished is not None and names:
        finished(len(found), len(names))

    def done(form: TileOp, result: ScheduleResult) -> None:
        found[form] = result
        if progress is not None:
            progress(f"{names[form]}: {result.cycles} cycles after {result.candidates_tried} candidates")
        if finished is not None:
            finished(len(found), len(names))

    if count > 1:
        settings = {"config": asdict(config), "model": asdict(cycle_model(model)), "budget_seconds": budget_seconds}
        settings["cache"] = _cache_record(cache)
        _Crew(settings, missing, done).run(count)
    for form in missing:
        if form not in found:
            try:
                result = find_schedule(form, config, model=model, cache=cache, budget_seconds=budget_seconds)
            except CompileError as error:
                raise CompileError(str(error).removeprefix(": "), where=names[form]) from error
            done(form, result)
    return [found[form] for form in forms]


def _known(
    forms: Iterable[TileOp], config: VtaConfig, model: CycleModel, store: ScheduleCache | None
) -> dict[TileOp, ScheduleResult]:
    results = {form: known_schedule(form, config, model, store) for form in forms}
    return {form: result for form, result in results.items() if result is not None}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_record(cache: CacheOption) -> str | bool:
    store = open_cache(cache)
    return False if store is None else str(store.directory)


class _Crew:
    """Worker processes, each with a thread here that hands it one task after the other; answers are taken in the
    caller's thread, which an interrupt or a failing callback reaches.
    """

    def __init__(self, settings: Mapping[str, Any], ops: Sequence[TileOp], done: _Done) -> None:
        self.settings, self.done = settings, done
        self.tasks: queue.SimpleQueue[TileOp] = queue.SimpleQueue()
        for op in ops:
            self.tasks.put(op)
        # What a worker found, or None once for each that has nothing left to do.
        self.answers: queue.SimpleQueue[tuple[TileOp, ScheduleResult] | None] = queue.SimpleQueue()

    def run(self, count: int) -> None:
        """Until no task is left or no worker lives."""
        processes: list[subprocess.Popen[str]] = []
        try:
            processes += [process for process in (_start() for _ in range(count)) if process is not None]
            for process in processes:
                threading.Thread(target=self.serve, args=(process,), daemon=True).start()
            left = len(processes)
            while left:
                answer = self.answers.get()
                if answer is None:
                    left -= 1
                else:
                    self.done(*answer)
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def serve(self, process: subprocess.Popen[str]) -> None:
        """Feed one worker; stops where it no longer answers."""
        try:
            self.feed(process)
        finally:
            self.answers.put(None)

    def feed(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            try:
                op = self.tasks.get_nowait()
                process.stdin.write(json.dumps({"op": to_record(op)} | dict(self.settings)) + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
            except (queue.Empty, OSError, ValueError):
                return
            result = ScheduleResult.from_json(answer)
            if result is not None:
                self.answers.put((op, replace(result, is_cached=False)))


def _start() -> subprocess.Popen[str] | None:
    """A worker that imports this very package; None where there is no interpreter to start."""
    root = str(Path(lpsn_tvm.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
    except (OSError, ValueError):
        return None


def work() -> None:
    """Answer tasks from the standard input until it ends."""
    for line in sys.stdin:
        task = json.loads(line)
        op, config, model = from_record(task["op"]), VtaConfig(**task["config"]), CycleModel(**task["model"])
        try:
            result = find_schedule(
                op, config, model=model, cache=task["cache"], budget_seconds=task["budget_seconds"]
            ).to_json()
        except LpsnError:
            # The caller meets the same error when it does the task itself.
            result = {}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    work()
