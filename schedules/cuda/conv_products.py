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
    warp_k: Any
    warp_m: Any
    warp_n: Any

    def __post_init__(self) -> None:
        g, tile = self.g, self.g.tile
        self.acc = registers(tile.m_tiles * tile.n_blocks * 16)
        self.at_once = 2 if g.multiplies_nibbles else 1
        self.steps = tile.ksteps // tile.slices // self.at_once
        self.a_size, self.b_size = tile.m_tiles * 4 * self.at_once, tile.n_blocks * 8
        slots = min(2, self.steps)
        self.a, self.b = registers(slots * self.a_size), registers(slots * self.b_size)
        if g.weight_bits == 4 and not g.multiplies_nibbles:
            self.packed = registers(4)
        for i in range(tile.m_tiles * tile.n_blocks * 16):
            store(self.acc, i, 0)
        lane_row = T.truncmod(self.lane, 16)
        half = T.truncdiv(self.lane, 16) ^ swap(lane_row)
        first = self.warp_k * (tile.ksteps // tile.slices)
        self.places = registers(2)
        store(self.places, 0, (first * tile.rows + self.warp_m * (tile.m_tiles * 16) + lane_row) * KSTEP + half * 16)
        block = self.warp_n * tile.n_blocks * tile.ksteps + first
        store(self.places, 1, g.data_bytes + block * g.kstep_bytes + self.lane * 16)

    def multiply(self, base: Any, start_copies: Callable[[], None]) -> None:
        """All products of the stage at `base`; copies start while the first fragments are on their way."""
        self.load(base, 0)
        for step in range(self.steps):
            if step + 1 < self.steps:
                self.load(base, step + 1)
            if step == 0:
                start_copies()
            self.compute(step)

    def load(self, base: Any, step: int) -> None:
        """The fragments of a step of the stage at `base`; those of the step before stay."""
        tile, k = self.g.tile, step * self.at_once
        a, b = step % 2 * self.a_size, step % 2 * self.b_size
        for m in range(tile.m_tiles):
            for i in range(self.at_once):
                source = pointer(self.memory, self.places[0] + base + ((k + i) * tile.rows + m * 16) * KSTEP)
                call(intrinsics.LDMATRIX, pointer(self.a, a + (m * self.at_once + i) * 4), source)
        for n in range(tile.n_blocks):
            within = (n * tile.ksteps + k) * self.g.kstep_bytes
            self._load_weights(b + n * 8, self.places[1] + base + within)

    def compute(self, step: int) -> None:
        """The products of a step whose fragments are loaded."""
        tile, size = self.g.tile, 4 * self.at_once
        for m in range(tile.m_tiles):
            at = step % 2 * self.a_size + m * size
            a = pointer(self.a, at)
            if self.g.multiplies_nibbles:
                call(intrinsics.PACK_NIBBLES, a, a, pointer(self.a, at + 4))
            for n in range(tile.n_blocks):
                for j in range(4):
                    sums = pointer(self.acc, ((m * tile.n_blocks + n) * 4 + j) * 4)
                    call(self._mma, sums, a, pointer(self.b, step % 2 * self.b_size + n * 8 + j * 2))

    @property
    def _mma(self) -> intrinsics.Function:
        """The matrix instruction; sm_80 brought the larger one of both kinds."""
        is_large = self.isa.has_mma_s8_k32
        if self.g.multiplies_nibbles:
            return intrinsics.mma_nibbles(is_large)
        return intrinsics.mma(self.g.in_dtype, is_large)

    def _load_weights(self, to: int, at: Any) -> None:
        if self.g.weight_bits == 4 and not self.g.multiplies_nibbles:
            call(intrinsics.copy(16), pointer(self.packed), pointer(self.memory, at))
            call(intrinsics.UNPACK_NIBBLES, pointer(self.b, to), pointer(self.packed))
            return
        for half in range(2):
            source = pointer(self.memory, at + half * (WARP * 16))
            call(intrinsics.copy(16), pointer(self.b, to + half * 4), source)
