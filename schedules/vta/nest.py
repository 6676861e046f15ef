"""GEMM loop nests: a reduction over taps and input blocks, as few instructions and short micro-op sequences.

An instruction has two loops around its micro-op sequence. Rows, columns, output blocks, input blocks, batches and taps
must fit into that: two of them become loops, the rest is written out. The same accumulator tile must not recur within
two preceding micro-operations, so positions (or output blocks) lie inside, the reduction outside.

For example, a 3x3 tap row over 14 columns, padding 1: sequence [tap 0: x = 1..13][tap 1: x = 0..13][tap 2: x = 0..12],
loops (rows, output blocks).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.vta.ops import Span, Tap
from lpsn_tvm.schedules.vta.tiling import Range

Uops = npt.NDArray[np.int64]
MIN_DISTANCE = 3
# A sequence is written out further only up to this length: long ones delay the start and fill the buffer.
LONG_SEQUENCE = 256
# No sequence may fill the buffer, which has to hold those of the next instructions, too.
SEQUENCE_LIMIT = 1024


@dataclass(frozen=True)
class Axis:
    """An axis of the nest: iterations, and what each adds to (dst, src, wgt)."""

    name: str
    count: int
    dst: int
    src: int
    wgt: int

    @property
    def reduces(self) -> bool:
        """Whether it revisits the same accumulators."""
        return self.dst == 0

    def loop(self) -> tuple[int, int, int, int]:
        """As the builder takes it."""
        return self.count, self.dst, self.src, self.wgt

    def offsets(self) -> Uops:
        """What each iteration adds, int64[count, 3]."""
        steps: Uops = np.arange(self.count)[:, None] * np.array([[self.dst, self.src, self.wgt]])
        return steps


@dataclass(frozen=True)
class GemmShape:
    """A chunk of reduction in SRAM: everything but the base addresses, hence a key.

    Parameters
    ----------
    taps : tuple of Tap
        Positions inside the accumulator rectangle and the input window, `weight` counted inside the chunk.
    row_dst, row_src : int
        Tiles per row of the accumulator rectangle and of the input window.
    batches, outputs, inputs : Axis
    inner : {"ci", "co", "x"}
        The preferred loop beside the rows.
    """

    taps: tuple[Tap, ...]
    row_dst: int
    row_src: int
    batches: Axis
    outputs: Axis
    inputs: Axis
    inner: str

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # A key of several caches, made of many small parts.
        return hash((self.taps, self.row_dst, self.row_src, self.batches, self.outputs, self.inputs, self.inner))


@dataclass(frozen=True, eq=False)
class Body:
    """One instruction relative to the bases of its slots."""

    uops: Uops
    loops: tuple[tuple[int, int, int, int], ...]


def classes(spans: list[tuple[Span, Span]]) -> list[tuple[Range, int, tuple[int, ...]]]:
    """Positions by the taps that reach them: (start and stop, step, indices of the taps).

    Within a class all taps advance by one constant in the source per position (taps that differ are split).
    """
    reached: dict[int, list[int]] = {}
    for index, (dst, _) in enumerate(spans):
        for i in range(dst.count):
            reached.setdefault(dst.start + i * dst.step, []).append(index)
    groups: dict[tuple[tuple[int, ...], float], list[int]] = {}
    for position in sorted(reached):
        by_ratio: dict[float, list[int]] = {}
        for index in reached[position]:
            dst, src = spans[index]
            by_ratio.setdefault(src.step / dst.step, []).append(index)
        for ratio, members in by_ratio.items():
            groups.setdefault((tuple(members), ratio), []).append(position)
    result = []
    for (members_key, _), positions in groups.items():
        for start, step, count in progressions(positions):
            result.append((Range(start, start + (count - 1) * step + 1), step, members_key))
    return result


def progressions(values: list[int]) -> Iterator[tuple[int, int, int]]:
    """Ascending values as (first, step, count), greedily."""
    begin = 0
    while begin < len(values):
        end = begin + 1
        step = values[end] - values[begin] if end < len(values) else 1
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        yield values[begin], step, end - begin
        begin = end


def source_at(dst: Span, src: Span, position: int) -> int:
    """Source position of a tap for one accumulator position."""
    return src.start + (position - dst.start) // dst.step * src.step


@lru_cache(maxsize=512)
def gemm_bodies(shape: GemmShape) -> tuple[Body, ...]:
    """The instructions of a chunk. Every one keeps accumulators apart."""
    bodies: list[Body] = []
    for rows, step, members in classes([(tap.dst_y, tap.src_y) for tap in shape.taps]):
        taps = [shape.taps[index] for index in members]
        first = taps[0]
        count = (rows.count - 1) // step + 1
        source = source_at(first.dst_y, first.src_y, rows.start + step) - source_at(
            first.dst_y, first.src_y, rows.start
        )
        axis = Axis("rows", count, step * shape.row_dst, source * shape.row_src, 0)
        lines = [_line(shape, tap, rows.start) for tap in taps]
        axes = [a for a in (axis, shape.outputs, shape.inputs, shape.batches) if a.count > 1]
        bodies += _nest(lines, axes, shape.inner)
    return tuple(bodies)


def _line(shape: GemmShape, tap: Tap, row: int) -> Uops:
    """The micro-ops of one tap over the columns of one row."""
    i = np.arange(tap.dst_x.count)
    dst = row * shape.row_dst + tap.dst_x.start + i * tap.dst_x.step
    src = source_at(tap.dst_y, tap.src_y, row) * shape.row_src + tap.src_x.start + i * tap.src_x.step
    return np.stack([dst, src, np.full_like(i, tap.weight)], axis=1)


_PRIORITY = {"ci": ("ci", "rows", "co", "n"), "co": ("co", "rows", "ci", "n"), "x": ("co", "rows", "ci", "n")}


def _nest(lines: list[Uops], axes: list[Axis], inner: str) -> list[Body]:
    """Two axes as loops, the rest written out; positions are moved inside until no accumulator recurs too early."""
    order = sorted(axes, key=lambda axis: _PRIORITY[inner].index(axis.name))
    positions = [axis for axis in order if not axis.reduces]
    # Ever more position axes are kept inside the sequence, the ones that make good loops last.
    for kept in range(len(positions) + 1):
        inside = positions[len(positions) - kept :]
        outside = [axis for axis in order if axis not in inside]
        bodies = _loops(lines, outside[:2], outside[2:], inside)
        if all(keeps_apart(body) for body in bodies):
            return bodies
    return flat_bodies(expand(_loops(lines, [], order, [])))


def _loops(lines: list[Uops], loops: list[Axis], rest: list[Axis], inside: list[Axis]) -> list[Body]:
    """`loops` as loops; `inside` written out within each tap; `rest` written out, or as instructions where too long."""
    for axis in inside:
        lines = [_spread(line, axis, innermost=False) for line in lines]
    length = sum(len(line) for line in lines)
    groups = [lines]
    for axis in rest:
        steps = axis.offsets()
        if length * axis.count <= LONG_SEQUENCE:
            length *= axis.count
            groups = [[line + step for step in steps for line in group] for group in groups]
        else:
            groups = [[line + step for line in group] for step in steps for group in groups]
    # A reduction is the outer loop, so that positions pass in between.
    ordered = tuple(axis.loop() for axis in sorted(loops, key=lambda axis: not axis.reduces))
    return [Body(np.concatenate(part), ordered) for group in groups for part in _short(group)]


def _short(lines: list[Uops]) -> Iterator[list[Uops]]:
    """The lines in groups that fit the micro-op buffer together with others."""
    group: list[Uops] = []
    length = 0
    for line in lines:
        if group and length + len(line) > SEQUENCE_LIMIT:
            yield group
            group, length = [], 0
        group.append(line)
        length += len(line)
    yield group


def _spread(line: Uops, axis: Axis, innermost: bool) -> Uops:
    steps = axis.offsets()
    spread = line[:, None] + steps[None] if innermost else steps[:, None] + line[None]
    return spread.reshape(-1, 3)


def expand(bodies: list[Body]) -> Uops:
    """All micro-operations in the order they execute, int64[n, 3]."""
    return np.concatenate([_executed(body) for body in bodies])


def _executed(body: Body) -> Uops:
    steps: Uops = np.zeros((1, 3), np.int64)
    for count, *advance in body.loops:
        steps = (steps[:, None] + (np.arange(count)[:, None] * np.array(advance))[None]).reshape(-1, 3)
    return (steps[:, None] + body.uops[None]).reshape(-1, 3)


def keeps_apart(body: Body) -> bool:
    """Whether no accumulator recurs within two preceding micro-operations."""
    dst = _executed(body)[:, 0]
    return not any(np.any(dst[gap:] == dst[:-gap]) for gap in range(1, min(MIN_DISTANCE, len(dst))))


def flat_bodies(micro_operations: Uops) -> list[Body]:
    """Few micro-operations in an order that keeps accumulators apart, a new instruction where there is none."""
    queues: dict[int, deque[Uops]] = {}
    for row in micro_operations:
        queues.setdefault(int(row[0]), deque()).append(row)
    bodies: list[Body] = []
    sequence: list[Uops] = []
    recent: list[int] = []
    left = len(micro_operations)
    while left:
        free = [dst for dst, queue in queues.items() if queue and dst not in recent]
        if not free or len(sequence) == SEQUENCE_LIMIT:
            bodies.append(Body(np.stack(sequence), ()))
            sequence, recent = [], []
            continue
        best = max(free, key=lambda dst: len(queues[dst]))
        sequence.append(queues[best].popleft())
        recent = [*recent, best][1 - MIN_DISTANCE :]
        left -= 1
    bodies.append(Body(np.stack(sequence), ()))
    return bodies
