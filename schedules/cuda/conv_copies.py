"""Where pixels and weights of a tensor-core layer come from: the copies of one thread into a stage of shared memory.

Every copy costs a handful of instructions, so nothing is computed twice: a thread knows the origins of its pixels and,
as one bit per filter tap, which taps lie in the image; the position in the filter is carried from k-step to k-step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry
from lpsn_tvm.schedules.cuda.isa import BLOCK
from lpsn_tvm.schedules.cuda.tir import call, pointer, registers, store, unravel, when

MASK_BITS = 31
"""Taps that the mask of a pixel has room for; filters with more compare coordinates."""
OFFSET, TAP, COLUMN = range(3)
"""What the position in the filter consists of: offset in the input, tap, and its column of k-steps."""


@dataclass
class Copy:
    """One copy of a thread into a stage."""

    size: int
    to: Any
    source: Any
    is_inside: Any
    guard: Any


@dataclass
class StageCopies:
    """Emits the copies of one thread; stages must be copied in order."""

    g: ConvGeometry
    data: Any
    weight: Any
    padding: Any
    memory: Any
    row_tile: Any
    column_tile: Any
    split: Any
    thread: Any

    def __post_init__(self) -> None:
        g, tile = self.g, self.g.tile
        self.units = KSTEP // g.chunk
        # Pixels and k-steps that all threads fetch at once; threads beyond have nothing to do.
        self.row_step = min(tile.rows, tile.threads // self.units)
        most = tile.threads // (self.units * self.row_step)
        self.kstep_step = next(step for step in range(most, 0, -1) if tile.ksteps % step == 0)
        self.fetching = self.units * self.row_step * self.kstep_step
        self.unit, rows = T.truncmod(self.thread, self.units), T.truncdiv(self.thread, self.units)
        self.first_row = T.truncmod(rows, self.row_step)
        self.kstep_lane = T.truncdiv(rows, self.row_step) if self.kstep_step > 1 else 0
        self.walk = g.walk
        self.has_masks = g.is_padded and self.walk.taps <= MASK_BITS

    # --- pixels

    def locate(self) -> None:
        """Where this thread begins: its pixels, its place in the filter and in the weights."""
        self._locate_pixels()
        _, filter_rows, filter_columns = self.walk.extents
        first = self.split * (self.g.iterations * self.g.tile.ksteps) + self.kstep_lane
        c, r, s = unravel(first, *self.walk.extents)
        self.position = registers(3)
        store(self.position, OFFSET, sum(i * step for i, step in zip((c, r, s), self.walk.steps, strict=True)))
        if self.walk.taps > 1:
            store(self.position, TAP, r * filter_columns + s)
        if filter_columns > 1 and filter_rows > 1:
            store(self.position, COLUMN, s)
        self._locate_weights()

    def _locate_pixels(self) -> None:
        """Origin of the window of every pixel that this thread fetches, and which taps lie in the image."""
        g = self.g
        count = g.tile.rows // self.row_step
        self.origins = registers(count)
        self.masks: Any = registers(count) if self.has_masks else None
        self.corners: Any = registers(2 * count) if g.is_padded and not self.has_masks else None
        start = 0
        if g.group is not None:
            out_per, in_per = g.group
            group_start = T.truncdiv(T.truncdiv(self.column_tile * g.tile.columns, out_per) * in_per, BLOCK)
            start = T.min(group_start, g.in_blocks - g.reduce_blocks)
        down, right = self.walk.unit(self.unit)
        for i in range(count):
            pixel = self.row_tile * g.tile.rows + self.first_row + i * self.row_step
            if g.pixels % g.tile.rows:
                # What hangs over reads the last pixel and is not written.
                pixel = T.min(pixel, g.pixels - 1)
            n, y, x = unravel(pixel, g.batch, *g.out_size)
            top = y * g.strides[0] - g.pads[0] + down * g.dilation[0]
            left = x * g.strides[1] - g.pads[1] + right * g.dilation[1]
            origin = (((n * g.in_blocks + start) * g.in_size[0] + top) * g.in_size[1] + left) * g.in_block
            store(self.origins, i, origin + (self.unit * g.chunk if g.in_block == KSTEP else 0))
            if self.masks is not None:
                store(self.masks, i, self._mask(top, left))
            elif self.corners is not None:
                store(self.corners, 2 * i, top)
                store(self.corners, 2 * i + 1, left)

    def _mask(self, top: Any, left: Any) -> Any:
        """Bit t says that tap t of a window lies in the image."""
        g, (_, rows, columns) = self.g, self.walk.extents
        dy, dx = self.walk.pixel_steps
        row_mask, all_rows = 0, 0
        for s in range(columns):
            row_mask += T.Select(_within(left + s * dx, g.in_size[1]), 1 << s, 0)
        for r in range(rows):
            all_rows += T.Select(_within(top + r * dy, g.in_size[0]), 1 << r * columns, 0)
        # Each row's bits are apart from the next row's: the product is the set of pairs.
        return row_mask * all_rows

    def _is_inside(self, i: int, kstep: Any) -> Any:
        """Whether this thread's chunk of a k-step lies in the image (and in the filter)."""
        g, inside = self.g, T.bool(True)
        tap = self.position[TAP] if self.walk.taps > 1 else 0
        if self.masks is not None:
            inside = T.bitwise_and(T.shift_right(self.masks[i], tap), 1) != 0
        elif self.corners is not None:
            _, rows, columns = self.walk.extents
            r, s = unravel(tap, rows, columns)
            dy, dx = self.walk.pixel_steps
            y, x = self.corners[2 * i] + r * dy, self.corners[2 * i + 1] + s * dx
            inside = T.And(_within(y, g.in_size[0]), _within(x, g.in_size[1]))
        if g.packed_ksteps > g.ksteps and self.walk.extents[0] > 1:
            # Weights are zero beyond, but there are no pixels to read.
            is_real = kstep < g.ksteps
            return T.And(is_real, inside) if g.is_padded else is_real
        return inside

    def _advance(self) -> None:
        """To this thread's next k-step: an addition with carries from columns to rows to channel blocks."""
        _, rows, columns = self.walk.extents
        step_c, step_r, step_s = self.walk.steps
        taps = rows * columns
        by_c, by_tap = divmod(self.kstep_step, taps)
        by_r, by_s = divmod(by_tap, columns)
        offset = self.position[OFFSET] + (by_c * step_c + by_r * step_r + by_s * step_s)
        if by_tap == 0:
            store(self.position, OFFSET, offset)
            return
        tap = self.position[TAP] + by_tap
        if by_s and rows > 1:
            column = self.position[COLUMN] + by_s
            offset = offset + T.Select(column >= columns, step_r - columns * step_s, 0)
        end = rows * step_r if rows > 1 else columns * step_s
        store(self.position, OFFSET, offset + T.Select(tap >= taps, step_c - end, 0))
        if by_s and rows > 1:
            store(self.position, COLUMN, column - T.Select(column >= columns, columns, 0))
        store(self.position, TAP, tap - T.Select(tap >= taps, taps, 0))

    def _data_targets(self) -> Iterator[tuple[int, int, Any]]:
        """(k-step of the stage, row, place in the stage), in the order of the copies."""
        g, tile = self.g, self.g.tile
        half = T.truncdiv(self.unit * g.chunk, 16)
        within = T.truncmod(self.unit * g.chunk, 16) if g.chunk < 16 else 0
        for k in range(0, tile.ksteps, self.kstep_step):
            for i in range(tile.rows // self.row_step):
                row = self.first_row + i * self.row_step
                # Rows that are a multiple of eight apart swap alike.
                swapped = half ^ swap(self.first_row if self.row_step % 8 == 0 else row)
                yield k, i, (self.kstep_lane + k) * (tile.rows * KSTEP) + row * KSTEP + swapped * 16 + within

    # --- weights

    def _locate_weights(self) -> None:
        """Weights of a stage lie in one piece per block of output channels."""
        g, tile = self.g, self.g.tile
        per_block = tile.ksteps * g.kstep_bytes // 16
        blocks = tile.columns // BLOCK
        self.weight_total = blocks * per_block
        first_kstep = self.split * (g.iterations * tile.ksteps)

        def source(index: Any) -> Any:
            block, within = unravel(index, blocks, per_block)
            row = (self.column_tile * blocks + block) * g.packed_ksteps + first_kstep
            return row * g.kstep_bytes + within * 16

        count = -(-self.weight_total // tile.threads)
        self.weight_deltas = _deltas(count, tile.threads, per_block, g.packed_ksteps * g.kstep_bytes)
        self.weight_starts = registers(1 if self.weight_deltas else count)
        for i in range(1 if self.weight_deltas else count):
            store(self.weight_starts, i, source(self.thread + i * tile.threads))

    def _weight_copies(self) -> Iterator[Copy]:
        g, tile = self.g, self.g.tile
        total = self.weight_total
        for i in range(-(-total // tile.threads)):
            index = self.thread + i * tile.threads
            guard = True if (i + 1) * tile.threads <= total else index < total
            start = self.weight_starts[0] + self.weight_deltas[i] if self.weight_deltas else self.weight_starts[i]
            yield Copy(16, g.data_bytes + index * 16, pointer(self.weight, start), T.bool(True), guard)

    def _advance_weights(self) -> None:
        step = self.g.tile.ksteps * self.g.kstep_bytes
        for i in range(1 if self.weight_deltas else -(-self.weight_total // self.g.tile.threads)):
            store(self.weight_starts, i, self.weight_starts[i] + step)

    # --- the same copies, in one step or in two

    def _each(self, iteration: Any, act: Callable[[Copy], None]) -> None:
        """All copies of the next stage. Weights first: they are 16 bytes each, so that what is held in registers
        stays aligned.
        """
        for copy in self._weight_copies():
            with when(copy.guard):
                act(copy)
        self._advance_weights()
        tile = self.g.tile
        for k, i, to in self._data_targets():
            kstep = (self.split * self.g.iterations + iteration) * tile.ksteps + self.kstep_lane + k
            source = pointer(self.data, self.origins[i] + self.position[OFFSET])
            with when(self._is_fetching):
                act(Copy(self.g.chunk, to, source, self._is_inside(i, kstep), True))
            if i == tile.rows // self.row_step - 1:
                self._advance()

    @property
    def _is_fetching(self) -> Any:
        return True if self.fetching == self.g.tile.threads else self.thread < self.fetching

    def start(self, iteration: Any, stage: Any) -> None:
        """Asynchronous copies from global to shared memory; `stage` is an offset in bytes."""

        def act(copy: Copy) -> None:
            to = pointer(self.memory, stage + copy.to)
            call(intrinsics.copy_async(copy.size), to, copy.source, pointer(self.padding), copy.is_inside)

        self._each(iteration, act)

    def hold(self) -> None:
        """Registers for one stage."""
        tile = self.g.tile
        weights = -(-self.weight_total // tile.threads) * 4
        pixels = tile.rows // self.row_step * (tile.ksteps // self.kstep_step)
        self.held = registers(weights + pixels * self.g.chunk // 4)

    def fetch(self, iteration: Any) -> None:
        """Load a stage into registers."""
        at = 0

        def act(copy: Copy) -> None:
            nonlocal at
            held, pad = pointer(self.held, at), pointer(self.padding)
            call(intrinsics.load(copy.size), held, copy.source, pad, copy.is_inside)
            at += copy.size // 4

        self._each(iteration, act)

    def put(self, stage: Any) -> None:
        """Write what is held to shared memory; `stage` is an offset in bytes."""
        at = 0
        targets = [(copy.size, copy.to, copy.guard) for copy in self._weight_copies()]
        targets += [(self.g.chunk, to, self._is_fetching) for _, _, to in self._data_targets()]
        for size, to, guard in targets:
            with when(guard):
                call(intrinsics.copy(size), pointer(self.memory, stage + to), pointer(self.held, at))
            at += size // 4


def swap(row: Any) -> Any:
    """1 where a pixel's halves change places."""
    return T.bitwise_and(T.shift_right(row, 2), 1)


def _within(coordinate: Any, size: int) -> Any:
    return T.And(coordinate >= 0, coordinate < size)


def _deltas(count: int, threads: int, per_block: int, block_bytes: int) -> list[int]:
    """How far in memory a thread's copies of weights lie behind its first; empty where that depends on the thread."""
    if threads % per_block == 0:
        return [i * (threads // per_block) * block_bytes for i in range(count)]
    if per_block % threads == 0:
        blocks, rest = zip(*(divmod(i * threads, per_block) for i in range(count)), strict=True)
        return [block * block_bytes + within * 16 for block, within in zip(blocks, rest, strict=True)]
    return []
