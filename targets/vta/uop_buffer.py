"""The micro-op buffer: which micro-op sequences lie where, and what must be loaded before one is used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lpsn_tvm.errors import CompileError

Uops = npt.NDArray[np.int64]


class UopBuffer:
    """Sequences of micro-ops in DRAM (each kept once) and the part of them that the buffer holds now.

    Parameters
    ----------
    depth : int
        Entries of the buffer.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.stored: list[Uops] = []
        self._dram: dict[bytes, int] = {}
        self._dram_size = 0
        self._resident: dict[bytes, int] = {}
        self._sizes: dict[bytes, int] = {}
        self._cursor = 0

    def find(self, uops: Uops) -> int | None:
        """First entry of a resident sequence, or None."""
        return self._resident.get(uops.tobytes())

    def place(self, sequences: Sequence[Uops]) -> tuple[int, int, int]:
        """Make room for sequences that are not resident, side by side.

        Returns
        -------
        (first buffer entry, first DRAM entry, entries) of the one transfer that brings them.

        Raises
        ------
        CompileError
            They do not fit the buffer.
        """
        total = sum(len(s) for s in sequences)
        if total > self.depth:
            raise CompileError(f"{total} micro-ops do not fit the buffer of {self.depth}", where="micro-ops")
        if self._cursor + total > self.depth:
            self._cursor = 0
        start = self._cursor
        self._evict(start, start + total)
        dram = self._side_by_side(sequences)
        position = start
        for sequence in sequences:
            key = sequence.tobytes()
            self._resident[key], self._sizes[key] = position, len(sequence)
            position += len(sequence)
        self._cursor = position
        return start, dram, total

    def _side_by_side(self, sequences: Sequence[Uops]) -> int:
        """DRAM entry from which the sequences follow each other."""
        joined = np.concatenate(list(sequences))
        key = joined.tobytes()
        if key not in self._dram:
            self._dram[key] = self._dram_size
            self.stored.append(joined)
            self._dram_size += len(joined)
        return self._dram[key]

    def _evict(self, start: int, end: int) -> None:
        gone = [k for k, at in self._resident.items() if at < end and start < at + self._sizes[k]]
        for key in gone:
            del self._resident[key]
