"""How values lie in the accelerator's memory: tiles `[n][block][y][x]`, each `[BATCH][BLOCK]` integers of `bits` bits,
packed little-endian, lowest bits first. numpy only: the same code runs in a build, in a loaded module and on a board.

* `TileLayout`: a tensor as it is (NCHW, or [N, K] as one pixel), optionally in several planes of `bits` bits each:
  4 planes of 8 bits hold an int32 result that left the accelerator byte by byte.
* `GatherLayout`: what a packed first layer reads. Every lane of a tile names the channel, the offset and the part of
  the number that it holds; tile (y, x) looks at input pixel (y * stride + dy, x * stride + dx). Space-to-depth, window
  packing (im2col) and numbers wider than the hardware's, split into two planes, are all such gathers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lpsn_tvm.errors import CompileError

Array = npt.NDArray[Any]
Part = Literal["whole", "high", "low"]


def ceil_div(value: int, divisor: int) -> int:
    """`ceil(value / divisor)`."""
    return -(-value // divisor)


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """NCHW of a tensor: [N, K] is one pixel, [N, C, W] one row, [N] one channel.

    Raises
    ------
    CompileError
        More than 4 dimensions, or none.
    """
    if not 1 <= len(shape) <= 4 or any(extent < 1 for extent in shape):
        raise CompileError(
            f"a tensor of shape {shape} has no tile layout; 1 to 4 positive extents have", where="layout"
        )
    n, c, *pixels = (*shape, 1) if len(shape) == 1 else shape
    height, width = {0: (1, 1), 1: (1, *pixels), 2: tuple(pixels)}[len(pixels)]
    return n, c, height, width


@dataclass(frozen=True)
class TileLayout:
    """A tensor in tiles.

    Parameters
    ----------
    shape : tuple of int
        Of the value: [N, C, H, W], or [N, K].
    batch, block : int
        BATCH and BLOCK of the hardware.
    bits : int
        Bits of each stored integer: 1, 2, 4 or 8.
    planes : int
        1: the value is int8. More: int32, plane p (outermost, `[plane][n][block][y][x]`) holds bits
        `[p * bits, (p + 1) * bits)`; 32 / bits planes hold it whole, fewer are sign-extended.
    """

    shape: tuple[int, ...]
    batch: int
    block: int
    bits: int = 8
    planes: int = 1

    @property
    def image(self) -> tuple[int, int, int, int]:
        """NCHW."""
        return image_shape(self.shape)

    @property
    def batches(self) -> int:
        """Tiles along N."""
        return ceil_div(self.image[0], self.batch)

    @property
    def blocks(self) -> int:
        """Tiles along C."""
        return ceil_div(self.image[1], self.block)

    @property
    def height(self) -> int:
        """Tiles along y."""
        return self.image[2]

    @property
    def width(self) -> int:
        """Tiles along x."""
        return self.image[3]

    @property
    def plane_tiles(self) -> int:
        """Tiles of one plane."""
        return self.batches * self.blocks * self.height * self.width

    @property
    def tiles(self) -> int:
        """Tiles of the whole tensor."""
        return self.planes * self.plane_tiles

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile."""
        return ceil_div(self.batch * self.block * self.bits, 8)

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return self.tiles * self.tile_bytes

    def pack(self, array: Array) -> bytes:
        """int8 (several planes: int32) array of `shape` -> bytes; lanes beyond the tensor hold 0.

        Raises
        ------
        CompileError
            Another shape, or values that do not fit the bits.
        """
        total = self.bits * self.planes
        values = _checked(array, self.shape, total, signed=True)
        parts = [values >> (p * self.bits) for p in range(self.planes)]
        data = np.stack([self._tiled(part) for part in parts])
        return pack_integers(data, self.bits)

    def unpack(self, data: bytes | memoryview) -> Array:
        """Inverse of `pack`: int8[shape], or int32[shape] with several planes."""
        values = unpack_integers(data, self.tiles * self.batch * self.block, self.bits, signed=self.planes == 1)
        n, c, height, width = self.image
        tiles = values.reshape(self.planes, self.batches, self.blocks, height, width, self.batch, self.block)
        whole = tiles.transpose(0, 1, 5, 2, 6, 3, 4).reshape(
            self.planes, self.batches * self.batch, self.blocks * self.block, height, width
        )[:, :n, :c]
        if self.planes == 1:
            return np.ascontiguousarray(whole[0]).reshape(self.shape)
        total = np.zeros(whole.shape[1:], np.int64)
        for p in range(self.planes):
            total |= (whole[p].astype(np.int64) & ((1 << self.bits) - 1)) << (p * self.bits)
        spare = 64 - self.bits * self.planes
        return ((total << spare) >> spare).astype(np.int32).reshape(self.shape)

    def _tiled(self, values: Array) -> Array:
        """[n][block][y][x][BATCH][BLOCK] of one plane."""
        return _tiles_of(values.reshape(self.image), self.batch, self.block)


