"""The instructions of one output tile, kept back until it is known which micro-ops they need.

Loading micro-ops stops the compute unit and waits for the memory port each time: all sequences of a tile that are not
in the buffer yet come in as few transfers as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lpsn_tvm.schedules.vta.nest import Uops

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.builder import ProgramBuilder
    from lpsn_tvm.targets.vta.isa import AluKind, Memory

    Loops = Sequence[tuple[int, ...]]


class Recorder:
    """Takes instructions as the builder does; `flush` hands them over in the same order.

    Parameters
    ----------
    builder : ProgramBuilder
    """

    def __init__(self, builder: ProgramBuilder) -> None:
        self.builder = builder
        # A batch must leave room for what is still needed.
        self._batch = builder.config.uop_depth // 2
        self._pending: list[tuple[Uops | None, Callable[[], None]]] = []

    def load(
        self, memory: Memory, sram: int, region: str, tile: int, *, rows: int = 1, columns: int, stride: int
    ) -> None:
        """DRAM -> SRAM."""
        self._add(
            None, lambda: self.builder.load(memory, sram, region, tile, rows=rows, columns=columns, stride=stride)
        )

    def store(self, sram: int, region: str, tile: int, *, rows: int, columns: int, stride: int) -> None:
        """SRAM -> DRAM."""
        self._add(None, lambda: self.builder.store(sram, region, tile, rows=rows, columns=columns, stride=stride))

    def gemm(self, uops: Uops, loops: Loops, *, reset: bool = False) -> None:
        """GEMM over int64[n, 3]."""
        self._add(uops, lambda: self.builder.gemm(uops, loops, reset=reset))

    def alu(self, kind: AluKind, uops: Uops, loops: Loops, *, immediate: int | None = None) -> None:
        """ALU over int64[n, 2]."""
        triples = np.concatenate([uops, np.zeros((len(uops), 1), np.int64)], axis=1)
        self._add(triples, lambda: self.builder.alu(kind, uops, loops, immediate=immediate))

    def flush(self) -> None:
        """Everything so far to the builder."""
        pending, self._pending = self._pending, []
        batch: dict[bytes, Uops] = {}
        size = begin = 0
        for index, (uops, _) in enumerate(pending):
            if uops is None:
                continue
            key = uops.tobytes()
            if key in batch:
                continue
            if size + len(uops) > self._batch:
                self._issue(pending[begin:index], batch)
                batch, size, begin = {}, 0, index
            batch[key] = uops
            size += len(uops)
        self._issue(pending[begin:], batch)

    def _add(self, uops: Uops | None, issue: Callable[[], None]) -> None:
        self._pending.append((uops, issue))

    def _issue(self, pending: Sequence[tuple[Uops | None, Callable[[], None]]], batch: dict[bytes, Uops]) -> None:
        started = False
        for uops, issue in pending:
            # The load unit need not wait in program order for the micro-ops of the compute unit.
            if uops is not None and not started:
                self.builder.preload(list(batch.values()))
                started = True
            issue()
