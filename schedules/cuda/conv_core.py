"""The tensor-core kernel that integer convolution and dense layers share: an implicit matrix product with a pipeline
through shared memory, as one thread block runs it. Its launches are in `conv_launches`.

Layout of a stage in shared memory: k-steps x pixels x 32 bytes, then output blocks x k-steps x fragments; the table of
an epilogue lies behind all stages and arrives with the first one, long before it is read. The two
16-byte halves of a pixel change places every four pixels, so that the eight addresses of one ldmatrix phase touch all
32 banks once, as do copies in order; fragments are read in the order of the lanes.

Never run on a GPU so far: results are checked in emulation, instructions and spills in machine code; tiles are chosen
by reasoning, not by measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.conv2d_dp4a import DotProducts
from lpsn_tvm.schedules.cuda.conv_copies import StageCopies
from lpsn_tvm.schedules.cuda.conv_products import WarpProducts
from lpsn_tvm.schedules.cuda.epilogue import CHANNELS, Epilogue
from lpsn_tvm.schedules.cuda.geometry import ConvGeometry
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
        warps = (tile.slices, tile.warps_m, tile.warps_n)
        self.warp_k, self.warp_m, self.warp_n = unravel(T.truncdiv(self.thread, WARP), *warps)
        if not self.isa.has_cp_async:
            tile = replace(tile, stages=2)
            self.g = g = replace(g, tile=tile)
        memory = shared(g.memory_bytes)
        products = DotProducts if g.uses_dots else WarpProducts
        self.products = products(g, self.isa, memory, self.lane, self.warp_k, self.warp_m, self.warp_n)
        self.copies = StageCopies(
            g, self.data, self.weight, self.padding, memory, self.row_tile, self.column_tile, self.split, self.thread
        )
        self.copies.locate()
        if g.stages_table:
            self.epilogue = self.epilogue.with_shared_table(
                memory, self.g.table_at, self.thread, is_asynchronous=self.isa.has_cp_async
            )
        self._begin()
        if self.isa.has_cp_async:
            self._pipeline()
        else:
            self._double_buffer()
        self._finish()

    @property
    def _begins_with_bias(self) -> bool:
        """Whether sums begin with the bias instead of zero: they are whole, and in the output's units."""
        is_whole = self.workspace is None and self.g.tile.slices == 1
        return is_whole and not (self.epilogue.is_scaled or self.epilogue.is_shifted)

    def _begin(self) -> None:
        if not self._begins_with_bias:
            return
        tile, bias = self.g.tile, registers(CHANNELS)
        for n in range(tile.n_blocks):
            for i in range(0, CHANNELS, 4):
                source = pointer(self.epilogue.bias, self._channel(self._block(n)) + i)
                call(intrinsics.copy(16), pointer(bias, i), source)
            for m in range(tile.m_tiles):
                for i in range(16):
                    # Four tiles of two channels, each of two pixels.
                    value = bias[i // 4 * 2 + i % 2]
                    store(self.products.acc, (m * tile.n_blocks + n) * 16 + i, value)

    # --- pipelines

    def _pipeline(self) -> None:
        """Copies run `stages - 1` iterations ahead, fragments one step."""
        g, products = self.g, self.products
        stages = g.tile.stages
        ahead = stages - 1
        for stage in range(ahead):
            if stage < g.iterations:
                self.copies.start(stage, stage * g.stage_bytes)
            call(intrinsics.COMMIT)
        places = registers(2)
        reading, writing = 0, 1
        store(places, reading, 0)
        store(places, writing, ahead * g.stage_bytes)

        def arrive() -> None:
            call(intrinsics.copy_wait(ahead - 1))
            barrier()

        def turn(place: int) -> None:
            last = places[place] == ahead * g.stage_bytes
            store(places, place, T.Select(last, 0, places[place] + g.stage_bytes))

        def start(iteration: Any) -> None:
            if g.iterations > ahead:
                with when(iteration < g.iterations - ahead):
                    self.copies.start(iteration + ahead, places[writing])
                turn(writing)
            call(intrinsics.COMMIT)

        if products.steps % 2:
            # Fragments of the next stage would land where this one's last ones are.
            with rolled(g.iterations) as i:
                arrive()
                products.multiply(places[reading], partial(start, i))
                turn(reading)
            return
        arrive()
        products.load(0, 0)
        with rolled(g.iterations) as i:
            for step in range(products.steps - 1):
                products.load(places[reading], step + 1)
                if step == 0:
                    start(i)
                products.compute(step)
            turn(reading)
            # What is loaded after the last stage is not used.
            arrive()
            products.load(places[reading], 0)
            products.compute(products.steps - 1)

    def _double_buffer(self) -> None:
        """Without asynchronous copies: the next stage waits in registers while this one is multiplied."""
        g = self.g
        self.copies.hold()
        self.copies.fetch(0)
        self.copies.put(0)
        barrier()
        with rolled(g.iterations) as i:

            def fetch(i: Any = i) -> None:
                with when(i + 1 < g.iterations):
                    self.copies.fetch(i + 1)

            self.products.multiply(T.truncmod(i, 2) * g.stage_bytes, fetch)
            with when(i + 1 < g.iterations):
                self.copies.put(T.truncmod(i + 1, 2) * g.stage_bytes)
            barrier()

    # --- results

    def _finish(self) -> None:
        """A lane holds eight neighbouring channels of every block of 32, for two pixels of every 16."""
        if self.g.tile.slices > 1:
            self._finish_slices()
            return
        g, tile = self.g, self.g.tile
        count = tile.m_tiles * 2
        places = self._places([self._row(i) for i in range(count)])
        for n in range(tile.n_blocks):
            block = self._block(n)
            with when(True if g.packed_blocks == g.out_blocks else block < g.out_blocks):
                if self.workspace is None:
                    self.epilogue.load(self._channel(block), count)
                    for i in range(count if g.has_residual else 0):
                        at, is_inside = places(i, block)
                        with when(is_inside):
                            self.epilogue.fetch(self._channel(at), i)
                for i in range(count):
                    at, is_inside = places(i, block)
                    with when(is_inside):
                        self._write(self._sums(i, n), self._channel(at), i)

    def _row(self, i: Any) -> Any:
        """Row of the product that holds this lane's pixel `i`."""
        tile = self.g.tile
        return self.row_tile * tile.rows + self.warp_m * (tile.m_tiles * 16) + T.truncdiv(self.lane, 4) + i * 8

    def _block(self, n: Any) -> Any:
        """Output block of this warp's block `n`."""
        tile = self.g.tile
        return self.column_tile * (tile.columns // BLOCK) + self.warp_n * tile.n_blocks + n

    def _channel(self, block: Any) -> Any:
        return block * BLOCK + T.truncmod(self.lane, 4) * CHANNELS

    def _sums(self, i: int, n: int) -> list[Any]:
        m, e = divmod(i, 2)
        base = (m * self.g.tile.n_blocks + n) * 16
        return [self.products.acc[base + j * 4 + e * 2 + c] for j in range(4) for c in range(2)]

    def _finish_slices(self) -> None:
        """The sums of all slices meet in shared memory, where the stages were; every slice finishes some of them."""
        g, tile = self.g, self.g.tile
        count, group = tile.m_tiles * 2, tile.warps_m * tile.warps_n
        items = count * tile.n_blocks
        item_bytes = 2 * WARP * 16
        warp = self.warp_m * tile.warps_n + self.warp_n
        barrier()
        for item in range(items):
            n, i = divmod(item, count)
            place = ((self.warp_k * group + warp) * items + item) * item_bytes + self.lane * 16
            self._put(self._sums(i, n), self.products.memory, place, WARP * 16)
        barrier()
        share = -(-items // tile.slices)
        for k in range(share):
            item = self.warp_k * share + k
            block = self._block(T.truncdiv(item, count))
            is_there = [True if items % tile.slices == 0 else item < items]
            is_there.append(True if g.packed_blocks == g.out_blocks else block < g.out_blocks)
            with when(is_there[0]), when(is_there[1]):
                at, is_inside = self._places([self._row(T.truncmod(item, count))])(0, block)
                first, step = (warp * items + item) * item_bytes, group * items * item_bytes
                sums = self._added(first, step)
                if self.workspace is None:
                    self.epilogue.load(self._channel(block))
                with when(is_inside):
                    self._write(sums, self._channel(at))

    def _added(self, first: Any, step: int) -> list[Any]:
        """Sums over the slices of what lies at `first` and every `step` bytes."""
        sums, part = registers(CHANNELS), registers(CHANNELS)
        for s in range(self.g.tile.slices):
            for half in range(2):
                source = pointer(self.products.memory, first + s * step + self.lane * 16 + half * (WARP * 16))
                call(intrinsics.copy(16), pointer(part if s else sums, half * 4), source)
            for i in range(CHANNELS if s else 0):
                store(sums, i, sums[i] + part[i])
        return [sums[i] for i in range(CHANNELS)]

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

    def _write(self, sums: list[Any], at: Any, fetched: int | None = None) -> None:
        if self.workspace is None:
            self.epilogue.finish(sums, at, has_bias=self._begins_with_bias, fetched=fetched)
            return
        size = self.g.batch * self.g.out_blocks * self.g.out_size[0] * self.g.out_size[1] * BLOCK
        self._put(sums, self.workspace, self.split * size + at, 4)

    def _put(self, sums: list[Any], to: Any, at: Any, step: int) -> None:
        """Two pieces of four sums, `step` elements apart."""
        part = registers(CHANNELS)
        for i, value in enumerate(sums):
            store(part, i, value)
        for half in range(2):
            call(intrinsics.copy(16), pointer(to, at + half * step), pointer(part, half * 4))
