"""The integer convolution kernel that convolution, transposed convolution and dense share: geometry, padding, register
tile, epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.llvm.conv_workspace import interleave, padded
from lpsn_tvm.schedules.llvm.dot import BLOCK, broadcast_quad, dot, lanes_of, store_epilogue
from lpsn_tvm.schedules.llvm.geometry import Geometry
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import loop, nest, prim_func, unravel, vload, vstore


def convolution(geometry: Geometry, isa: Isa) -> Any:
    """The PrimFunc (data, [residual], weight, bias, scale, float parameters, integer parameters, output).

    Float parameters: low and high clamp in units of the output (before the zero point), residual multiplier. Integer
    parameters: padding value, zero point - MAGIC_BITS, residual zero point.
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
            data, strides = padded(g, data, integers)
        target, out_strides = out, g.out_strides
        if g.phases is not None:
            rows, columns = g.out_size
            out_strides = (g.out_blocks * rows * columns * BLOCK, rows * columns * BLOCK, columns * BLOCK, BLOCK)
            target = T.alloc_buffer((g.batch * out_strides[0],), g.out_dtype)
        _Compute(g, isa, data, strides, residual, weight, bias, scale, floats, integers, target, out_strides).emit()
        if g.phases is not None:
            interleave(g, target, out)

    return prim_func(arguments, body)


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
        # Rows are shared between threads; a map of one row (dense, flattened 1x1) shares chunks of column tiles
        # instead.
        chunk = column_tiles if row_tiles > 1 else chunk_of(column_tiles, g.chunk)
        chunks = column_tiles // chunk
        total = g.batch * block_tiles * row_tiles * chunks
        with loop(total, g.macs) as index:
            if g.order == "blocks":
                n, ot, yo, xc = unravel(index, g.batch, block_tiles, row_tiles, chunks)
            else:
                n, yo, xc, ot = unravel(index, g.batch, row_tiles, chunks, block_tiles)
            with nest(chunk) as (xi,):
                y0 = _tile_start(yo, tile.rows, height)
                x0 = _tile_start(xc * chunk + xi, tile.columns, width)
                self._tile(n, ot * tile.blocks, y0, x0)

    def _tile(self, n: Any, block: Any, y0: Any, x0: Any) -> None:
        g, tile = self.g, self.g.tile
        lanes = lanes_of(self.isa)
        pieces = BLOCK // lanes
        acc = T.alloc_buffer((tile.pixels * tile.blocks * BLOCK,), "int32", scope="local")
        for pixel in range(tile.pixels):
            for o in range(tile.blocks):
                for piece in range(pieces):
                    at = (pixel * tile.blocks + o) * BLOCK + piece * lanes
                    vstore(acc, at, vload(self.bias, (block + o) * BLOCK + piece * lanes, lanes), lanes)
        shift_y, shift_x = self._shift(block)
        origin = (
            n * self.strides[0]
            + g.start(block) * self.strides[1]
            + (y0 * g.strides[0] + shift_y) * self.strides[2]
            + (x0 * g.strides[1] + shift_x) * self.strides[3]
        )
        kh, kw = g.kernel
        per_block = g.reduce_blocks * kh * kw * g.in_block * BLOCK
        with nest(g.reduce_blocks, kh, kw) as (c, r, s):
            base = (
                origin
                + c * self.strides[1]
                + r * (g.dilation[0] * self.strides[2])
                + s * (g.dilation[1] * self.strides[3])
            )
            w = block * per_block + ((c * kh + r) * kw + s) * (g.in_block * BLOCK)
            for f in range(g.in_block // g.quad):
                for pixel in range(tile.pixels):
                    y, x = divmod(pixel, tile.columns)
                    at = base + y * g.strides[0] * self.strides[2] + x * g.strides[1] * self.strides[3] + f * g.quad
                    self._products(acc, pixel, at, w + f * g.quad * BLOCK, per_block, lanes)
        out = (
            n * self.out_strides[0] + block * self.out_strides[1] + y0 * self.out_strides[2] + x0 * self.out_strides[3]
        )
        for pixel in range(tile.pixels):
            y, x = divmod(pixel, tile.columns)
            for o in range(tile.blocks):
                for piece in range(pieces):
                    at = (
                        out
                        + o * self.out_strides[1]
                        + y * self.out_strides[2]
                        + x * self.out_strides[3]
                        + piece * lanes
                    )
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
            (T.floordiv(phase, sx), T.floormod(phase, sx)),
            (sy, sx),
            self.g.phases.crop,
            self.g.phases.taps,
            self.g.pads[:2],
            strict=True,
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
                vstore(
                    acc,
                    place,
                    dot(self.isa, old, broadcast_quad(self.data, at, quad, lanes), weights, quad, lanes),
                    lanes,
                )


def _tile_start(index: Any, size: int, extent: int) -> Any:
    """Start of a tile; the last one moves back instead of hanging over (what it computes twice is equal)."""
    if extent % size == 0:
        return index * size
    return T.min(index * size, extent - size)


def chunk_of(tiles: int, longest: int) -> int:
    """Column tiles that one task runs: the largest divisor up to `longest`."""
    return max(d for d in range(1, min(tiles, max(longest, 1)) + 1) if tiles % d == 0)


def default_chunk(tiles: int, longest: int = 16) -> int:
    """The largest divisor up to `longest`, or all where that would be tiny."""
    best = chunk_of(tiles, longest)
    return best if best >= 4 or tiles > 64 else tiles
