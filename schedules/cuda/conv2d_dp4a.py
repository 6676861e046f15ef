"""Products of convolution and dense layers on GPUs without 8-bit matrix instructions (GTX 10xx, V100): dot products of
four bytes (dp4a) in the place of `conv_products.WarpProducts`; copies, pipeline, divided sums and results are shared.

A lane sums the same outputs as with matrix instructions: eight neighbouring channels of pixels that are eight apart.
Pixels and weights come from shared memory 16 bytes at a time, eight times four of each for 256 dot products.

Never run on a GPU so far: results are checked in emulation, instructions and spills in the machine code of sm_75.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.conv_copies import swap
from lpsn_tvm.schedules.cuda.conv_products import WarpProducts
from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry
from lpsn_tvm.schedules.cuda.isa import BLOCK
from lpsn_tvm.schedules.cuda.tir import call, pointer, registers, store

CHANNELS, OCTETS = 8, BLOCK // 8
"""Channels of a lane in a block of 32, and lanes that share the block."""
HALF = KSTEP // 2
"""Bytes of a k-step that are read at once."""
WORDS = HALF // 4

DOT_SHAPES = (
    (128, 128, 2, 4),
    (128, 64, 2, 2),
    (64, 128, 1, 4),
    (64, 64, 1, 2),
    (128, 32, 2, 1),
    (64, 64, 2, 2),
    (64, 32, 2, 1),
    (32, 64, 1, 2),
    (32, 32, 2, 1),
    (16, 64, 1, 2),
    (16, 32, 1, 1),
)
"""Rows, columns, warps along both: up to eight pixels by eight channels per lane."""


def pack_words(steps: npt.NDArray[np.int8], geometry: ConvGeometry) -> npt.NDArray[Any]:
    """int8[blocks, k-steps, 32 output channels, 32 bytes] -> int8 or uint8[blocks, k-steps, bytes].

    A half of a k-step holds, for each of the eight channels of a lane, the 16 bytes of that channel for the four lanes
    that share a block: [half, channel of the lane, lane, byte]. With 4 bits, 16 bytes hold two channels: the even one
    in the low nibbles.
    """
    blocks, count = steps.shape[:2]
    split = steps.reshape(blocks, count, OCTETS, CHANNELS, 2, HALF).transpose(0, 1, 4, 3, 2, 5)
    if geometry.weight_bits == 4:
        nibbles = np.ascontiguousarray(split).view(np.uint8) & 15
        split = nibbles[:, :, :, 0::2] | nibbles[:, :, :, 1::2] << 4
    return np.ascontiguousarray(split).reshape(geometry.weight_shape)


class DotProducts(WarpProducts):
    """Emits the products of one lane; the sums are where a matrix instruction would have left them."""

    def __post_init__(self) -> None:
        tile = self.g.tile
        self.acc = registers(tile.m_tiles * tile.n_blocks * 16)
        # Operands of a whole stage do not fit registers: they are loaded as they are needed.
        self.steps = 1
        self.pixels = registers(self._pixels * WORDS)
        self.words = registers(2 * WORDS)
        self.halves = registers(WORDS) if self.g.weight_bits == 4 else None
        for i in range(tile.m_tiles * tile.n_blocks * 16):
            store(self.acc, i, 0)

    @property
    def _pixels(self) -> int:
        return self.g.tile.m_tiles * 2

    def multiply(self, base: Any, start_copies: Callable[[], None]) -> None:
        """All products of the stage at `base`; copies start while the first operands are on their way."""
        g, tile = self.g, self.g.tile
        row = T.truncdiv(self.lane, OCTETS)
        ksteps = tile.ksteps // tile.slices
        first = self.warp_k * ksteps
        pixels = base + (first * tile.rows + self.warp_m * (tile.m_tiles * 16) + row) * KSTEP
        weights = base + g.data_bytes + (self.warp_n * (tile.n_blocks * tile.ksteps) + first) * g.kstep_bytes
        for step in range(2 * ksteps):
            k, half = divmod(step, 2)
            at = pixels + k * (tile.rows * KSTEP) + (half ^ swap(row)) * HALF
            for i in range(self._pixels):
                source = pointer(self.memory, at + i * (8 * KSTEP))
                call(intrinsics.copy(16), pointer(self.pixels, i * WORDS), source)
            if step == 0:
                start_copies()
            for n in range(tile.n_blocks):
                block = (n * tile.ksteps + k) * g.kstep_bytes + half * (g.kstep_bytes // 2)
                for channel in range(0, CHANNELS, 2):
                    self._load_words(weights + block, channel)
                    self._add(n, channel)

    def _load_words(self, weights: Any, channel: int) -> None:
        """`words`: the bytes of two channels; with 4 bits, the words of both alternate."""
        octet = T.truncmod(self.lane, OCTETS) * HALF
        if self.halves is not None:
            source = pointer(self.memory, weights + channel // 2 * (OCTETS * HALF) + octet)
            call(intrinsics.copy(16), pointer(self.halves), source)
            call(intrinsics.UNPACK_NIBBLES, pointer(self.words), pointer(self.halves))
            return
        for c in range(2):
            source = pointer(self.memory, weights + (channel + c) * (OCTETS * HALF) + octet)
            call(intrinsics.copy(16), pointer(self.words, c * WORDS), source)

    def _add(self, n: int, channel: int) -> None:
        dot = intrinsics.dot(self.g.in_dtype)
        for i in range(self._pixels):
            m, second = divmod(i, 2)
            for c in range(2):
                at = ((m * self.g.tile.n_blocks + n) * 4 + channel // 2) * 4 + second * 2 + c
                for w in range(WORDS):
                    word = self.words[w * 2 + c if self.halves is not None else c * WORDS + w]
                    value = call(dot, self.pixels[i * WORDS + w], word, self.acc[at], returns="int32")
                    store(self.acc, at, value)
