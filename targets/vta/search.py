"""Schedule search: the fewest simulated cycles for one tile operator, within seconds, remembered on disk.

Schedules come from the emitter's own list and from neighbours of the best ones found so far. They are simulated in the
order of an analytic estimate, timing only; one whose lower bound (`bounds`) is no better than the best is left out.
The search ends when nothing is left, when the best is as good as the hardware allows, when many in a row were no
better, or when the time is up. The default schedule comes first, so searching never makes an operator slower.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.emit import default_schedule, emit, fits
from lpsn_tvm.schedules.vta.ops import TileOp
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.vta.bounds import estimate, lower_bound, rates_of, work_of
from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.cycle_model import CycleModel, cycle_model
from lpsn_tvm.targets.vta.neighbours import neighbours, normalized, seeds
from lpsn_tvm.targets.vta.program import LinkedProgram, link
from lpsn_tvm.targets.vta.schedule_cache import ScheduleCache, open_cache
from lpsn_tvm.targets.vta.search_key import canonical, declare, search_key
from lpsn_tvm.targets.vta.simulator import SimulationResult, simulate

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

BUDGET_SECONDS = 3.0
PATIENCE = 32
# Neighbours of schedules within this factor of the best are looked at, too.
NEAR_BEST = 1.005
# A schedule this close to the bound of the whole space ends the search.
GOOD_ENOUGH = 1.001
CacheOption = ScheduleCache | str | os.PathLike[str] | bool | None
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ScheduleResult:
    """What a search found.

    Parameters
    ----------
    schedule : Schedule
    cycles : int
        Simulated with the model that was asked for.
    candidates_tried : int
        Programs emitted and simulated.
    bound : int
        Cycles that no schedule seen can undercut.
    default_cycles : int
        Of the default schedule.
    is_cached : bool
        Whether it came from the cache.
    """

    schedule: Schedule
    cycles: int
    candidates_tried: int
    bound: int
    default_cycles: int
    is_cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dictionary of integers and strings."""
        return {
            "schedule": self.schedule.to_json(),
            "cycles": self.cycles,
            "candidates_tried": self.candidates_tried,
            "bound": self.bound,
            "default_cycles": self.default_cycles,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ScheduleResult | None:
        """What `to_json` wrote, marked as cached; None where something is missing or out of range."""
        numbers = [data.get(name) for name in ("cycles", "candidates_tried", "bound", "default_cycles")]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            return None
        try:
            schedule = Schedule.from_json(data["schedule"])
        except (CompileError, KeyError, TypeError, ValueError):
            return None
        return cls(schedule, data["cycles"], data["candidates_tried"], data["bound"], data["default_cycles"], True)


def find_schedule(
    op: TileOp,
    config: VtaConfig,
    *,
    model: str | CycleModel = "pynq",
    cache: CacheOption = None,
    budget_seconds: float = BUDGET_SECONDS,
    progress: Progress | None = None,
) -> ScheduleResult:
    """The schedule with the fewest simulated cycles.

    Parameters
    ----------
    op : TileOp
        The operator; its name, regions and addresses do not matter.
    config : VtaConfig
        Geometry of the accelerator.
    model : "pynq", "rtl" or CycleModel
        What cycles are counted with.
    cache : ScheduleCache, path or bool, optional
        Where results are remembered: by default the user's cache directory; False: nowhere.
    budget_seconds : float
        Processor time after which no new candidate is begun; the default schedule is always simulated.
    progress : callable, optional
        Told in one line whenever a better schedule is found.

    Raises
    ------
    CompileError
        The operator does not fit the accelerator under any schedule.
    """
    chosen, op, store = cycle_model(model), canonical(op), open_cache(cache)
    key = search_key(op, config, chosen)
    if store is not None:
        known = store.read(key)
        result = None if known is None else ScheduleResult.from_json(known)
        if result is not None and fits(op, result.schedule, config):
            return result
    result = _Search(op, config, chosen, progress).run(time.process_time() + budget_seconds)
    if store is not None:
        store.write(key, result.to_json())
    return result


def program_of(op: TileOp, schedule: Schedule, config: VtaConfig) -> LinkedProgram:
    """The linked program of a canonical operator alone; its regions have no contents."""
    builder = ProgramBuilder(config)
    declare(builder, op, config)
    emit(builder, op, schedule)
    return link(builder.finish())


def time_schedule(
    op: TileOp, schedule: Schedule, config: VtaConfig, model: str | CycleModel = "pynq", *, timeline: bool = False
) -> SimulationResult:
    """Cycles and counters of `op` alone under `schedule`; nothing is computed."""
    linked = program_of(canonical(op), schedule, config)
    return simulate(linked, model=model, functional=False, strict=False, timeline=timeline)


class _Search:
    """Best-first search of one operator."""

    def __init__(self, op: TileOp, config: VtaConfig, model: CycleModel, progress: Progress | None) -> None:
        self.op, self.config, self.model, self.progress = op, config, model, progress
        self.rates = rates_of(model, config)
        self.seen: set[Schedule] = set()
        self.queue: list[tuple[float, int, int, Schedule]] = []
        self.best: tuple[int, Schedule] | None = None
        self.tried = 0
        self.bound = 0

    def run(self, deadline: float) -> ScheduleResult:
        default = normalized(default_schedule(self.op, self.config), self.op)
        self.add([default])
        default_cycles = self.try_next()
        self.add(seeds(self.op, self.config))
        idle = 0
        while self.queue and idle < PATIENCE and time.process_time() < deadline and not self.is_good_enough():
            before = self.best
            self.try_next()
            idle = 0 if self.best != before else idle + 1
        assert self.best is not None
        cycles, schedule = self.best
        return ScheduleResult(schedule, cycles, self.tried, min(self.bound, cycles), default_cycles)

    def is_good_enough(self) -> bool:
        return self.best is not None and self.best[0] <= GOOD_ENOUGH * self.bound

    def add(self, schedules: Iterable[Schedule]) -> None:
        """Queue those that are new, fit, and may be better than the best."""
        for schedule in schedules:
            schedule = normalized(schedule, self.op)
            if schedule in self.seen:
                continue
            self.seen.add(schedule)
            if not fits(self.op, schedule, self.config):
                continue
            work = work_of(self.op, schedule, self.config)
            bound = lower_bound(work, self.rates, self.config)
            self.bound = min(self.bound, bound) if self.bound else bound
            if self.best is None or bound < self.best[0]:
                rank = estimate(work, self.rates, self.config)
                heapq.heappush(self.queue, (rank, len(self.seen), bound, schedule))

    def try_next(self) -> int:
        """Simulate the most promising candidate; its cycles, or the best's where it cannot be better."""
        _, _, bound, schedule = heapq.heappop(self.queue)
        if self.best is not None and bound >= self.best[0]:
            return self.best[0]
        cycles = self.cycles(schedule)
        if self.best is None or cycles < self.best[0]:
            self.best = cycles, schedule
            if self.progress is not None:
                self.progress(f"{cycles} cycles after {self.tried} candidates (bound {self.bound}): {schedule}")
        if cycles <= NEAR_BEST * self.best[0]:
            self.add(neighbours(schedule, self.op))
        return cycles

    def cycles(self, schedule: Schedule) -> int:
        self.tried += 1
        return time_schedule(self.op, schedule, self.config, self.model).cycles
