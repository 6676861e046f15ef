"""Padding with a number z that is not zero (activations stored with an offset): what it adds to the sums at a border.

Taps never visit padding, so a sum lacks `z * sum of the weights that lie outside the image`. How much that is depends
on the output channel and on which kernel rows and columns are outside, which is the same along whole edges. So results
fall into few classes (3x3, padding 1: four edges and four corners), and each class gets its constant per channel from
products with constant tiles, a micro-operation or two per border position:

    constant = 1 * w0 + (-8) * w1 + (-8) * w2 + ...        4 bits: lanes of the data hold 1, -8, -8, ..., |w| <= 8

Visiting the missing taps instead would take `fan_in * taps` micro-operations each, 22 % more in a 3x3 layer on 7 x 7.
A class needs few of a tile's lanes, hence classes share weight tiles; each has a data tile of 0 in the others' lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Span, Tap
from lpsn_tvm.targets.vta.forms import Array, Form
from lpsn_tvm.targets.vta.gemm import Rectangle, Windows
from lpsn_tvm.targets.vta.lower_context import Context
from lpsn_tvm.targets.vta.taps import Window

Missing = dict[int, list[int]]
"""Kernel positions outside the image along one axis, by the offset of a pixel in its tile."""


@dataclass(frozen=True)
class _Class:
    """Tiles with the same kernel positions outside the image: their rows, columns, and constant per lane."""

    rows: Span
    columns: Span
    constants: Array


@dataclass(frozen=True)
class _Digits:
    """A class's constants as lanes of data times weights: int[n] and int[n, lanes of the result]."""

    data: Array
    weights: Array


def padding_steps(
    context: Context,
    name: str,
    weight: Array,
    windows: Windows,
    extents: tuple[int, int],
    result: Rectangle,
    value: int,
) -> list[Gemm]:
    """What padding of `value` adds to a convolution's sums, on top of taps that leave padding out: one `Gemm`, or
    nothing where no tap with a weight other than 0 lies outside the image.

    Parameters
    ----------
    context : Context
        Its pool takes the constants.
    name : str
        Of the layer.
    weight : ndarray
        int[O, C / groups, kh, kw].
    windows : (Window, Window)
        Along y and x, not transposed.
    extents : (height, width)
        Of the layer's input, in pixels.
    result : Rectangle
        The accumulators.
    value : int
        What padding holds.
    """
    if value == 0:
        return []
    rows, columns = (_outside(windows[axis], extents[axis], result, axis) for axis in (0, 1))
    sums = value * weight.sum(axis=1, dtype=np.int64)
    classes = [c for c in _classes(sums, rows, columns, result.form) if np.any(c.constants)]
    return [_products(context, name, classes, result)] if classes else []


def _products(context: Context, name: str, classes: list[_Class], result: Rectangle) -> Gemm:
    """Adds every class's constants to its accumulators; first products of all classes first, so that no accumulator
    recurs too early.
    """
    config, block = context.config, context.block
    packed = _Packed(block, result.form.lanes)
    placed = [packed.add(_digits(c.constants, config.inp_bits, config.wgt_bits)) for c in classes]
    batches = context.batches(result.image[0])
    data = np.broadcast_to(np.stack(packed.data)[None, :, None], (batches, len(packed.data), config.batch, block))
    region = context.pool.add_data(f"{name}.padding", data.reshape(-1, config.batch, block))
    tiles = np.stack(packed.weights, axis=1)[:, None]
    at = context.pool.add_weights(f"{name}.border", tiles)
    offsets = at.taps if len(at.taps) > 1 else at.taps * len(packed.weights)
    taps = [
        Tap(one.rows, one.columns, Span(0, 0, one.rows.count), Span(source, 0, one.columns.count), offsets[tile])
        for turn in range(max(len(parts) for parts in placed))
        for one, parts in zip(classes, placed, strict=True)
        for source, tile in parts[turn : turn + 1]
    ]
    plane = Plane.dense(region, 0, batches, 1, 1, len(packed.data))
    return Gemm(plane, tuple(taps), at.region, 0, at.output_stride, 0, 1, (0,) * len(tiles))


