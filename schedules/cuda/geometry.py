"""Shape of an implicit-GEMM convolution on a GPU, and how it is cut into tiles.

The matrix product: rows are output pixels (n, y, x), columns are output channels, and the inner dimension is cut into
k-steps of 32 bytes: 32 channels of one filter tap, or, where the input has blocks of 4, 8 or 16 channels (network
inputs), 8, 4 or 2 taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lpsn_tvm.schedules.cuda.isa import BLOCK, WARP
from lpsn_tvm.schedules.cuda.plain_output import PlainOutput

KSTEP = 32
"""Bytes of the inner dimension that one tensor-core instruction takes."""
TABLE = 256
"""Bytes of a table."""


@dataclass(frozen=True)
class Tile:
    """How the product is shared.

    Parameters
    ----------
    rows, columns : int
        Output pixels and channels of a thread block; columns in multiples of 32 per warp.
    warps_m, warps_n : int
        Warps along both.
    ksteps : int
        k-steps per stage of the pipeline.
    stages : int
        Stages in shared memory.
    splits : int
        Thread blocks that share the inner dimension of one tile; above 1 a second launch adds their sums.
    slices : int
        Groups of `warps_m` x `warps_n` warps that share the k-steps of each stage; their sums are added in shared
        memory.
    """

    rows: int
    columns: int
    warps_m: int
    warps_n: int
    ksteps: int = 2
    stages: int = 3
    splits: int = 1
    slices: int = 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps_m * self.warps_n * self.slices * WARP

    @property
    def m_tiles(self) -> int:
        """16-row tiles of a warp."""
        return self.rows // self.warps_m // 16

    @property
    def n_blocks(self) -> int:
        """32-channel blocks of a warp."""
        return self.columns // self.warps_n // BLOCK


@dataclass(frozen=True)
class Interleave:
    """How the results of a transposed convolution are written: position `phase` of window `q` is output pixel
    `q * strides + phase - crop`, where that lies within `size`.

    Parameters
    ----------
    strides, crop, size : (int, int)
    """

    strides: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]

    @property
    def phases(self) -> int:
        """Positions within a stride."""
        return self.strides[0] * self.strides[1]


@dataclass(frozen=True)
class Walk:
    """How k-steps follow each other in the input: channel block by channel block, in each the filter row by row.

    Parameters
    ----------
    extents : (int, int, int)
        Channel blocks, rows and columns of the filter, counted in what one k-step takes: where blocks of the input are
        narrower than a k-step, that is several columns of the filter, or whole rows of it.
    steps : (int, int, int)
        Bytes of the input from one to the next.
    pixel_steps : (int, int)
        Pixels from one row and column to the next.
    row_units : int
        Chunks of a k-step that lie side by side in one row of the filter.
    """

    extents: tuple[int, int, int]
    steps: tuple[int, int, int]
    pixel_steps: tuple[int, int]
    row_units: int

    @property
    def taps(self) -> int:
        """Positions per channel block."""
        return self.extents[1] * self.extents[2]

    def unit(self, index: Any) -> tuple[Any, Any]:
        """Row and column of the filter, from the k-step's first, of chunk `index` of a k-step."""
        if self.row_units == 0:
            return 0, 0
        return index // self.row_units, index % self.row_units


