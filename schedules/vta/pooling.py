"""Maximum pooling of accumulators: rows within the rectangle, then columns into the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lpsn_tvm.schedules.vta.ops import Pool, Scalar, Step, TileOp, Vector
from lpsn_tvm.schedules.vta.tiling import Range, Tile
from lpsn_tvm.schedules.vta.vector_ops import alu_nest, clear

if TYPE_CHECKING:
    from lpsn_tvm.schedules.vta.recorder import Recorder
    from lpsn_tvm.targets.vta.isa import AluKind


def pool_early(op: TileOp) -> TileOp:
    """The same operator with every `Pool` before the elementwise steps in front of it: they then have less to do.

    Those steps are monotonic (accumulators do not overflow), so a maximum may be taken before them.

    [..., Gemm, Vector, Scalar, Pool, Store] -> [..., Gemm, Pool, Vector, Scalar, Store]
    """
    steps: list[Step] = []
    for step in op.steps:
        at = len(steps)
        if isinstance(step, Pool):
            while at and isinstance(steps[at - 1], Vector | Scalar):
                at -= 1
        steps.insert(at, step)
    return replace(op, steps=tuple(steps))


Pairs = tuple[tuple[int, ...], tuple[int, ...]]


def affine_runs(dst: Sequence[int], src: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Maximal runs in which both sequences have constant differences: (first index, count, dst step, src step)."""
    runs, begin = [], 0
    while begin < len(dst):
        end = begin + 1
        steps = (dst[end] - dst[begin], src[end] - src[begin]) if end < len(dst) else (0, 0)
        while end < len(dst) and (dst[end] - dst[end - 1], src[end] - src[end - 1]) == steps:
            end += 1
        runs.append((begin, end - begin, *steps))
        begin = end
    return runs


@dataclass(frozen=True)
class Windows:
    """The windows of one tile along one axis, positions counted from the tile's corner.

    Parameters
    ----------
    first : tuple of int
        Per output position, the first input position of its window that exists.
    offsets : tuple of (tuple of int, tuple of int)
        Per further element of the windows: outputs that have it, and its positions.
    """

    first: tuple[int, ...]
    offsets: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def windows(wanted: Range, inside: Range, kernel: int, stride: int, pad: int) -> Windows:
    """The windows of outputs `wanted` over inputs `inside`."""
    spans = [
        range(
            max(i * stride - pad, inside.start) - inside.start,
            min(i * stride - pad + kernel, inside.stop) - inside.start,
        )
        for i in range(wanted.start, wanted.stop)
    ]
    offsets = []
    for k in range(1, kernel):
        having = tuple(index for index, span in enumerate(spans) if len(span) > k)
        if having:
            offsets.append((having, tuple(spans[index][k] for index in having)))
    return Windows(tuple(span[0] for span in spans), tuple(offsets))


def pool(builder: Recorder, step: Pool, tile: Tile, level: int, source: int, target: int) -> None:
    """Maximum over windows of the rectangle of `level` at `source`; the rectangle of `level + 1` goes to `target`.

    Rows first, into the first row of each window, then columns.
    """
    rows, columns = (
        windows(ranges[level + 1], ranges[level], step.kernel[axis], step.strides[axis], step.padding[axis])
        for axis, ranges in enumerate((tile.rows, tile.columns))
    )
    inside = _Rectangles(tile.n.count * tile.o.count, tile, level, level)
    across = _Rectangles(tile.n.count * tile.o.count, tile, level + 1, level)
    line = tuple(range(tile.columns[level].count))
    every_row, every_column = tuple(range(len(rows.first))), tuple(range(len(columns.first)))
    elements: list[Pairs] = [(every_row, rows.first)]
    in_place = _in_place(rows)
    if in_place is None:
        elements += list(rows.offsets)
    else:
        for having, positions in in_place:
            own = tuple(rows.first[index] for index in having)
            _visit(builder, "max", inside, (source, source), (own, positions), (line, line))
    clear(builder, target, tile.accumulators(level + 1))
    _visit(builder, "add", across, (target, source), elements[0], (every_column, columns.first))
    for element in elements:
        for column in ((every_column, columns.first), *columns.offsets):
            if element is not elements[0] or column[1] is not columns.first:
                _visit(builder, "max", across, (target, source), element, column)


def _in_place(rows: Windows) -> list[Pairs] | None:
    """The elements in an order in which every window's first row may take the maximum; None where there is none.

    A first row that another window reads must be read before it changes: by the first element visited, in ascending
    order.
    """
    first = set(rows.first)
    reading = [element for element in rows.offsets if first & set(element[1])]
    if len(first) < len(rows.first) or len(reading) > 1:
        return None
    return reading + [element for element in rows.offsets if element not in reading]


class _Rectangles:
    """Strides of the rectangle that is written (`level` dst) and of the one that is read."""

    def __init__(self, blocks: int, tile: Tile, dst: int, src: int) -> None:
        self.blocks = blocks, tile.positions(dst), tile.positions(src)
        self.width = tile.columns[dst].count, tile.columns[src].count


def _visit(
    builder: Recorder, kind: AluKind, shape: _Rectangles, bases: tuple[int, int], rows: Pairs, columns: Pairs
) -> None:
    """`kind` of (dst, src) rows and columns, all blocks."""
    for row, row_count, *row_step in affine_runs(*rows):
        for column, column_count, *column_step in affine_runs(*columns):
            dst, src = (bases[k] + rows[k][row] * shape.width[k] + columns[k][column] for k in range(2))
            axes = [
                shape.blocks,
                (row_count, row_step[0] * shape.width[0], row_step[1] * shape.width[1]),
                (column_count, column_step[0], column_step[1]),
            ]
            alu_nest(builder, kind, dst, src, axes)