@dataclass(frozen=True)
class Lane:
    """What one lane holds: a channel of the input at an offset (dy, dx), whole or one of its two parts:
    `q == (high << low_bits) + low` with `low` in [-2**(low_bits - 1), 2**(low_bits - 1) - 1].
    """

    channel: int
    dy: int = 0
    dx: int = 0
    part: Part = "whole"


@dataclass(frozen=True)
class GatherLayout:
    """A tensor whose lanes are gathered from the value; there is no way back.

    Parameters
    ----------
    shape : tuple of int
        Of the value, [N, C, H, W] (or [N, K]).
    batch, block, bits : int
        As in `TileLayout`.
    lanes : tuple of Lane or None
        Lane l of block l // block; None holds 0. Filled up with zeros to whole blocks.
    strides : (int, int)
        Input pixels per tile along y and x.
    height, width : int
        Tiles along y and x. Pixels outside the image are 0.
    low_bits : int
        Width of the "low" part (4 on 4-bit hardware: 7-bit numbers have a "high" in -4..4); 0: no lane is split.
    """

    shape: tuple[int, ...]
    batch: int
    block: int
    lanes: tuple[Lane | None, ...]
    height: int
    width: int
    strides: tuple[int, int] = (1, 1)
    bits: int = 8
    low_bits: int = 0

    planes = 1

    @property
    def batches(self) -> int:
        """Tiles along N."""
        return ceil_div(image_shape(self.shape)[0], self.batch)

    @property
    def blocks(self) -> int:
        """Tiles along the lanes."""
        return ceil_div(len(self.lanes), self.block)

    @property
    def tiles(self) -> int:
        """Tiles of the whole tensor."""
        return self.batches * self.blocks * self.height * self.width

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile."""
        return ceil_div(self.batch * self.block * self.bits, 8)

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return self.tiles * self.tile_bytes

    def gather(self, array: Array) -> Array:
        """int8[N, lanes, height, width]: the tensor that a `TileLayout` would hold.

        Raises
        ------
        CompileError
            Another shape than `shape`.
        """
        values = _checked(array, self.shape, 8, signed=True).reshape(image_shape(self.shape))
        parts = {"whole": values}
        if self.low_bits:
            half = 1 << (self.low_bits - 1)
            wide = values.astype(np.int16)
            low = ((wide + half) & (2 * half - 1)) - half
            parts |= {"high": ((wide - low) >> self.low_bits).astype(np.int8), "low": low.astype(np.int8)}
        top, left, bottom, right = self._margins
        parts = {k: np.pad(v, ((0, 0), (0, 0), (top, bottom), (left, right))) for k, v in parts.items()}
        result = np.zeros((values.shape[0], len(self.lanes), self.height, self.width), np.int8)
        (sy, sx), rows, columns = self.strides, self.height, self.width
        for index, lane in enumerate(self.lanes):
            if lane is not None:
                y, x = lane.dy + top, lane.dx + left
                source = parts[lane.part][:, lane.channel]
                result[:, index] = source[:, y : y + (rows - 1) * sy + 1 : sy, x : x + (columns - 1) * sx + 1 : sx]
        return result

    def pack(self, array: Array) -> bytes:
        """int8 array of `shape` -> bytes.

        Raises
        ------
        CompileError
            Another shape, or a gathered value that does not fit the bits.
        """
        lanes = self.gather(array)
        _checked(lanes, lanes.shape, self.bits, signed=True)
        return pack_integers(_tiles_of(lanes, self.batch, self.block), self.bits)

    @cached_property
    def _margins(self) -> tuple[int, int, int, int]:
        """Zeros to add around the image: top, left, bottom, right."""
        _, _, height, width = image_shape(self.shape)
        used = [lane for lane in self.lanes if lane is not None] or [Lane(0)]
        last_y = max(lane.dy for lane in used) + (self.height - 1) * self.strides[0]
        last_x = max(lane.dx for lane in used) + (self.width - 1) * self.strides[1]
        return (
            max(0, -min(lane.dy for lane in used)),
            max(0, -min(lane.dx for lane in used)),
            max(0, last_y + 1 - height),
            max(0, last_x + 1 - width),
        )


Layout = TileLayout | GatherLayout


def pack_weights(tiles: Array, bits: int) -> bytes:
    """Weight tiles int8[..., BLOCK_OUT, BLOCK_IN] -> bytes."""
    return pack_integers(_checked(tiles, tiles.shape, bits, signed=True), bits)


def vector_tiles(values: Array, batch: int, block: int) -> Array:
    """int32[C] -> accumulator tiles int32[blocks, BATCH, BLOCK], filled up with zeros: one operand of `Vector`."""
    blocks = ceil_div(values.size, block)
    padded = np.zeros(blocks * block, np.int32)
    padded[: values.size] = values.reshape(-1)
    return np.repeat(padded.reshape(blocks, 1, block), batch, axis=1)


def pack_integers(values: Array, bits: int) -> bytes:
    """The low `bits` bits (1, 2, 4 or 8) of each integer, one after another, little-endian, lowest bits first."""
    data = np.ascontiguousarray(values).reshape(-1).astype(np.uint8)
    if bits == 8:
        return data.tobytes()
    per_byte = 8 // bits
    padded = np.zeros(ceil_div(data.size, per_byte) * per_byte, np.uint8)
    padded[: data.size] = data & np.uint8((1 << bits) - 1)
    lanes = padded.reshape(-1, per_byte)
    packed = lanes[:, 0].copy()
    for index in range(1, per_byte):
        packed |= lanes[:, index] << np.uint8(index * bits)
    return packed.tobytes()


def unpack_integers(data: bytes | memoryview, count: int, bits: int, *, signed: bool = True) -> Array:
    """Inverse of `pack_integers`: int8[count] (uint8 if not `signed`).

    Raises
    ------
    CompileError
        `data` is too short.
    """
    raw = np.frombuffer(data, np.uint8)
    if raw.size * 8 < count * bits:
        raise CompileError(f"{raw.size} bytes cannot hold {count} integers of {bits} bits", where="layout")
    if bits == 8:
        values = raw[:count].copy()
        return values.view(np.int8) if signed else values
    per_byte = 8 // bits
    lanes = np.stack([raw >> np.uint8(index * bits) for index in range(per_byte)], axis=1).reshape(-1)[:count]
    spare = np.uint8(8 - bits)
    if signed:
        return (lanes << spare).view(np.int8) >> np.int8(spare)
    return lanes & np.uint8((1 << bits) - 1)


def _tiles_of(values: Array, batch: int, block: int) -> Array:
    """[N, C, H, W] -> [n][block][y][x][BATCH][BLOCK], zeros beyond N and C."""
    n, c, height, width = values.shape
    batches, blocks = ceil_div(n, batch), ceil_div(c, block)
    padded = values
    if (n, c) != (batches * batch, blocks * block):
        padded = np.zeros((batches * batch, blocks * block, height, width), values.dtype)
        padded[:n, :c] = values
    return padded.reshape(batches, batch, blocks, block, height, width).transpose(0, 2, 4, 5, 1, 3)


def _checked(array: Array, shape: tuple[int, ...], bits: int, *, signed: bool) -> Array:
    """The array, if it has the shape and its values fit."""
    values = np.asarray(array)
    if values.shape != tuple(shape):
        raise CompileError(f"shape {values.shape} is not {tuple(shape)}", where="layout")
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise CompileError(
            f"values {int(values.min())}..{int(values.max())} do not fit {bits} bits ({low}..{high})", where="layout"
        )
    return values
