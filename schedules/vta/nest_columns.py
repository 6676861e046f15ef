"""The other GEMM loop nest: rows and columns as the loops of an instruction, the whole reduction in its sequence.

A micro-op sequence holds base addresses, so every combination of buffer slots needs its own. With columns written
out (`nest`) a sequence of a 3x3 kernel has up to 9 x width entries; here it has taps x input blocks x output blocks,
however wide the image is, and one instruction per class of positions does a whole chunk. Output blocks lie innermost:
they keep an accumulator from recurring too early, which needs at least three of them (times batches).

For example, a 3x3 kernel, padding 1, 4 output blocks, 2 input blocks, 56 columns: interior columns 9 * 2 * 4 = 72
micro-ops in loops (rows, 54 columns), left and right border 48 micro-ops each in a loop (rows).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lpsn_tvm.schedules.vta.nest import MIN_DISTANCE, Axis, Body, GemmShape, Uops, classes, source_at
from lpsn_tvm.schedules.vta.ops import Span, Tap


@lru_cache(maxsize=512)
def column_bodies(shape: GemmShape) -> tuple[Body, ...]:
    """The instructions of a chunk; none where fewer than three accumulators lie innermost (use `gemm_bodies`)."""
    if shape.outputs.count * shape.batches.count < MIN_DISTANCE:
        return ()
    bodies = []
    for rows, row_step, row_members in classes([(tap.dst_y, tap.src_y) for tap in shape.taps]):
        reaching = [shape.taps[index] for index in row_members]
        for columns, column_step, members in classes([(tap.dst_x, tap.src_x) for tap in reaching]):
            taps = [reaching[index] for index in members]
            first = taps[0]
            row_axis = _axis("rows", first.dst_y, first.src_y, rows.start, rows.stop, row_step)
            column_axis = _axis("columns", first.dst_x, first.src_x, columns.start, columns.stop, column_step)
            row_axis = Axis("rows", row_axis.count, row_axis.dst * shape.row_dst, row_axis.src * shape.row_src, 0)
            corners = np.stack([_corner(shape, tap, rows.start, columns.start) for tap in taps])
            bodies.append(_body(shape, corners, row_axis, column_axis))
    return tuple(bodies)


def _axis(name: str, dst: Span, src: Span, start: int, stop: int, step: int) -> Axis:
    """Positions `start, start + step, ... < stop` of a class as an axis."""
    advance = source_at(dst, src, start + step) - source_at(dst, src, start)
    return Axis(name, -(-(stop - start) // step), step, advance, 0)


def _corner(shape: GemmShape, tap: Tap, row: int, column: int) -> Uops:
    """The micro-op of a tap at the first position of a class, first blocks."""
    source = source_at(tap.dst_y, tap.src_y, row) * shape.row_src + source_at(tap.dst_x, tap.src_x, column)
    return np.array([row * shape.row_dst + column, source, tap.weight], np.int64)


def _body(shape: GemmShape, corners: Uops, rows: Axis, columns: Axis) -> Body:
    """Innermost first: output blocks, batches, taps, input blocks; then columns and rows as loops."""
    loops = [axis for axis in (rows, columns) if axis.count > 1]
    sequence = corners[:, None, None] + shape.batches.offsets()[None, :, None] + shape.outputs.offsets()[None, None]
    sequence = sequence.reshape(-1, 3)
    if len(loops) < 2 and shape.inputs.count > 1:
        # A loop is left over: input blocks become the outermost one, and the sequence stays short.
        loops.insert(0, shape.inputs)
    else:
        sequence = (shape.inputs.offsets()[:, None] + sequence[None]).reshape(-1, 3)
    return Body(sequence, tuple(axis.loop() for axis in loops))
