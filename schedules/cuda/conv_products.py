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
        self.at_once = 2 if self.g.multiplies_nibbles else 1
        self.a, self.b = registers(tile.m_tiles * 4 * self.at_once), registers(tile.n_blocks * 8)
        if self.g.weight_bits == 4 and not self.g.multiplies_nibbles:
            self.packed = registers(4)
        for i in range(tile.m_tiles * tile.n_blocks * 16):
            store(self.acc, i, 0)

    def multiply(self, base: Any, start_copies: Callable[[], None]) -> None:
        """All products of one stage; copies start while the first fragments are on their way."""
        g, tile = self.g, self.g.tile
        a_size = 4 * self.at_once
        lane_row = T.truncmod(self.lane, 16)
        half = T.truncdiv(self.lane, 16) ^ swap(lane_row)
        rows = base + (self.warp_m * (tile.m_tiles * 16) + lane_row) * KSTEP + half * 16
        for k in range(0, tile.ksteps, self.at_once):
            for m in range(tile.m_tiles):
                for i in range(self.at_once):
                    source = pointer(self.memory, rows + ((k + i) * tile.rows + m * 16) * KSTEP)
                    call(intrinsics.LDMATRIX, pointer(self.a, m * a_size + i * 4), source)
            for n in range(tile.n_blocks):
                block = (self.warp_n * tile.n_blocks + n) * tile.ksteps + k
                self._load_fragments(n, base + g.data_bytes + block * g.kstep_bytes + self.lane * 16)
            if k == 0:
                start_copies()
            for m in range(tile.m_tiles):
                a = pointer(self.a, m * a_size)
                if g.multiplies_nibbles:
                    call(intrinsics.PACK_NIBBLES, a, a, pointer(self.a, m * a_size + 4))
                for n in range(tile.n_blocks):
                    for j in range(4):
                        at = ((m * tile.n_blocks + n) * 4 + j) * 4
                        call(self._mma, pointer(self.acc, at), a, pointer(self.b, n * 8 + j * 2))

    @property
    def _mma(self) -> intrinsics.Function:
        """The matrix instruction; sm_80 brought the larger one of both kinds."""
        is_large = self.isa.has_mma_s8_k32
        if self.g.multiplies_nibbles:
            return intrinsics.mma_nibbles(is_large)
        return intrinsics.mma(self.g.in_dtype, is_large)

    def _load_fragments(self, n: int, at: Any) -> None:
        if self.g.weight_bits == 4 and not self.g.multiplies_nibbles:
            call(intrinsics.copy(16), pointer(self.packed), pointer(self.memory, at))
            call(intrinsics.UNPACK_NIBBLES, pointer(self.b, n * 8), pointer(self.packed))
            return
        for half in range(2):
            source = pointer(self.memory, at + half * (WARP * 16))
            call(intrinsics.copy(16), pointer(self.b, n * 8 + half * 4), source)
