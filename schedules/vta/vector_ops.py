"""ALU work on rectangles of accumulators as few instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lpsn_tvm.schedules.vta.recorder import Recorder
    from lpsn_tvm.targets.vta.isa import AluKind

Axes = Sequence[tuple[int, int, int]]
LOOPS = 2
# Axes beyond the two loops are written out up to this many micro-ops, else they become instructions.
LONG_SEQUENCE = 64


def merged(axes: Axes) -> list[tuple[int, int, int]]:
    """The same iterations (count, dst, src), outer first, with axes joined that continue each other."""
    result: list[tuple[int, int, int]] = []
    for count, dst, src in axes:
        if count == 1:
            continue
        if result and result[-1][1] == count * dst and result[-1][2] == count * src:
            result[-1] = (result[-1][0] * count, dst, src)
        else:
            result.append((count, dst, src))
    return result


def alu_nest(builder: Recorder, kind: AluKind, dst: int, src: int, axes: Axes, immediate: int | None = None) -> None:
    """`kind` on every index of the axes, each accumulator at most once: order and recurrence do not matter."""
    left = sorted(merged(axes), key=lambda axis: axis[0])
    loops, rest = left[-LOOPS:], left[:-LOOPS]
    uops = np.array([[dst, src]], np.int64)
    for count, dst_step, src_step in rest:
        steps = np.arange(count)[:, None] * np.array([[dst_step, src_step]])
        uops = (uops[:, None] + steps[None]).reshape(-1, 2)
    for begin in range(0, len(uops), LONG_SEQUENCE):
        builder.alu(kind, uops[begin : begin + LONG_SEQUENCE], loops, immediate=immediate)


def clear(builder: Recorder, base: int, count: int) -> None:
    """Zero `count` accumulators."""
    builder.gemm(np.array([[base, 0, 0]], np.int64), [(count, 1, 0, 0)], reset=True)
