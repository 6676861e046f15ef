"""The products of a tensor-core layer: fragments from shared memory, and the matrix instructions of one warp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.conv_copies import swap
from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry
from lpsn_tvm.schedules.cuda.isa import WARP, CudaIsa
from lpsn_tvm.schedules.cuda.tir import call, pointer, registers, store


@dataclass
class WarpProducts:
    """Emits the products of one warp; the sums are in `acc`: [m_tiles, n_blocks, 4 tiles of 8 columns, 4]."""

    g: ConvGeometry
    isa: CudaIsa
    memory: Any
    lane: Any
    warp_m: Any
    warp_n: Any

    def __post_init__(self) -> None:
        tile = self.g.tile
        self.acc = registers(tile.m_tiles * tile.n_blocks * 16)
        self.a, self.b = registers(tile.m_tiles * 4), registers(tile.n_blocks * 8)
        if self.g.weight_bits == 4:
            self.packed = registers(4)
        for i in range(tile.m_tiles * tile.n_blocks * 16):
            store(self.acc, i, 0)

    def multiply(self, base: Any, start_copies: Callable[[], None]) -> None:
        """All products of one stage; copies start while the first fragments are on their way."""
        g, tile = self.g, self.g.tile
        mma = intrinsics.mma(g.in_dtype, self.isa.has_mma_s8_k32)
        lane_row = T.truncmod(self.lane, 16)
        half = T.truncdiv(self.lane, 16) ^ swap(lane_row)
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
