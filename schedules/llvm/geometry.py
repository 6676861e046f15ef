"""What the code of an integer convolution depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.llvm.dot import BLOCK
from lpsn_tvm.schedules.llvm.tiles import Tile


@dataclass(frozen=True)
class Phases:
    """Output phases of a transposed convolution: phase (py, px) of `strides` is a convolution of its own that writes
    every stride-th pixel.

    Virtual output block v = (py * strides[1] + px) * blocks + o; its input window is shifted by `(p + crop) // stride
    - taps + 1`.
    """

    strides: tuple[int, int]
    crop: tuple[int, int]
    taps: tuple[int, int]
    out_size: tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Everything the code of one integer convolution depends on; equal geometries share a compiled function.

    `in_strides` / `out_strides` are element strides of (batch, block, row, column); `pads` (top, left, bottom, right)
    of the padded workspace. `group` is (output channels, input channels) per group, or None; then output block o reads
    input blocks from
    `start(o)` on. `chunk` is the most column tiles that one task runs where the map is one row; `order` is what changes
    slowest from task to task: "blocks" of output channels, so that weights stay in cache, or "pixels".
    """

    in_shape: tuple[int, ...]
    in_dtype: str
    batch: int
    in_blocks: int
    in_block: int
    in_size: tuple[int, int]
    in_strides: tuple[int, int, int, int]
    pads: tuple[int, int, int, int]
    out_shape: tuple[int, ...]
    out_dtype: str
    out_blocks: int
    out_size: tuple[int, int]
    out_strides: tuple[int, int, int, int]
    reduce_blocks: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    quad: int
    has_residual: bool
    tile: Tile
    group: tuple[int, int] | None = None
    phases: Phases | None = None
    chunk: int = 0
    order: str = "blocks"

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding channels included."""
        per_pixel = self.reduce_blocks * self.in_block * self.kernel[0] * self.kernel[1] * BLOCK
        return self.batch * self.out_blocks * self.out_size[0] * self.out_size[1] * per_pixel

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Packed weights: [output blocks, input blocks, kh, kw, lanes / quad, 16, quad]."""
        return (self.out_blocks, self.reduce_blocks, *self.kernel, self.in_block // self.quad, BLOCK, self.quad)

    @property
    def weight_dtype(self) -> str:
        """int16 for pairs (vpmaddwd), else int8."""
        return "int16" if self.quad == 2 else "int8"

    @property
    def is_padded(self) -> bool:
        """Whether the input is first copied into a padded (or widened) workspace."""
        return any(self.pads) or self.quad == 2

    def start(self, block: Any) -> Any:
        """First input block that output block `block` reads."""
        if self.group is None:
            return 0
        out_per, in_per = self.group
        if self.phases is not None:
            block = T.floormod(block, self.out_blocks // (self.phases.strides[0] * self.phases.strides[1]))
        first = T.floordiv(T.floordiv(block * BLOCK, out_per) * in_per, self.in_block)
        return T.min(first, self.in_blocks - self.reduce_blocks)