@dataclass(frozen=True)
class ConvGeometry:
    """Everything that the code of a convolution depends on.

    Parameters
    ----------
    batch : int
    in_blocks, in_block : int
        Channel blocks of the input and channels per block (4, 8, 16 or 32; below 32 there is one block).
    in_size, out_size : (int, int)
        Height and width.
    in_dtype, out_dtype : str
    out_blocks : int
        Channel blocks of 32 of the output.
    kernel, strides, dilation : (int, int)
    pads : (int, int, int, int)
        Top, left, bottom, right.
    reduce_blocks : int
        Input blocks that a tile of output channels reads.
    group : (int, int) or None
        Output and input channels per group where a tile does not read all input blocks.
    has_residual : bool
    weight_bits : int
        8, or 4: two weights in a byte, unpacked in registers.
    is_flat : bool
        Tensors have no height and width (dense layers).
    interleave : Interleave or None
        Transposed convolutions: `out_blocks` counts the blocks of all phases, `out_size` windows.
    tile : Tile
    uses_dots : bool
        Products are dot products of four bytes instead of matrix instructions; weights lie in memory accordingly.
    in_bits : int
        4 where no input is above 15 and the GPU has 4-bit matrix instructions, else 8; containers are bytes.
    clamps_residual : bool
        Residuals may be so large that both products are clamped before they are added.
    has_table : bool
        A table stands for the integers of the output.
    in_fold : int
        Neighbouring columns of the input that count as one of `in_block` channels (see `narrow_inputs`).
    plain : PlainOutput or None
        Float32 results are written to plain memory instead of blocks.
    """

    batch: int
    in_blocks: int
    in_block: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    in_dtype: str
    out_dtype: str
    out_blocks: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    reduce_blocks: int
    group: tuple[int, int] | None
    has_residual: bool
    weight_bits: int
    tile: Tile
    is_flat: bool = False
    interleave: Interleave | None = None
    in_bits: int = 8
    in_fold: int = 1
    clamps_residual: bool = False
    uses_dots: bool = False
    has_table: bool = False
    plain: PlainOutput | None = None

    @property
    def multiplies_nibbles(self) -> bool:
        """Whether products are of 4 bits by 4: two k-steps become one, packed in registers."""
        return self.in_bits == 4 and self.weight_bits == 4 and self.tile.ksteps % (2 * self.tile.slices) == 0

    @property
    def pixels(self) -> int:
        """Rows of the product."""
        return self.batch * self.out_size[0] * self.out_size[1]

    @property
    def taps(self) -> int:
        """Filter positions."""
        return self.kernel[0] * self.kernel[1]

    @property
    def chunk(self) -> int:
        """Bytes of one copy to shared memory: contiguous channels of one tap."""
        return min(self.in_block, 16)

    @property
    def is_padded(self) -> bool:
        """Whether a tap can lie outside of the image."""
        return any(self.pads) or self.in_block < KSTEP

    @property
    def walk(self) -> Walk:
        """The order of k-steps; filters of narrow blocks are as wide as `fit_columns` says."""
        (height, width), (dy, dx), block = self.in_size, self.dilation, self.in_block
        rows, columns = self.kernel
        row_bytes = dy * width * block
        if block == KSTEP:
            # Beyond an only block the filter begins anew: what comes there has zero weights.
            block_bytes = height * width * block if self.reduce_blocks > 1 else 0
            return Walk((self.reduce_blocks, rows, columns), (block_bytes, row_bytes, dx * block), (dy, dx), 0)
        units = KSTEP // self.chunk
        if columns % units == 0:
            return Walk((1, rows, columns // units), (0, row_bytes, units * dx * block), (dy, units * dx), units)
        per_kstep = units // columns
        return Walk((1, -(-rows // per_kstep), 1), (0, per_kstep * row_bytes, 0), (per_kstep * dy, 0), columns)

    @property
    def ksteps(self) -> int:
        """k-steps that hold products."""
        return count_ksteps(self.taps, self.reduce_blocks, self.in_block)

    @property
    def iterations(self) -> int:
        """Stages that one thread block runs through."""
        return -(-self.ksteps // (self.tile.ksteps * self.tile.splits))

    @property
    def packed_ksteps(self) -> int:
        """k-steps in memory: what lies beyond `ksteps` has zero weights."""
        return self.iterations * self.tile.ksteps * self.tile.splits

    @property
    def row_tiles(self) -> int:
        """Tiles along the pixels."""
        return -(-self.pixels // self.tile.rows)

    @property
    def column_tiles(self) -> int:
        """Tiles along the output channels."""
        return -(-self.out_blocks * BLOCK // self.tile.columns)

    @property
    def packed_blocks(self) -> int:
        """Output channel blocks in memory of weights, bias and scale."""
        return self.column_tiles * self.tile.columns // BLOCK

    @property
    def kstep_bytes(self) -> int:
        """Weights of one k-step and 32 output channels in bytes."""
        return KSTEP * BLOCK * self.weight_bits // 8

    @property
    def data_bytes(self) -> int:
        """Pixels of one stage in shared memory."""
        return self.tile.ksteps * self.tile.rows * KSTEP

    @property
    def stage_bytes(self) -> int:
        """One stage in shared memory."""
        return self.data_bytes + self.tile.ksteps * self.tile.columns // BLOCK * self.kstep_bytes

    @property
    def memory_bytes(self) -> int:
        """Shared memory of a block: the stages, and after them in the same place the sums of slices; then the table."""
        return self.table_at + (TABLE if self.stages_table else 0)

    @property
    def table_at(self) -> int:
        """Where the table lies in shared memory."""
        sums = self.tile.slices * self.tile.rows * self.tile.columns * 4 if self.tile.slices > 1 else 0
        return max(self.tile.stages * self.stage_bytes, sums)

    @property
    def stages_table(self) -> bool:
        """Whether blocks keep the table in shared memory: those that write outputs and not parts of sums."""
        return self.has_table and self.tile.splits == 1

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of the input in memory."""
        if self.is_flat:
            return (self.batch, self.in_blocks, self.in_block)
        (height, width), fold = self.in_size, self.in_fold
        return (self.batch, self.in_blocks, height, width * fold, self.in_block // fold)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output in blocks."""
        if self.interleave is not None:
            return (self.batch, self.out_blocks // self.interleave.phases, *self.interleave.size, BLOCK)
        return (self.batch, self.out_blocks, *(() if self.is_flat else self.out_size), BLOCK)

    @property
    def written_shape(self) -> tuple[int, ...]:
        """Shape of the output in memory."""
        return self.out_shape if self.plain is None else self.plain.spec.shape

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight."""
        return (self.packed_blocks, self.packed_ksteps, self.kstep_bytes)


def count_ksteps(taps: int, reduce_blocks: int, in_block: int) -> int:
    """k-steps of a filter."""
    if in_block == KSTEP:
        return taps * reduce_blocks
    return -(-taps * in_block // KSTEP)


def fit_columns(columns: int, in_block: int) -> int:
    """Width of a filter, zeros included, with which k-steps of narrow blocks are whole rows or equal parts of one."""
    units = KSTEP // in_block
    return next(width for width in range(columns, columns + units) if width % units == 0 or units % width == 0)


def reduction(
    out_channels: int, groups: int, in_per_group: int, in_blocks: int, columns: int
) -> tuple[int, tuple[int, int] | None]:
    """Input blocks that a tile of `columns` output channels reads, and the group sizes (output, input) if it does not
    read all from 0 on.
    """
    if groups == 1:
        return in_blocks, None
    out_per = out_channels // groups
    spans = []
    for first in range(0, out_channels, columns):
        last = min(first + columns, out_channels) - 1
        spans.append((first // out_per * in_per_group // BLOCK, -(-(last // out_per + 1) * in_per_group // BLOCK)))
    return max(end - begin for begin, end in spans), (out_per, in_per_group)


def first_block(geometry: ConvGeometry, column_tile: int) -> int:
    """First input block that a tile of output channels reads (the code computes the same)."""
    if geometry.group is None:
        return 0
    out_per, in_per = geometry.group
    start = column_tile * geometry.tile.columns // out_per * in_per // BLOCK
    return min(start, geometry.in_blocks - geometry.reduce_blocks)
