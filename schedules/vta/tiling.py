"""Cutting an operator: which rows and columns an output tile, its pooling windows and its kernel taps need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from lpsn_tvm.schedules.vta.ops import Gemm, Pool, Span, Store, Tap, TileOp
from lpsn_tvm.schedules.vta.schedule import Schedule


@dataclass(frozen=True)
class Range:
    """Positions `start <= i < stop` along one axis."""

    start: int
    stop: int

    @property
    def count(self) -> int:
        """Number of positions."""
        return self.stop - self.start


@dataclass(frozen=True)
class Tile:
    """One output tile: its batches, its blocks and, per level, its rows and columns (level 0 is before any `Pool`)."""

    n: Range
    o: Range
    rows: tuple[Range, ...]
    columns: tuple[Range, ...]

    def positions(self, level: int) -> int:
        """Accumulator tiles of one block at `level`."""
        return self.rows[level].count * self.columns[level].count

    def accumulators(self, level: int) -> int:
        """Accumulator tiles at `level`."""
        return self.n.count * self.o.count * self.positions(level)


def cut(length: int, size: int) -> list[Range]:
    """[0, length) in pieces of `size`, the last one smaller."""
    return [Range(start, min(start + size, length)) for start in range(0, length, size)]


def extents(op: TileOp) -> list[tuple[int, int]]:
    """(height, width) of the accumulator rectangle before the first `Pool`, after it, ..."""
    return [(op.height, op.width)] + [(step.height, step.width) for step in op.steps if isinstance(step, Pool)]


def needed(pool: Pool, axis: int, wanted: Range, length: int, outputs: int, whole: bool) -> Range:
    """Positions along `axis` that the windows of `wanted` read.

    With `whole` also those between windows, so that all tiles together cover the axis (they are stored, too).
    """
    stride, pad, kernel = pool.strides[axis], pool.padding[axis], pool.kernel[axis]
    start, stop = wanted.start * stride - pad, (wanted.stop - 1) * stride - pad + kernel
    if whole:
        start = 0 if wanted.start == 0 else start
        stop = length if wanted.stop == outputs else max(stop, wanted.stop * stride - pad)
    return Range(max(0, start), min(length, stop))


def _axis_ranges(op: TileOp, axis: int, wanted: Range) -> tuple[Range, ...]:
    """`wanted` of the last level, and what it needs at every level before it, first level first."""
    sizes = [extent[axis] for extent in extents(op)]
    ranges = [wanted]
    level = len(sizes) - 1
    for index in range(len(op.steps) - 1, -1, -1):
        step = op.steps[index]
        if isinstance(step, Pool):
            whole = any(isinstance(before, Store) for before in op.steps[:index])
            ranges.insert(0, needed(step, axis, ranges[0], sizes[level - 1], sizes[level], whole))
            level -= 1
    return tuple(ranges)


def axis_tiles(op: TileOp, axis: int, size: int) -> list[tuple[Range, ...]]:
    """The row (axis 0) or column (axis 1) ranges of all tiles, each per level."""
    return [_axis_ranges(op, axis, wanted) for wanted in cut(extents(op)[-1][axis], size)]


def tiles(op: TileOp, schedule: Schedule) -> Iterator[tuple[Tile, int]]:
    """All output tiles in the order of the schedule, each with its accumulator slot."""
    batches = cut(op.batches, schedule.tile_b)
    blocks = cut(op.blocks, schedule.tile_co)
    rows = axis_tiles(op, 0, schedule.tile_h)
    columns = axis_tiles(op, 1, schedule.tile_w)
    spatial = [(n, r, c) for n in batches for r in rows for c in columns]
    # With two threads, pairs of neighbours along the thread axis are innermost.
    along_oc = schedule.thread_axis == "oc"
    if schedule.order == "oc":
        group = schedule.threads if along_oc else 1
        order = [
            (o, s) for start in range(0, len(blocks), group) for s in spatial for o in blocks[start : start + group]
        ]
    else:
        group = schedule.threads if not along_oc else 1
        order = [
            (o, s) for start in range(0, len(spatial), group) for o in blocks for s in spatial[start : start + group]
        ]
    for index, (o, (n, r, c)) in enumerate(order):
        yield Tile(n, o, r, c), index % schedule.threads


def clip_span(dst: Span, src: Span, inside: Range) -> tuple[Span, Span] | None:
    """The part of a tap whose accumulators lie `inside`, accumulators counted from its start; None where empty."""
    first = max(0, -(-(inside.start - dst.start) // dst.step))
    last = min(dst.count, -(-(inside.stop - dst.start) // dst.step))
    if last <= first:
        return None
    return (
        Span(dst.start + first * dst.step - inside.start, dst.step, last - first),
        Span(src.start + first * src.step, src.step, last - first),
    )


def clip_taps(taps: tuple[Tap, ...], rows: Range, columns: Range) -> tuple[Tap, ...]:
    """The taps of one tile, accumulator positions counted from its corner."""
    clipped = []
    for tap in taps:
        y, x = clip_span(tap.dst_y, tap.src_y, rows), clip_span(tap.dst_x, tap.src_x, columns)
        if y is not None and x is not None:
            clipped.append(Tap(y[0], x[0], y[1], x[1], tap.weight))
    return tuple(clipped)


@dataclass(frozen=True)
class Window:
    """Source rows `row, row + row_step, ...` (`rows` of them) and columns `column ... column + columns - 1`."""

    row: int
    row_step: int
    rows: int
    column: int
    columns: int

    @property
    def tiles(self) -> int:
        """Tiles per block."""
        return self.rows * self.columns


def spans_cover(spans: list[Span]) -> tuple[int, int, int]:
    """(first, step, count) of the coarsest progression that holds all positions of the spans."""
    first = min(span.start for span in spans)
    last = max(span.start + (span.count - 1) * span.step for span in spans)
    step = 0
    for span in spans:
        step = gcd(step, span.start - first)
        if span.count > 1:
            step = gcd(step, span.step)
    step = step or 1
    return first, step, (last - first) // step + 1


def window(taps: tuple[Tap, ...]) -> Window:
    """What the taps read of a source block. Columns are a contiguous run: a load cannot skip any."""
    row, row_step, rows = spans_cover([tap.src_y for tap in taps])
    first, step, count = spans_cover([tap.src_x for tap in taps])
    return Window(row, row_step, rows, first, (count - 1) * step + 1)


def local_taps(taps: tuple[Tap, ...], inside: Window) -> tuple[Tap, ...]:
    """Taps whose source positions count rows and columns of `inside`."""
    moved = []
    for tap in taps:
        y = Span((tap.src_y.start - inside.row) // inside.row_step, tap.src_y.step // inside.row_step, tap.src_y.count)
        x = Span(tap.src_x.start - inside.column, tap.src_x.step, tap.src_x.count)
        moved.append(Tap(tap.dst_y, tap.dst_x, y, x, tap.weight))
    return tuple(moved)


def block_runs(step: Gemm, blocks: Range) -> Iterator[tuple[Range, int]]:
    """Runs of output blocks whose first input block advances by a constant, with that constant."""
    first = step.first_input
    start = blocks.start
    while start < blocks.stop:
        stop = start + 1
        advance = first[stop] - first[start] if stop < blocks.stop else 0
        while stop < blocks.stop and first[stop] - first[stop - 1] == advance and advance >= 0:
            stop += 1
        yield Range(start, stop), max(advance, 0) if stop - start > 1 else 0
        start = stop
