"""ALU work on rectangles of accumulators: immediates, per-block vectors, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lpsn_tvm.schedules.vta.ops import Pool
from lpsn_tvm.schedules.vta.tiling import Range, Tile

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


def affine_runs(values: Sequence[int]) -> list[tuple[int, int, int]]:
    """Maximal runs of a sequence with constant differences: (first index, count, difference)."""
    runs, begin = [], 0
    while begin < len(values):
        end = begin + 1
        step = values[end] - values[begin] if end < len(values) else 0
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        runs.append((begin, end - begin, step))
        begin = end
    return runs


def _sources(wanted: Range, inside: Range, stride: int, pad: int, offset: int, *, clamp: bool) -> dict[int, int]:
    """Output position -> input position at `offset` inside its window, both counted from the tile's corner.

    Positions outside are left out, or, to `clamp`, replaced by the nearest one inside (which is in the window, too).
    """
    found = {}
    for index, position in enumerate(range(wanted.start, wanted.stop)):
        source = position * stride - pad + offset
        if clamp:
            source = min(max(source, inside.start), inside.stop - 1)
        if inside.start <= source < inside.stop:
            found[index] = source - inside.start
    return found


def pool(builder: Recorder, step: Pool, tile: Tile, level: int, source: int, target: int) -> None:
    """Maximum over windows of the rectangle of `level` at `source`; the rectangle of `level + 1` goes to `target`."""
    clear(builder, target, tile.accumulators(level + 1))
    _visit(builder, "add", step, tile, level, source, target, (0, 0), clamp=True)
    for y in range(step.kernel[0]):
        for x in range(step.kernel[1]):
            if (y, x) != (0, 0) or any(step.padding):
                _visit(builder, "max", step, tile, level, source, target, (y, x), clamp=False)


def _visit(
    builder: Recorder, kind: AluKind, step: Pool, tile: Tile, level: int, source: int, target: int,
    offset: tuple[int, int], *, clamp: bool,
) -> None:  # fmt: skip
    """One element of every window."""
    maps = [
        _sources(ranges[level + 1], ranges[level], step.strides[axis], step.padding[axis], offset[axis], clamp=clamp)
        for axis, ranges in enumerate((tile.rows, tile.columns))
    ]
    width_out, width_in = tile.columns[level + 1].count, tile.columns[level].count
    blocks = (tile.n.count * tile.o.count, tile.positions(level + 1), tile.positions(level))
    outputs = [sorted(found) for found in maps]
    inputs = [[found[index] for index in sorted(found)] for found in maps]
    for row, rows, row_step in affine_runs(inputs[0]):
        for column, columns, column_step in affine_runs(inputs[1]):
            dst = target + outputs[0][row] * width_out + outputs[1][column]
            src = source + inputs[0][row] * width_in + inputs[1][column]
            axes = [blocks, (rows, width_out, row_step * width_in), (columns, 1, column_step)]
            alu_nest(builder, kind, dst, src, axes)
