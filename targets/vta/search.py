"""Schedule search: the fewest simulated cycles for one tile operator, within seconds, remembered on disk.

Schedules come from a coarse grid and from neighbours of the best ones found so far. They are simulated, timing only, in
the order of an estimate (`bounds`) that the results correct (`ranking`); one whose lower bound is no better than the
best is left out.
The search ends when nothing is left, when the best is as good as the hardware allows, when many in a row were no
better, or when the time is up. The default schedule comes first, so searching never makes an operator slower.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.emit import default_schedule, emit, fits
from lpsn_tvm.schedules.vta.ops import TileOp
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.vta.bounds import estimate, lower_bound, rates_of, work_of
from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.cycle_model import CycleModel, cycle_model
from lpsn_tvm.targets.vta.neighbours import neighbours, normalized, seeds
from lpsn_tvm.targets.vta.program import LinkedProgram, link
from lpsn_tvm.targets.vta.ranking import Ranking, Vector, features
from lpsn_tvm.targets.vta.schedule_cache import ScheduleCache, open_cache
from lpsn_tvm.targets.vta.search_key import canonical, declare, search_key
from lpsn_tvm.targets.vta.simulator import SimulationResult, simulate

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

BUDGET_SECONDS = 3.0
PATIENCE = 48
# Candidates simulated to learn from, and those simulated between two rankings.
SPREAD = 12
BATCH = 4
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
    known = known_schedule(op, config, chosen, store)
    if known is not None:
        return known
    result = _Search(op, config, chosen, progress).run(time.process_time() + budget_seconds)
    if store is not None:
        store.write(search_key(op, config, chosen), result.to_json())
    return result


def known_schedule(
    op: TileOp, config: VtaConfig, model: CycleModel, cache: ScheduleCache | None
) -> ScheduleResult | None:
    """The remembered result for a canonical operator, or None."""
    entry = None if cache is None else cache.read(search_key(op, config, model))
    result = None if entry is None else ScheduleResult.from_json(entry)
    return result if result is not None and fits(op, result.schedule, config) else None


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


@dataclass(frozen=True)
class _Candidate:
    schedule: Schedule
    bound: int
    estimate: float
    features: Vector


class _Search:
    """Search of one operator."""

    def __init__(self, op: TileOp, config: VtaConfig, model: CycleModel, progress: Progress | None) -> None:
        self.op, self.config, self.model, self.progress = op, config, model, progress
        self.rates = rates_of(model, config)
        self.ranking = Ranking()
        self.seen: set[Schedule] = set()
        self.queue: list[_Candidate] = []
        self.best: tuple[int, Schedule] | None = None
        self.tried = 0
        self.bound = 0

    def run(self, deadline: float) -> ScheduleResult:
        self.add([default_schedule(self.op, self.config)])
        default_cycles = self.simulate(self.queue.pop())
        self.add(seeds(self.op, self.config))
        idle = 0
        for candidate in self.in_turn():
            if idle >= PATIENCE or time.process_time() >= deadline or self.is_good_enough():
                break
            before = self.best
            self.simulate(candidate)
            idle = 0 if self.best != before else idle + 1
        assert self.best is not None
        cycles, schedule = self.best
        return ScheduleResult(schedule, cycles, self.tried, min(self.bound, cycles), default_cycles)

    def in_turn(self) -> Iterator[_Candidate]:
        """Candidates, the most promising first; the first ones spread over the better half, to learn from."""
        self.queue.sort(key=lambda candidate: candidate.estimate)
        spread = self.queue[: len(self.queue) // 2 + 1 : max(1, len(self.queue) // (2 * SPREAD))]
        for candidate in spread:
            self.queue.remove(candidate)
            yield candidate
        while self.queue:
            yield from self.take(BATCH)

    def take(self, count: int) -> list[_Candidate]:
        """Remove the `count` best predicted from the queue, and those that cannot be better than the best."""
        if self.best is not None:
            self.queue = [candidate for candidate in self.queue if candidate.bound < self.best[0]]
        if not self.queue:
            return []
        rows = np.stack([candidate.features for candidate in self.queue])
        predicted = self.ranking.predict(rows, np.array([candidate.estimate for candidate in self.queue]))
        order = [int(index) for index in np.argsort(predicted, kind="stable")[:count]]
        chosen = [self.queue[index] for index in order]
        for index in sorted(order, reverse=True):
            del self.queue[index]
        return chosen

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
                likely = estimate(work, self.rates, self.config)
                self.queue.append(_Candidate(schedule, bound, likely, features(schedule, work)))

    def simulate(self, candidate: _Candidate) -> int:
        """Cycles of a candidate; its neighbours are queued if it is among the best."""
        self.tried += 1
        cycles = time_schedule(self.op, candidate.schedule, self.config, self.model).cycles
        self.ranking.observe(candidate.features, candidate.estimate, cycles)
        if self.best is None or cycles < self.best[0]:
            self.best = cycles, candidate.schedule
            if self.progress is not None:
                self.progress(f"{cycles} cycles after {self.tried} candidates (bound {self.bound}): {self.best[1]}")
        if cycles <= NEAR_BEST * self.best[0]:
            self.add(neighbours(candidate.schedule, self.op))
        return cycles
