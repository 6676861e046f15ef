"""Weight and vector tiles of lowered operators: arranged for the forms of source and result, equal ones kept once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.ops import Vector
from lpsn_tvm.targets.vta.forms import Array, Form
from lpsn_tvm.targets.vta.layout import vector_tiles
from lpsn_tvm.targets.vta.taps import AxisTap

if TYPE_CHECKING:
    from typing import Literal

    from lpsn_tvm.targets.vta.config import VtaConfig


@dataclass(frozen=True)
class PlacedWeights:
    """Where the tiles of one `Gemm` are: tile of (o, k, tap) = o * output_stride + k * input_stride + taps[tap]."""

    region: str
    output_stride: int
    input_stride: int
    taps: tuple[int, ...]


@dataclass
class ConstantPool:
    """Regions of weight, vector and constant data tiles by name; an array that exists already is not added again."""

    config: VtaConfig
    weights: dict[str, Array] = field(default_factory=dict)
    vectors: dict[str, Array] = field(default_factory=dict)
    data: dict[str, Array] = field(default_factory=dict)
    _known: dict[bytes, str] = field(default_factory=dict)

    def add_weights(self, name: str, tiles: Array) -> PlacedWeights:
        """Tiles int8[output blocks, input blocks, taps, BLOCK_OUT, BLOCK_IN]; axes along which all are equal collapse.

        Raises
        ------
        CompileError
            A weight does not fit the hardware's width.
        """
        limit = 1 << (self.config.wgt_bits - 1)
        if tiles.size and (tiles.min() < -limit or tiles.max() >= limit):
            raise CompileError(
                f"weights {tiles.min()}..{tiles.max()} do not fit {self.config.wgt_bits} bits", where=name
            )
        for axis in range(3):
            if tiles.shape[axis] > 1 and np.all(tiles == tiles.take([0], axis=axis)):
                tiles = tiles.take([0], axis=axis)
        outputs, inputs, taps = tiles.shape[:3]
        data = np.ascontiguousarray(tiles.reshape(-1, *tiles.shape[3:]).astype(np.int8))
        region = self._place("weight", self.weights, name, data)
        return PlacedWeights(
            region,
            0 if outputs == 1 else inputs * taps,
            0 if inputs == 1 else taps,
            (0,) if taps == 1 else tuple(range(taps)),
        )

    def add_vector(self, kind: Literal["add", "shr"], name: str, lanes: Array) -> Vector:
        """Per-lane operand, int32[lanes]."""
        tiles = vector_tiles(lanes.astype(np.int32), self.config.batch, self.config.block_out)
        return Vector(kind, self._place("vector", self.vectors, name, tiles), 0)

    def add_data(self, name: str, tiles: Array) -> str:
        """Region of constant data tiles int8[tiles, BATCH, BLOCK_IN], to be read as a source."""
        return self._place("data", self.data, name, np.ascontiguousarray(tiles.astype(np.int8)))

    def _place(self, role: str, regions: dict[str, Array], name: str, data: Array) -> str:
        key = hashlib.sha256(repr((role, data.shape, str(data.dtype))).encode() + data.tobytes()).digest()
        if key not in self._known:
            unique, count = name, 1
            while any(unique in taken for taken in (self.weights, self.vectors, self.data)):
                unique, count = f"{name}.{count}", count + 1
            regions[unique] = data
            self._known[key] = unique
        return self._known[key]


@dataclass(frozen=True)
class Arranged:
    """Weight tiles int8[output blocks, fan_in, taps, BLOCK_OUT, BLOCK_IN] and each output block's first input block."""

    tiles: Array
    first_input: tuple[int, ...]

    @property
    def fan_in(self) -> int:
        """Input blocks per output block."""
        return int(self.tiles.shape[1])


