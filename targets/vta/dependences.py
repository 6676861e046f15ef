"""Dependence tokens from what instructions touch: the hazards between the three units, and the fewest tokens that
order them.

Each unit executes its own instructions in order, so "unit V has finished its instruction j" implies all before j. A
vector clock per instruction records how far each other unit is known to be; a hazard that the clock already covers
needs no token. A token is a push flag on V's instruction j and a pop flag on the waiting instruction; pushes and pops
of a queue pair up in order because what a unit knows only grows.

There is no queue between load and store: one waits for the other through a compute instruction that already waited,
or, where there is none, through a NOP.

A queue holds few tokens on some designs and loses what goes beyond. A unit that could run far ahead of the one it
wakes therefore waits for it now and then.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lpsn_tvm.targets.vta.isa import Flags

LOAD, COMPUTE, STORE = 0, 1, 2
NEVER = -1
Index = npt.NDArray[np.int64]

# (waiting unit, finished unit) -> (pop flag of the waiting instruction, push flag of the finished one)
FLAGS = {
    (COMPUTE, LOAD): ("pop_prev", "push_next"),
    (LOAD, COMPUTE): ("pop_next", "push_prev"),
    (COMPUTE, STORE): ("pop_next", "push_prev"),
    (STORE, COMPUTE): ("pop_prev", "push_next"),
}

UNCONNECTED = {LOAD: STORE, STORE: LOAD}
MOST_TOKENS = 128
"""Tokens that may wait in a queue when a unit issues an instruction; 255 is what every design holds."""
FEWER_TOKENS = 64
"""How many may be left once it has waited."""
CROWDED_TOKENS = 192
"""Instructions issued long before are asked for no more tokens than this: the latest one's stands for all."""


class Touched:
    """For every tile of one memory: the last instruction of each unit that read it and that wrote it."""

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles
        # By unit, as soon as it does so at all: most memories have one reader and one writer.
        self._read: dict[int, Index] = {}
        self._written: dict[int, Index] = {}

    def before_read(self, unit: int, tiles: Index | slice) -> dict[int, int]:
        """What `unit` must wait for before it reads `tiles`: unit -> its instruction."""
        return _latest(self._written, unit, tiles)

    def before_write(self, unit: int, tiles: Index | slice) -> dict[int, int]:
        """What `unit` must wait for before it writes `tiles`."""
        return merge(_latest(self._written, unit, tiles), _latest(self._read, unit, tiles))

    def read(self, unit: int, tiles: Index | slice, index: int) -> None:
        """Instruction `index` of `unit` reads `tiles`."""
        self._mark(self._read, unit, tiles, index)

    def write(self, unit: int, tiles: Index | slice, index: int) -> None:
        """Instruction `index` of `unit` writes `tiles`."""
        self._mark(self._written, unit, tiles, index)

    def _mark(self, table: dict[int, Index], unit: int, tiles: Index | slice, index: int) -> None:
        if unit not in table:
            table[unit] = np.full(self.tiles, NEVER, np.int64)
        table[unit][tiles] = index


def _latest(table: Mapping[int, Index], unit: int, tiles: Index | slice) -> dict[int, int]:
    found = {}
    for other, latest in table.items():
        if other != unit:
            last = int(np.maximum.reduce(latest[tiles], initial=NEVER))
            if last > NEVER:
                found[other] = last
    return found


def merge(first: Mapping[int, int], *others: Mapping[int, int]) -> dict[int, int]:
    """The later instruction per unit."""
    result = dict(first)
    for wait in others:
        for unit, index in wait.items():
            if index > result.get(unit, NEVER):
                result[unit] = index
    return result


class Dependences:
    """The clocks of the three units and the instructions issued so far."""

    def __init__(self) -> None:
        self.issued: tuple[list[Flags], list[Flags], list[Flags]] = ([], [], [])
        self._known = [[NEVER] * 3 for _ in range(3)]
        self._clocks: tuple[list[tuple[int, ...]], ...] = ([], [], [])
        # (finished unit, waiting unit) -> instructions that push a token, in order.
        self._pushing: dict[tuple[int, int], list[int]] = {(source, unit): [] for unit, source in FLAGS}
        # Columns of the compute unit's clocks, each non-decreasing, for binary search.
        self._seen_by_compute: tuple[list[int], list[int], list[int]] = ([], [], [])

    def next_index(self, unit: int) -> int:
        """Number that the next instruction of `unit` gets."""
        return len(self.issued[unit])

    def needs_relay(self, unit: int, waits: Mapping[int, int]) -> int | None:
        """The instruction of the unit without a queue to `unit` that only a new compute NOP can make it wait for."""
        other = UNCONNECTED.get(unit)
        if other is None or other not in waits or self._known[unit][other] >= waits[other]:
            return None
        seen = self._seen_by_compute[other]
        return waits[other] if not seen or seen[-1] < waits[other] else None

    def issue(self, unit: int, instruction: Flags, waits: Mapping[int, int]) -> int:
        """Append an instruction that waits for `waits` (unit -> instruction); sets flags on both sides."""
        waits = merge(waits, self._throttle(unit))
        other = UNCONNECTED.get(unit)
        if other is not None and other in waits:
            index = waits.pop(other)
            if self._known[unit][other] < index:
                # The first compute instruction that had waited for it vouches for it.
                relay = bisect_left(self._seen_by_compute[other], index)
                waits[COMPUTE] = max(relay, waits.get(COMPUTE, NEVER))
        for source, index in waits.items():
            self._wait(unit, instruction, source, index)
        self.issued[unit].append(instruction)
        self._clocks[unit].append(tuple(self._known[unit]))
        if unit == COMPUTE:
            for source in (LOAD, COMPUTE, STORE):
                self._seen_by_compute[source].append(self._known[COMPUTE][source])
        return len(self.issued[unit]) - 1

    def _throttle(self, unit: int) -> dict[int, int]:
        """What `unit` must wait for so that its tokens do not pile up."""
        waits = {}
        for source, other in self._pushing:
            if source == unit and self._waiting(unit, other) >= MOST_TOKENS:
                wanted = self._pushing[unit, other][-FEWER_TOKENS]
                waits[other] = bisect_left(self._clocks[other], wanted, key=lambda clock: clock[unit])
        return waits

    def _waiting(self, source: int, unit: int) -> int:
        """Most tokens from `source` that `unit` may not have popped when `source` begins its next instruction."""
        pushing, known = self._pushing[source, unit], self._known[source][unit]
        if len(pushing) < MOST_TOKENS:
            return len(pushing)
        return len(pushing) - bisect_right(pushing, self._clocks[unit][known][source] if known > NEVER else NEVER)

    def _wait(self, unit: int, instruction: Flags, source: int, index: int) -> None:
        known = self._known[unit]
        if known[source] >= index:
            return
        if self._waiting(source, unit) >= CROWDED_TOKENS:
            index = len(self.issued[source]) - 1
        pop, push = FLAGS[unit, source]
        setattr(instruction, pop, True)
        setattr(self.issued[source][index], push, True)
        self._pushing[source, unit].append(index)
        known[source] = index
        for third, finished in enumerate(self._clocks[source][index]):
            if third != unit:
                known[third] = max(known[third], finished)
