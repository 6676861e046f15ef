"""The other GEMM loop nest: rows and columns as the loops of an instruction, the whole reduction in its sequence.

A micro-op sequence holds base addresses, so every combination of buffer slots needs its own. With columns written
out (`nest`) a sequence of a 3x3 kernel has up to 9 x width entries; here it has taps x input blocks x output blocks,
however wide the image is, and one instruction does all taps that reach the same positions. Output blocks lie
innermost: they keep an accumulator from recurring too early, which needs at least three of them (times batches).

For example, a 3x3 kernel, padding 1, 4 output blocks, 2 input blocks, 56 columns, a tile inside the image: one
instruction of 3 * 2 * 4 micro-ops per kernel column, in loops (rows, 55 or 56 columns).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lpsn_tvm.schedules.vta.nest import MIN_DISTANCE, Axis, Body, GemmShape
from lpsn_tvm.schedules.vta.ops import Span, Tap


@lru_cache(maxsize=512)
def column_bodies(shape: GemmShape) -> tuple[Body, ...]:
    """The instructions of a chunk; none where fewer than three accumulators lie innermost (use `gemm_bodies`)."""
    if shape.outputs.count * shape.batches.count < MIN_DISTANCE:
        return ()
    groups: dict[tuple[Span, Span, int, int], list[Tap]] = {}
    for tap in shape.taps:
        groups.setdefault((tap.dst_y, tap.dst_x, tap.src_y.step, tap.src_x.step), []).append(tap)
    return tuple(_body(shape, taps) for taps in groups.values())


def _body(shape: GemmShape, taps: list[Tap]) -> Body:
    """Taps that reach the same positions. Innermost first: output blocks, batches, taps, input blocks; then columns
    and rows as loops.
    """
    y, x = (taps[0].dst_y, taps[0].src_y), (taps[0].dst_x, taps[0].src_x)
    rows = Axis("rows", y[0].count, y[0].step * shape.row_dst, y[1].step * shape.row_src, 0)
    columns = Axis("columns", x[0].count, x[0].step, x[1].step, 0)
    loops = [axis for axis in (rows, columns) if axis.count > 1]
    corners = np.array([_corner(shape, tap) for tap in taps], np.int64)
    sequence = corners[:, None, None] + shape.batches.offsets()[None, :, None] + shape.outputs.offsets()[None, None]
    sequence = sequence.reshape(-1, 3)
    if len(loops) < 2 and shape.inputs.count > 1:
        # A loop is left over: input blocks become the outermost one, and the sequence stays short.
        loops.insert(0, shape.inputs)
    else:
        sequence = (shape.inputs.offsets()[:, None] + sequence[None]).reshape(-1, 3)
    return Body(sequence, tuple(axis.loop() for axis in loops))


def _corner(shape: GemmShape, tap: Tap) -> tuple[int, int, int]:
    """The micro-op of a tap at its first position, first blocks."""
    dst = tap.dst_y.start * shape.row_dst + tap.dst_x.start
    return dst, tap.src_y.start * shape.row_src + tap.src_x.start, tap.weight
