"""The tensor-core kernel that integer convolution and dense layers share: an implicit matrix product with a pipeline
through shared memory, as one thread block runs it. Its launches are in `conv_launches`.

Layout of a stage in shared memory: k-steps x pixels x 32 bytes, then output blocks x k-steps x fragments. The two
16-byte halves of a pixel change places every four pixels, so that the eight addresses of one ldmatrix phase touch all
32 banks once, as do copies in order; fragments are read in the order of the lanes.

Never run on a GPU so far: results are checked in emulation, instructions and spills in machine code; tiles are chosen
by reasoning, not by measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.epilogue import CHANNELS, Epilogue
from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry
from lpsn_tvm.schedules.cuda.isa import BLOCK, WARP, CudaIsa
from lpsn_tvm.schedules.cuda.tir import (
    barrier,
    call,
    pointer,
    registers,
    rolled,
    shared,
    store,
    unravel,
    when,
)


@dataclass
class _Copy:
    """One copy of a thread into a stage."""

    size: int
    to: Any
    source: Any
    is_inside: Any
    guard: Any


@dataclass
class BlockProgram:
    """Emits what one thread block does."""

    g: ConvGeometry
    isa: CudaIsa
    data: Any
    weight: Any
    padding: Any
    epilogue: Epilogue
    workspace: Any
    block: Any
    split: Any
    thread: Any

    def emit(self) -> None:
        """Everything that one thread block does."""
        g, tile = self.g, self.g.tile
        self.row_tile, self.column_tile = unravel(self.block, g.row_tiles, g.column_tiles)
        self.lane = T.truncmod(self.thread, WARP)
        self.warp_m, self.warp_n = unravel(T.truncdiv(self.thread, WARP), tile.warps_m, tile.warps_n)
        self.stages = tile.stages if self.isa.has_cp_async else 2
        self.memory = shared(self.stages * g.stage_bytes)
        self.acc = registers(tile.m_tiles * tile.n_blocks * 16)
        self.a, self.b = registers(tile.m_tiles * 4), registers(tile.n_blocks * 8)
        if g.weight_bits == 4:
            self.packed = registers(4)
        for i in range(tile.m_tiles * tile.n_blocks * 16):
            store(self.acc, i, 0)
        self._locate_rows()
        if self.isa.has_cp_async:
            self._pipeline()
        else:
            self._double_buffer()
        self._finish()

    # --- where the data comes from

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

    def _locate_rows(self) -> None:
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

    def _data_copies(self, iteration: Any) -> Iterator[_Copy]:
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
                to = within * (tile.rows * KSTEP) + row * KSTEP + (half ^ _swap(row)) * 16
                if g.chunk < 16:
                    to = to + T.truncmod(self.unit * g.chunk, 16)
                yield _Copy(
                    g.chunk, to, pointer(self.data, self.origins[i] + offset), self._inside(i, r, dy, dx), guard
                )

    def _inside(self, i: int, r: Any, dy: Any, dx: Any) -> Any:
        """Whether a tap of pixel i lies in the image."""
        g = self.g
        if not g.is_padded:
            return T.bool(True)
        y, x = self.ys[i] + dy, self.xs[i] + dx
        inside = T.And(T.And(y >= 0, y < g.in_size[0]), T.And(x >= 0, x < g.in_size[1]))
        return T.And(inside, r < g.kernel[0]) if g.in_block < KSTEP else inside

    def _weight_copies(self, iteration: Any) -> Iterator[_Copy]:
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
            yield _Copy(16, g.data_bytes + index * 16, pointer(self.weight, source), T.bool(True), guard)

    def _copies(self, iteration: Any) -> list[_Copy]:
        """Weights first: they are 16 bytes each, so that what is held in registers stays aligned."""
        return [*self._weight_copies(iteration), *self._data_copies(iteration)]

    # --- pipelines

    def _pipeline(self) -> None:
        """Copies run `stages - 1` iterations ahead."""
        g = self.g
        ahead = self.stages - 1
        for stage in range(ahead):
            if stage < g.iterations:
                self._start(stage, stage)
            call(intrinsics.COMMIT)
        with rolled(g.iterations) as i:
            call(intrinsics.copy_wait(ahead - 1))
            barrier()

            def start(i: Any = i) -> None:
                if g.iterations > ahead:
                    with when(i < g.iterations - ahead):
                        self._start(i + ahead, T.truncmod(i + ahead, self.stages))
                call(intrinsics.COMMIT)

            self._multiply(T.truncmod(i, self.stages) * g.stage_bytes, start)

    def _start(self, iteration: Any, stage: Any) -> None:
        for copy in self._copies(iteration):
            with when(copy.guard):
                to = pointer(self.memory, stage * self.g.stage_bytes + copy.to)
                call(intrinsics.copy_async(copy.size), to, copy.source, pointer(self.padding), copy.is_inside)

    def _double_buffer(self) -> None:
        """Without asynchronous copies: the next stage waits in registers while this one is multiplied."""
        g = self.g
        self.held = registers(sum(copy.size // 4 for copy in self._copies(0)))
        self._fetch(0)
        self._put(0)
        barrier()
        with rolled(g.iterations) as i:

            def fetch(i: Any = i) -> None:
                with when(i + 1 < g.iterations):
                    self._fetch(i + 1)

            self._multiply(T.truncmod(i, 2) * g.stage_bytes, fetch)
            with when(i + 1 < g.iterations):
                self._put(T.truncmod(i + 1, 2))
            barrier()

    def _fetch(self, iteration: Any) -> None:
        at = 0
        for copy in self._copies(iteration):
            with when(copy.guard):
                source, pad = copy.source, pointer(self.padding)
                call(intrinsics.load(copy.size), pointer(self.held, at), source, pad, copy.is_inside)
            at += copy.size // 4

    def _put(self, stage: Any) -> None:
        at = 0
        for copy in self._copies(0):
            with when(copy.guard):
                to = pointer(self.memory, stage * self.g.stage_bytes + copy.to)
                call(intrinsics.copy(copy.size), to, pointer(self.held, at))
            at += copy.size // 4

    # --- products

    def _multiply(self, base: Any, start_copies: Callable[[], None]) -> None:
        """All products of one stage; copies start while the first fragments are on their way."""
        g, tile = self.g, self.g.tile
        mma = intrinsics.mma(g.in_dtype, self.isa.has_mma_s8_k32)
        lane_row = T.truncmod(self.lane, 16)
        half = T.truncdiv(self.lane, 16) ^ _swap(lane_row)
        for k in range(tile.ksteps):
            rows = base + k * (tile.rows * KSTEP) + (self.warp_m * (tile.m_tiles * 16) + lane_row) * KSTEP + half * 16
            for m in range(tile.m_tiles):
                source = pointer(self.memory, rows + m * (16 * KSTEP))
                call(intrinsics.LDMATRIX, pointer(self.a, m * 4), source)
            for n in range(tile.n_blocks):
                block = (self.warp_n * tile.n_blocks + n) * tile.ksteps + k
                self._load_fragments(n, base + g.data_bytes + block * g.kstep_bytes + self.lane * 16)
            if k == 0:
                start_copies()
            for m in range(tile.m_tiles):
                for n in range(tile.n_blocks):
                    for j in range(4):
                        at = ((m * tile.n_blocks + n) * 4 + j) * 4
                        b = pointer(self.b, n * 8 + j * 2)
                        call(mma, pointer(self.acc, at), pointer(self.a, m * 4), b)

    def _load_fragments(self, n: int, at: Any) -> None:
        if self.g.weight_bits == 4:
            call(intrinsics.copy(16), pointer(self.packed), pointer(self.memory, at))
            call(intrinsics.UNPACK_NIBBLES, pointer(self.b, n * 8), pointer(self.packed))
            return
        for half in range(2):
            source = pointer(self.memory, at + half * (WARP * 16))
            call(intrinsics.copy(16), pointer(self.b, n * 8 + half * 4), source)

    # --- results

    def _finish(self) -> None:
        """A lane holds eight neighbouring channels of every block of 32, for two pixels of every 16."""
        g, tile = self.g, self.g.tile
        count = tile.m_tiles * 2
        channel = T.truncmod(self.lane, 4) * CHANNELS
        first = self.row_tile * tile.rows + self.warp_m * (tile.m_tiles * 16) + T.truncdiv(self.lane, 4)
        places = self._places([first + i * 8 for i in range(count)])
        for n in range(tile.n_blocks):
            block = self.column_tile * (tile.columns // BLOCK) + self.warp_n * tile.n_blocks + n
            with when(True if g.packed_blocks == g.out_blocks else block < g.out_blocks):
                if self.workspace is None:
                    self.epilogue.load(block * BLOCK + channel)
                for i in range(count):
                    at, is_inside = places(i, block)
                    with when(is_inside):
                        m, e = divmod(i, 2)
                        base = (m * tile.n_blocks + n) * 16
                        sums = [self.acc[base + j * 4 + e * 2 + c] for j in range(4) for c in range(2)]
                        self._write(sums, at * BLOCK + channel)

    def _places(self, rows: list[Any]) -> Callable[[int, Any], tuple[Any, Any]]:
        """(row, output block) -> (pixel of the output, whether it exists)."""
        g = self.g
        if g.interleave is not None:
            return self._interleaved_places(rows)
        pixels = g.out_size[0] * g.out_size[1]
        starts = registers(len(rows))
        for i, row in enumerate(rows):
            n, pixel = unravel(row, g.batch, pixels)
            store(starts, i, n * (g.out_blocks * pixels) + pixel)

        def place(i: int, block: Any) -> tuple[Any, Any]:
            return starts[i] + block * pixels, True if g.pixels % g.tile.rows == 0 else rows[i] < g.pixels

        return place

    def _interleaved_places(self, rows: list[Any]) -> Callable[[int, Any], tuple[Any, Any]]:
        g, interleave = self.g, self.g.interleave
        assert interleave is not None
        (sy, sx), (height, width) = interleave.strides, interleave.size
        blocks = g.out_blocks // interleave.phases

        def place(i: int, block: Any) -> tuple[Any, Any]:
            n, y, x = unravel(rows[i], g.batch, *g.out_size)
            phase_y, phase_x, channel_block = unravel(block, sy, sx, blocks)
            y, x = y * sy + phase_y - interleave.crop[0], x * sx + phase_x - interleave.crop[1]
            inside = T.And(T.And(y >= 0, y < height), T.And(x >= 0, x < width))
            at = ((n * blocks + channel_block) * height + y) * width + x
            return at, T.And(inside, rows[i] < g.pixels)

        return place

    def _write(self, sums: list[Any], at: Any) -> None:
        if self.workspace is None:
            self.epilogue.finish(sums, at)
            return
        part = registers(CHANNELS)
        for i, value in enumerate(sums):
            store(part, i, value)
        size = self.g.batch * self.g.out_blocks * self.g.out_size[0] * self.g.out_size[1] * BLOCK
        for i in range(0, CHANNELS, 4):
            call(intrinsics.copy(16), pointer(self.workspace, self.split * size + at + i), pointer(part, i))


def _swap(row: Any) -> Any:
    """1 where a pixel's halves change places."""
    return T.bitwise_and(T.shift_right(row, 2), 1)
