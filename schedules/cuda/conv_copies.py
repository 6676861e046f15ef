"""Where pixels and weights of a tensor-core layer come from: the copies of one thread into a stage of shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry
from lpsn_tvm.schedules.cuda.isa import BLOCK
from lpsn_tvm.schedules.cuda.tir import call, pointer, registers, store, unravel, when


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
    """Emits the copies of one thread."""

    g: ConvGeometry
    data: Any
    weight: Any
    padding: Any
    memory: Any
    row_tile: Any
    column_tile: Any
    split: Any
    thread: Any

    @property
    def _units(self) -> int:
        """Copies that make one pixel of one k-step."""
        return KSTEP // self.g.chunk

    @property
    def _row_step(self) -> int:
        """Pixels that all threads fetch at once."""
        return min(self.g.tile.rows, self.g.tile.threads // self._units)

    @property
    def _kstep_step(self) -> int:
        """k-steps that all threads fetch at once."""
        return self.g.tile.threads // (self._units * self._row_step)

    def locate_rows(self) -> None:
        """Origin of the window of every pixel that this thread fetches: offset, y, x."""
        g = self.g
        unit, rows = T.truncmod(self.thread, self._units), T.truncdiv(self.thread, self._units)
        self.unit, self.first_row = unit, T.truncmod(rows, self._row_step)
        self.kstep_lane = T.truncdiv(rows, self._row_step) if self._kstep_step > 1 else 0
        count = g.tile.rows // self._row_step
        self.origins = registers(count)
        self.ys: Any = registers(count) if g.is_padded else None
        self.xs: Any = registers(count) if g.is_padded else None
        start = 0
        if g.group is not None:
            out_per, in_per = g.group
            group_start = T.truncdiv(T.truncdiv(self.column_tile * g.tile.columns, out_per) * in_per, BLOCK)
            start = T.min(group_start, g.in_blocks - g.reduce_blocks)
        for i in range(count):
            pixel = self.row_tile * g.tile.rows + self.first_row + i * self._row_step
            if g.pixels % g.tile.rows:
                # What hangs over reads the last pixel and is not written.
                pixel = T.min(pixel, g.pixels - 1)
            n, y, x = unravel(pixel, g.batch, *g.out_size)
            top, left = y * g.strides[0] - g.pads[0], x * g.strides[1] - g.pads[1]
            origin = (((n * g.in_blocks + start) * g.in_size[0] + top) * g.in_size[1] + left) * g.in_block
            store(self.origins, i, origin + (unit * g.chunk if g.in_block == KSTEP else 0))
            if g.is_padded:
                store(self.ys, i, top)
                store(self.xs, i, left)

    def _tap(self, kstep: Any) -> tuple[Any, Any, Any]:
        """(channel block, filter row, filter column) of this thread's chunk of a k-step."""
        g = self.g
        if g.in_block < KSTEP:
            r, s = T.truncdiv(kstep * self._units + self.unit, g.kernel[1]), 0
            if g.kernel[1] > 1:
                s = T.truncmod(kstep * self._units + self.unit, g.kernel[1])
            return 0, r, s
        if g.taps == 1:
            c = kstep
        else:
            c, kstep = T.truncdiv(kstep, g.taps), T.truncmod(kstep, g.taps)
        if g.packed_ksteps > g.ksteps:
            # Weights are zero there.
            c = T.min(c, g.reduce_blocks - 1)
        r, s = unravel(kstep, *g.kernel) if g.taps > 1 else (0, 0)
        return c, r, s

    def _data_copies(self, iteration: Any) -> Iterator[Copy]:
        g, tile = self.g, self.g.tile
        height, width = g.in_size
        for k in range(0, tile.ksteps, self._kstep_step):
            within = self.kstep_lane + k
            guard = True if tile.ksteps % self._kstep_step == 0 else within < tile.ksteps
            c, r, s = self._tap((self.split * g.iterations + iteration) * tile.ksteps + within)
            dy, dx = r * g.dilation[0], s * g.dilation[1]
            offset = c * (height * width * g.in_block) + (dy * width + dx) * g.in_block
            for i in range(tile.rows // self._row_step):
                row = self.first_row + i * self._row_step
                half = T.truncdiv(self.unit * g.chunk, 16)
                to = within * (tile.rows * KSTEP) + row * KSTEP + (half ^ swap(row)) * 16
                if g.chunk < 16:
                    to = to + T.truncmod(self.unit * g.chunk, 16)
                yield Copy(g.chunk, to, pointer(self.data, self.origins[i] + offset), self._inside(i, r, dy, dx), guard)

    def _inside(self, i: int, r: Any, dy: Any, dx: Any) -> Any:
        """Whether a tap of pixel i lies in the image."""
        g = self.g
        if not g.is_padded:
            return T.bool(True)
        y, x = self.ys[i] + dy, self.xs[i] + dx
        inside = T.And(T.And(y >= 0, y < g.in_size[0]), T.And(x >= 0, x < g.in_size[1]))
        return T.And(inside, r < g.kernel[0]) if g.in_block < KSTEP else inside

    def _weight_copies(self, iteration: Any) -> Iterator[Copy]:
        g, tile = self.g, self.g.tile
        per_block = tile.ksteps * g.kstep_bytes // 16
        blocks = tile.columns // BLOCK
        total = blocks * per_block
        first = self.split * (g.iterations * tile.ksteps) + iteration * tile.ksteps
        for i in range(-(-total // tile.threads)):
            index = self.thread + i * tile.threads
            block, within = unravel(index, blocks, per_block)
            guard = True if total % tile.threads == 0 or i < total // tile.threads else index < total
            source = ((self.column_tile * blocks + block) * g.packed_ksteps + first) * g.kstep_bytes + within * 16
            yield Copy(16, g.data_bytes + index * 16, pointer(self.weight, source), T.bool(True), guard)

    def copies(self, iteration: Any) -> list[Copy]:
        """Weights first: they are 16 bytes each, so that what is held in registers stays aligned."""
        return [*self._weight_copies(iteration), *self._data_copies(iteration)]

    # --- the same copies, in one step or in two

    def start(self, iteration: Any, stage: Any) -> None:
        """Asynchronous copies from global to shared memory."""
        for copy in self.copies(iteration):
            with when(copy.guard):
                to = pointer(self.memory, stage * self.g.stage_bytes + copy.to)
                call(intrinsics.copy_async(copy.size), to, copy.source, pointer(self.padding), copy.is_inside)

    def hold(self) -> None:
        """Registers for one stage."""
        self.held = registers(sum(copy.size // 4 for copy in self.copies(0)))

    def fetch(self, iteration: Any) -> None:
        """Load a stage into registers."""
        at = 0
        for copy in self.copies(iteration):
            with when(copy.guard):
                source, pad = copy.source, pointer(self.padding)
                call(intrinsics.load(copy.size), pointer(self.held, at), source, pad, copy.is_inside)
            at += copy.size // 4

    def put(self, stage: Any) -> None:
        """Write what is held to shared memory."""
        at = 0
        for copy in self.copies(0):
            with when(copy.guard):
                to = pointer(self.memory, stage * self.g.stage_bytes + copy.to)
                call(intrinsics.copy(copy.size), to, pointer(self.held, at))
            at += copy.size // 4


def swap(row: Any) -> Any:
    """1 where a pixel's halves change places."""
    return T.bitwise_and(T.shift_right(row, 2), 1)
