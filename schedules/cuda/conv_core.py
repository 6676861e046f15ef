"""The tensor-core kernel that integer convolution and dense layers share: an implicit matrix product with a pipeline
through shared memory, as one thread block runs it. Its launches are in `conv_launches`.

Layout of a stage in shared memory: k-steps x pixels x 32 bytes, then output blocks x k-steps x fragments. The two
16-byte halves of a pixel change places every four pixels, so that the eight addresses of one ldmatrix phase touch all
32 banks once, as do copies in order; fragments are read in the order of the lanes.

Never run on a GPU so far: results are checked in emulation, instructions and spills in machine code; tiles are chosen
by reasoning, not by measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        self.warp_m, self.warp_n = unravel(T.truncdiv(self.thread, WARP), tile.warps_m, tile.warps_n)
        self.stages = tile.stages if self.isa.has_cp_async else 2
        memory = shared(self.stages * g.stage_bytes)
        products: type[DotProducts] | type[WarpProducts] = DotProducts if g.uses_dots else WarpProducts
        self.products = products(g, self.isa, memory, self.lane, self.warp_m, self.warp_n)
        self.copies = StageCopies(
            g, self.data, self.weight, self.padding, memory, self.row_tile, self.column_tile, self.split, self.thread
        )
        self.copies.locate_rows()
        if self.isa.has_cp_async:
            self._pipeline()
        else:
            self._double_buffer()
        self._finish()

    # --- pipelines

    def _pipeline(self) -> None:
        """Copies run `stages - 1` iterations ahead."""
        g = self.g
        ahead = self.stages - 1
        for stage in range(ahead):
            if stage < g.iterations:
                self.copies.start(stage, stage)
            call(intrinsics.COMMIT)
        with rolled(g.iterations) as i:
            call(intrinsics.copy_wait(ahead - 1))
            barrier()

            def start(i: Any = i) -> None:
                if g.iterations > ahead:
                    with when(i < g.iterations - ahead):
                        self.copies.start(i + ahead, T.truncmod(i + ahead, self.stages))
                call(intrinsics.COMMIT)

            self.products.multiply(T.truncmod(i, self.stages) * g.stage_bytes, start)

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
                self.copies.put(T.truncmod(i + 1, 2))
            barrier()

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
                        sums = [self.products.acc[base + j * 4 + e * 2 + c] for j in range(4) for c in range(2)]
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
