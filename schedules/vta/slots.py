"""Where data lives in SRAM: equal slots with known contents, replaced with knowledge of the future; DMA transfers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

SIZE_LIMIT = (1 << 16) - 1  # of the row, row count and stride fields of an instruction
NEVER = 1 << 60


@dataclass(frozen=True)
class Transfer:
    """One two-dimensional transfer: `rows` runs of `columns` tiles, `stride` apart in DRAM, dense in SRAM."""

    sram: int
    dram: int
    rows: int
    columns: int
    stride: int


def transfers(base: int, axes: Iterable[tuple[int, int]], run: int) -> Iterator[Transfer]:
    """Transfers of `run` contiguous tiles for every index of `axes` = (count, DRAM stride), outer first, from `base`.

    For example, axes (4, 196), (14, 14) and a run of 14 are one transfer: one row of 784 tiles.
    """
    left = [axis for axis in axes if axis[0] > 1]
    while left and left[-1][1] == run and run * left[-1][0] <= SIZE_LIMIT:
        run *= left.pop()[0]
    rows, stride = 1, run
    if left and left[-1][1] <= SIZE_LIMIT:
        rows, stride = left.pop()
        while left and left[-1][1] == rows * stride and rows * left[-1][0] <= SIZE_LIMIT:
            rows *= left.pop()[0]
    starts = [base]
    for count, step in left:
        starts = [start + i * step for start in starts for i in range(count)]
    for index, start in enumerate(starts):
        yield Transfer(index * rows * run, start, rows, run, stride)


class SlotPool:
    """`slots` slots of `size` tiles from `base`. A content stays until its slot is needed for another one.

    Parameters
    ----------
    base, size, slots : int
    sequence : iterable of hashable
        All contents in the order in which they will be asked for.
    """

    def __init__(self, base: int, size: int, slots: int, sequence: Iterable[Hashable]) -> None:
        self.base, self.size, self.slots = base, size, slots
        self._uses: dict[Hashable, list[int]] = {}
        for time, key in enumerate(sequence):
            self._uses.setdefault(key, []).append(time)
        self._time = 0
        self._where: dict[Hashable, int] = {}
        self._contents: list[Hashable | None] = [None] * slots
        self._last_use = [-1] * slots

    def place(self, key: Hashable) -> tuple[int, bool]:
        """The first tile of the slot that holds the next content, and whether it must be loaded."""
        slot = self._where.get(key)
        missing = slot is None
        if slot is None:
            slot = self._victim()
            old = self._contents[slot]
            if old is not None:
                del self._where[old]
            self._contents[slot] = key
            self._where[key] = slot
        self._last_use[slot] = self._time
        self._time += 1
        return self.base + slot * self.size, missing

    def _victim(self) -> int:
        """A free slot, else one that is never used again, else the one used again last; never the newest of several:
        a load into it would wait for the instructions that read it now.
        """
        candidates = list(range(self.slots))
        if self.slots > 1:
            candidates.remove(max(candidates, key=lambda slot: self._last_use[slot]))
        if None in self._contents:
            return self._contents.index(None)
        return max(candidates, key=lambda slot: (self._next_use(slot), -self._last_use[slot]))

    def _next_use(self, slot: int) -> int:
        uses = self._uses[self._contents[slot]]
        later = bisect_right(uses, self._time)
        return uses[later] if later < len(uses) else NEVER