def _outside(window: Window, extent: int, result: Rectangle, axis: int) -> list[tuple[Span, Missing]]:
    """Runs of tiles along one axis with the same kernel positions outside the image. These sets only shrink at one
    end and only grow at the other, so equal ones are neighbours.
    """
    runs: list[tuple[Span, Missing]] = []
    for i in range(result.tiles[axis]):
        missing = {}
        for offset in result.form.offsets[axis]:
            first = (i * result.form.steps[axis] + offset) * window.stride - window.padding
            pixels = enumerate(first + r * window.dilation for r in range(window.kernel))
            missing[offset] = [r for r, pixel in pixels if not 0 <= pixel < extent]
        if runs and runs[-1][1] == missing:
            runs[-1] = (Span(runs[-1][0].start, 1, runs[-1][0].count + 1), missing)
        else:
            runs.append((Span(i, 1, 1), missing))
    return runs


def _classes(
    sums: Array, rows: list[tuple[Span, Missing]], columns: list[tuple[Span, Missing]], form: Form
) -> Iterator[_Class]:
    """Every pair of runs; `sums` int[O, kh, kw] is what each kernel position adds when it is outside."""
    total, dy, dx = sums.sum(axis=(1, 2)), np.asarray(form.dy), np.asarray(form.dx)
    for row_span, without_rows in rows:
        for column_span, without_columns in columns:
            constants = np.zeros(form.lanes, np.int64)
            for (y, no_rows), (x, no_columns) in product(without_rows.items(), without_columns.items()):
                inside = np.delete(np.delete(sums, no_rows, axis=1), no_columns, axis=2).sum(axis=(1, 2))
                constants += np.where((dy == y) & (dx == x), form.per_lane(total - inside), 0)
            yield _Class(row_span, column_span, constants)


def _digits(constants: Array, data_bits: int, weight_bits: int) -> _Digits:
    """int[lanes] as a sum of few data values times weights: 1, powers of what a weight counts to, and as often as it
    takes the most negative datum, whose products are the largest.
    """
    largest, half = 1 << (data_bits - 1), 1 << (weight_bits - 1)
    units = [1]
    while units[-1] * 2 * half < largest:
        units.append(units[-1] * 2 * half)
    rest, weights = np.asarray(constants, np.int64), []
    for unit, above in zip(units, [*units[1:], largest], strict=True):
        base = above // unit
        digit = (rest + base // 2) % base - base // 2
        weights.append(digit)
        rest = (rest - digit) // base
    rest, data = -rest, list(units)
    while np.any(rest):
        weights.append(np.clip(rest, -half, half - 1))
        rest = rest - weights[-1]
        data.append(-largest)
    used = [index for index, digit in enumerate(weights) if np.any(digit)]
    return _Digits(np.array([data[i] for i in used]), np.stack([weights[i] for i in used]))


class _Packed:
    """Weight tiles int[blocks, BLOCK_OUT, BLOCK_IN] whose lanes several classes share, and data tiles int[BLOCK_IN]."""

    def __init__(self, block: int, lanes: int) -> None:
        self.block, self.blocks = block, lanes // block
        self.data: list[Array] = []
        self.weights: list[Array] = []
        self._known: dict[bytes, int] = {}
        self._free = 0

    def add(self, digits: _Digits) -> list[tuple[int, int]]:
        """Pairs (data tile, weight tile) whose products are the class's constants."""
        pairs, count = [], len(digits.data)
        if count > self._free:
            self._free = 0
        for start in range(0, count, self.block):
            size = min(self.block, count - start)
            if size > self._free:
                self.weights.append(np.zeros((self.blocks, self.block, self.block), np.int64))
                self._free = self.block
            first = self.block - self._free
            lanes, part = slice(first, first + size), slice(start, start + size)
            self.weights[-1][:, :, lanes] = digits.weights[part].T.reshape(self.blocks, self.block, size)
            pairs.append((self._data_tile(lanes, digits.data[part]), len(self.weights) - 1))
            self._free -= size
        return pairs

    def _data_tile(self, lanes: slice, values: Sequence[int] | Array) -> int:
        tile = np.zeros(self.block, np.int8)
        tile[lanes] = values
        if tile.tobytes() not in self._known:
            self._known[tile.tobytes()] = len(self.data)
            self.data.append(tile)
        return self._known[tile.tobytes()]
