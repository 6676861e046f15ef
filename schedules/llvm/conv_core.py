"""The integer convolution kernel that convolution, transposed convolution and dense share: geometry, padding, register tile, epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tiles import Tile
from lpsn_tvm.schedules.llvm.tir import (
    bounded,
    loop,
    map_elements,
    nest,
    prim_func,
    requantized,
    unravel,
    vcast,
    vector,
    vload,
    vstore,
)

BLOCK = 16


@dataclass(frozen=True)
class Phases:
    """Output phases of a transposed convolution: phase (py, px) of `strides` is a convolution of its own that writes every stride-th pixel.

    Virtual output block v = (py * strides[1] + px) * blocks + o; its input window is shifted by `(p + crop) // stride - taps + 1`.
    """

    strides: tuple[int, int]
    crop: tuple[int, int]
    taps: tuple[int, int]
    out_size: tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Everything the code of one integer convolution depends on; equal geometries share a compiled function.

    `in_strides` / `out_strides` are element strides of (batch, block, row, column); `pads` (top, left, bottom, right) of the padded workspace.
    `group` is (output channels, input channels) per group, or None; then output block o reads input blocks from `start(o)` on.
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


def quad_of(isa: Isa, dtype: str) -> int:
    """How many products the dot instruction adds per lane: 4 (VNNI, uint8 data only), 2 (vpmaddwd on int16), 1 (none)."""
    if isa.dot == "none":
        return 1
    return 4 if isa.dot.startswith("vnni") and dtype == "uint8" else 2


def convolution(geometry: Geometry, isa: Isa) -> Any:
    """The PrimFunc (data, [residual], weight, bias, scale, float parameters, integer parameters, output).

    Float parameters: low and high clamp in units of the output (before the zero point), residual multiplier. Integer parameters: padding value,
    zero point - MAGIC_BITS, residual zero point.
    """
    g = geometry
    arguments = [("data", g.in_shape, g.in_dtype)]
    if g.has_residual:
        arguments.append(("residual", g.out_shape, g.out_dtype))
    arguments += [
        ("weight", g.weight_shape, g.weight_dtype),
        ("bias", (g.out_blocks, BLOCK), "int32"),
        ("scale", (g.out_blocks, BLOCK), "float32"),
        ("floats", (4,), "float32"),
        ("integers", (4,), "int32"),
        ("out", g.out_shape, g.out_dtype),
    ]

    def body(data: Any, *rest: Any) -> None:
        residual = rest[0] if g.has_residual else None
        weight, bias, scale, floats, integers, out = rest[1:] if g.has_residual else rest
        strides = g.in_strides
        if g.is_padded:
            data, strides = _padded(g, data, integers)
        target, out_strides = out, g.out_strides
        if g.phases is not None:
            rows, columns = g.out_size
            out_strides = (g.out_blocks * rows * columns * BLOCK, rows * columns * BLOCK, columns * BLOCK, BLOCK)
            target = T.alloc_buffer((g.batch * out_strides[0],), g.out_dtype)
        _Compute(g, isa, data, strides, residual, weight, bias, scale, floats, integers, target, out_strides).emit()
        if g.phases is not None:
            _interleave(g, target, out)

    return prim_func(arguments, body)


def _padded(g: Geometry, data: Any, integers: Any) -> tuple[Any, tuple[int, int, int, int]]:
    """Copy the input into a workspace with the padding value around it, widened to int16 where pairs are multiplied."""
    top, left, bottom, right = g.pads
    rows, columns = g.in_size[0] + top + bottom, g.in_size[1] + left + right
    pixel = g.in_block
    strides = (g.in_blocks * rows * columns * pixel, rows * columns * pixel, columns * pixel, pixel)
    wide = g.quad == 2
    dtype = "int16" if wide else g.in_dtype
    work = T.alloc_buffer((g.batch * strides[0] + 64,), dtype)
    lanes = 32 if wide else 64
    source_row = g.in_size[1] * pixel
    contiguous = g.in_strides[3] == pixel

    def fill(start: Any, count: int) -> None:
        value = T.cast(integers[0], dtype)
        map_elements(count, lanes, lambda i, n: vstore(work, start + i, vector(value, n), n))

    def copy(start: Any, source: Any, count: int) -> None:
        map_elements(count, lanes, lambda i, n: vstore(work, start + i, vcast(vload(data, source + i, n), dtype, n), n))

    total = g.batch * g.in_blocks * rows
    with loop(total, total * columns * pixel * 4) as index:
        n, c, y = unravel(index, g.batch, g.in_blocks, rows)
        base = index * strides[2]
        source = n * g.in_strides[0] + c * g.in_strides[1] + (y - top) * g.in_strides[2]

        def inside() -> None:
            if left:
                fill(base, left * pixel)
            if contiguous:
                copy(base + left * pixel, source, source_row)
            else:
                with T.serial(0, g.in_size[1]) as x:
                    copy(base + (left + x) * pixel, source + x * g.in_strides[3], pixel)
            if right:
                fill(base + (left + g.in_size[1]) * pixel, right * pixel)

        if top or bottom:
            with T.If(T.And(y >= top, y < top + g.in_size[0])):
                with T.Then():
                    inside()
                with T.Else():
                    fill(base, columns * pixel)
        else:
            inside()
    return work, strides


def _interleave(g: Geometry, work: Any, out: Any) -> None:
    """Put the phases of a transposed convolution next to each other."""
    assert g.phases is not None
    sy, sx = g.phases.strides
    rows, columns = g.out_size
    height, width = g.phases.out_size
    blocks = g.out_blocks // (sy * sx)
    total = g.batch * blocks * height
    with loop(total, total * width * BLOCK * 4) as index:
        n, o, y = unravel(index, g.batch, blocks, height)
        for px in range(min(sx, width)):
            virtual = (T.floormod(y, sy) * sx + px) * blocks + o
            source = ((n * g.out_blocks + virtual) * rows + T.floordiv(y, sy)) * columns
            with T.serial(0, -(-(width - px) // sx)) as x:
                vstore(out, (index * width + px + x * sx) * BLOCK, vload(work, (source + x) * BLOCK, BLOCK), BLOCK)


@dataclass
class _Compute:
    """Emits the tiled loops."""

    g: Geometry
    isa: Isa
    data: Any
    strides: tuple[int, int, int, int]
    residual: Any
    weight: Any
    bias: Any
    scale: Any
    floats: Any
    integers: Any
    out: Any
    out_strides: tuple[int, int, int, int]

    def emit(self) -> None:
        g, tile = self.g, self.g.tile
        height, width = g.out_size
        block_tiles = g.out_blocks // tile.blocks
        row_tiles, column_tiles = -(-height // tile.rows), -(-width // tile.columns)
        # Rows are shared between threads; a map of one row (dense, flattened 1x1) shares chunks of column tiles instead.
        chunk = column_tiles if row_tiles > 1 else _chunk(column_tiles)
        chunks = column_tiles // chunk
        total = g.batch * block_tiles * row_tiles * chunks
        with loop(total, g.macs) as index:
            n, ot, yo, xc = unravel(index, g.batch, block_tiles, row_tiles, chunks)
            with nest(chunk) as (xi,):
                y0 = _tile_start(yo, tile.rows, height)
                x0 = _tile_start(xc * chunk + xi, tile.columns, width)
                self._tile(n, ot * tile.blocks, y0, x0)

    def _tile(self, n: Any, block: Any, y0: Any, x0: Any) -> None:
        g, tile = self.g, self.g.tile
        lanes = self.isa.vector_bytes // 4 if self.isa.dot != "none" else BLOCK
        pieces = BLOCK // lanes
        acc = T.alloc_buffer((tile.pixels * tile.blocks * BLOCK,), "int32", scope="local")
        for pixel in range(tile.pixels):
            for o in range(tile.blocks):
                for piece in range(pieces):
                    at = (pixel * tile.blocks + o) * BLOCK + piece * lanes
                    vstore(acc, at, vload(self.bias, (block + o) * BLOCK + piece * lanes, lanes), lanes)
        shift_y, shift_x = self._shift(block)
        origin = (
            n * self.strides[0] + g.start(block) * self.strides[1]
            + (y0 * g.strides[0] + shift_y) * self.strides[2] + (x0 * g.strides[1] + shift_x) * self.strides[3]
        )
        kh, kw = g.kernel
        per_block = g.reduce_blocks * kh * kw * g.in_block * BLOCK
        with nest(g.reduce_blocks, kh, kw) as (c, r, s):
            base = origin + c * self.strides[1] + r * (g.dilation[0] * self.strides[2]) + s * (g.dilation[1] * self.strides[3])
            w = block * per_block + ((c * kh + r) * kw + s) * (g.in_block * BLOCK)
            for f in range(g.in_block // g.quad):
                for pixel in range(tile.pixels):
                    y, x = divmod(pixel, tile.columns)
                    at = base + y * g.strides[0] * self.strides[2] + x * g.strides[1] * self.strides[3] + f * g.quad
                    self._products(acc, pixel, at, w + f * g.quad * BLOCK, per_block, lanes)
        out = n * self.out_strides[0] + block * self.out_strides[1] + y0 * self.out_strides[2] + x0 * self.out_strides[3]
        for pixel in range(tile.pixels):
            y, x = divmod(pixel, tile.columns)
            for o in range(tile.blocks):
                for piece in range(pieces):
                    at = out + o * self.out_strides[1] + y * self.out_strides[2] + x * self.out_strides[3] + piece * lanes
                    value = vload(acc, (pixel * tile.blocks + o) * BLOCK + piece * lanes, lanes)
                    scale = vload(self.scale, (block + o) * BLOCK + piece * lanes, lanes)
                    store_epilogue(value, scale, self.residual, self.floats, self.integers, self.out, at, lanes)

    def _shift(self, block: Any) -> tuple[Any, Any]:
        """Where the window of a phase starts in the padded input."""
        if self.g.phases is None:
            return 0, 0
        sy, sx = self.g.phases.strides
        blocks = self.g.out_blocks // (sy * sx)
        phase = T.floordiv(block, blocks)
        shifts = []
        for p, s, crop, taps, pad in zip(
            (T.floordiv(phase, sx), T.floormod(phase, sx)), (sy, sx), self.g.phases.crop, self.g.phases.taps, self.g.pads[:2], strict=True
        ):
            shifts.append(T.floordiv(p + crop, s) - taps + 1 + pad)
        return shifts[0], shifts[1]

    def _products(self, acc: Any, pixel: int, at: Any, w: Any, per_block: int, lanes: int) -> None:
        """acc[pixel, every block] += data quad . weights."""
        quad = self.g.quad
        for o in range(self.g.tile.blocks):
            for piece in range(BLOCK // lanes):
                place = (pixel * self.g.tile.blocks + o) * BLOCK + piece * lanes
                old = vload(acc, place, lanes)
                weights = vload(self.weight, w + o * per_block + piece * lanes * quad, lanes * quad)
                vstore(acc, place, dot(self.isa, old, broadcast_quad(self.data, at, quad, lanes), weights, quad, lanes), lanes)


def store_epilogue(acc: Any, scale: Any, residual: Any, floats: Any, integers: Any, out: Any, at: Any, lanes: int) -> None:
    """Finish one vector: scale, optional residual, requantize or float32 (the bias is where the accumulator started)."""
    value = vcast(acc, "float32", lanes) * scale
    dtype = str(out.dtype)
    if dtype == "float32":
        vstore(out, at, value, lanes)
        return
    if residual is not None:
        other = vcast(vload(residual, at, lanes), "int32", lanes) - vector(integers[2], lanes)
        scaled = vcast(other, "float32", lanes) * vector(floats[2], lanes)
        value = bounded(value, lanes) + bounded(scaled, lanes)
    vstore(out, at, requantized(value, floats[0], floats[1], integers[1], dtype, lanes), lanes)


def broadcast_quad(data: Any, at: Any, quad: int, lanes: int) -> Any:
    """`data[at : at + quad]` repeated in every lane, as the dot instruction wants its first operand."""
    if quad == 1:
        return vector(T.cast(data[at], "int32"), lanes)
    scalar = vector(T.reinterpret("int32", vload(data, at, quad)), lanes)
    return T.reinterpret(f"int8x{lanes * 4}" if quad == 4 else f"int16x{lanes * 2}", scalar)


def dot(isa: Isa, acc: Any, data: Any, weights: Any, quad: int, lanes: int) -> Any:
    """`acc + sum over each quad of data * weights`, lane by lane, exactly in int32."""
    if quad == 1:
        return acc + data * vcast(weights, "int32", lanes)
    if quad == 4:
        intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.avx512.vpdpbusd.{lanes * 32}")
        return T.call_llvm_pure_intrin(intrinsic, acc, data, weights, dtype=f"int32x{lanes}")
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd")
    return acc + T.call_llvm_pure_intrin(intrinsic, data, weights, dtype=f"int32x{lanes}")


def _tile_start(index: Any, size: int, extent: int) -> Any:
    """Start of a tile; the last one moves back instead of hanging over (what it computes twice is equal)."""
    if extent % size == 0:
        return index * size
    return T.min(index * size, extent - size)


def _chunk(tiles: int, longest: int = 16) -> int:
    """Column tiles that one task runs: the largest divisor up to `longest`, or all where that would be tiny."""
    best = max(d for d in range(1, longest + 1) if tiles % d == 0)
    return best if best >= 4 or tiles > 64 else tiles