def arrange(
    weight: Array, groups: int, source: Form, result: Form, taps: list[tuple[AxisTap, AxisTap]], block: int
) -> Arranged:
    """`weight` int[O, C / groups, kh, kw] in the order of tiles, for the forms of what it reads and what it makes."""
    if groups == 1 and source.is_one_pixel and result.is_one_pixel:
        return _arrange_pixels(weight, source, result, taps, block)
    per_input, per_output = weight.shape[1], weight.shape[0] // groups
    blocks, inputs = result.lanes // block, source.lanes // block
    group_of = np.where(source.channel_array >= 0, source.channel_array // per_input, -1).reshape(inputs, block)
    reads = []
    for o in range(blocks):
        channels = result.channel_array[o * block : (o + 1) * block]
        wanted = np.unique(channels[channels >= 0] // per_output)
        found = np.flatnonzero(np.isin(group_of, wanted).any(axis=1))
        reads.append((int(found[0]), int(found[-1])) if found.size else (0, 0))
    fan_in = max(last - first + 1 for first, last in reads)
    firsts = tuple(min(first, inputs - fan_in) for first, _ in reads)
    tiles = np.zeros((blocks, fan_in, len(taps), block, block), np.int8)
    for o, first in enumerate(firsts):
        rows = _part(result, o * block, block)
        columns = _part(source, first * block, fan_in * block)
        for t, (tap_y, tap_x) in enumerate(taps):
            matrix = _matrix(weight, groups, rows, columns, tap_y, tap_x)
            tiles[o, :, t] = matrix.reshape(block, fan_in, block).transpose(1, 0, 2)
    return Arranged(tiles, firsts)


def _arrange_pixels(
    weight: Array, source: Form, result: Form, taps: list[tuple[AxisTap, AxisTap]], block: int
) -> Arranged:
    """All blocks at once, where lanes hold one pixel and every output reads every input."""
    blocks, inputs = result.lanes // block, source.lanes // block
    rows, columns = (np.flatnonzero(form.channel_array >= 0) for form in (result, source))
    channels = np.ix_(result.channel_array[rows], source.channel_array[columns])
    tiles = np.zeros((blocks, inputs, len(taps), block, block), np.int8)
    for t, (tap_y, tap_x) in enumerate(taps):
        matrix = np.zeros((result.lanes, source.lanes), np.int8)
        (_, r), (_, s) = tap_y.positions[0], tap_x.positions[0]
        matrix[np.ix_(rows, columns)] = weight[:, :, r, s][channels]
        tiles[:, :, t] = matrix.reshape(blocks, block, inputs, block).transpose(0, 2, 1, 3)
    return Arranged(tiles, (0,) * blocks)


def _part(form: Form, start: int, count: int) -> tuple[Array, Array, Array]:
    """Channels, dy and dx of `count` lanes."""
    stop = start + count
    return form.channel_array[start:stop], np.asarray(form.dy[start:stop]), np.asarray(form.dx[start:stop])


def _matrix(
    weight: Array,
    groups: int,
    rows: tuple[Array, Array, Array],
    columns: tuple[Array, Array, Array],
    tap_y: AxisTap,
    tap_x: AxisTap,
) -> Array:
    """int[lanes of the result, lanes of the source] of one tap."""
    per_input, per_output = weight.shape[1], weight.shape[0] // groups
    out, inside = rows[0][:, None], columns[0][None, :]
    r = _position(tap_y, rows[1], columns[1])
    s = _position(tap_x, rows[2], columns[2])
    channel = inside - (np.maximum(out, 0) // per_output) * per_input
    is_used = (out >= 0) & (inside >= 0) & (channel >= 0) & (channel < per_input) & (r >= 0) & (s >= 0)
    zero = np.zeros((), np.int64)
    index = (np.where(is_used, a, zero) for a in (out, channel, r, s))
    return np.where(is_used, weight[tuple(index)], 0)


def _position(tap: AxisTap, out: Array, inside: Array) -> Array:
    """Kernel position of each pair of lanes, -1 where there is none; one number where lanes hold one pixel only."""
    result = np.full((out.size, inside.size), -1, np.int64)
    for (e, d), r in tap.positions:
        result[(out == e)[:, None] & (inside == d)[None, :]] = r
    return result
