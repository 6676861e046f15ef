"""`Gemm` steps from weights in the graph's layout: kernel positions become taps, weights are arranged for the forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lpsn_tvm.schedules.vta.ops import Gemm, Scalar, Step, Store, Tap, TileOp
from lpsn_tvm.targets.vta.forms import Array, Form, Image, Value
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped
from lpsn_tvm.targets.vta.split_taps import split_taps
from lpsn_tvm.targets.vta.taps import AxisTap, Side, Window, axis_taps
from lpsn_tvm.targets.vta.weights import Arranged, arrange

Windows = tuple[Window, Window]
IDENTITY: Windows = (Window(), Window())


@dataclass(frozen=True)
class Rectangle:
    """The accumulators of an operator: what their lanes mean, pixels of the variable, tiles."""

    image: Image
    form: Form
    tiles: tuple[int, int]

    @classmethod
    def plain(cls, image: Image, block: int) -> Rectangle:
        """One pixel per tile, channels in order."""
        return cls(image, Form.plain(image[1], block), image[2:])

    @classmethod
    def of(cls, value: Value) -> Rectangle:
        """As the value lies in memory."""
        return cls(value.image, value.form, (value.plane.height, value.plane.width))


def gemm(
    context: Context, name: str, source: Value, result: Rectangle, windows: Windows, weight: Array, groups: int = 1
) -> Gemm:
    """`weight` int[O, C / groups, kh, kw] times `source`, summed into `result`.

    A source in a form that cannot give the result is copied into plain form first.

    Raises
    ------
    CompileError
        A weight does not fit the hardware's width.
    """
    runs = _runs(source, result, windows)
    if runs is None:
        source = plain_copy(context, source)
        runs = _runs(source, result, windows)
        if runs is None:
            raise Unmapped(f"the form of {source.name} does not suit it")
    pairs = [(y, x) for y in runs[0] for x in runs[1]]
    arranged = arrange(weight, groups, source.form, result.form, pairs, context.block)
    return _placed(context, name, source, arranged, pairs)


def channel_gemms(
    context: Context, name: str, source: Value, result: Rectangle, windows: Windows, factors: Array, kernel: Array
) -> list[Step]:
    """Every channel times `factors[c]` and a kernel of ones and zeros int[kh, kw], summed into the accumulators, which
    must hold nothing yet where a factor does not fit a weight (they are doubled in between). Factors int[C] are not
    negative.
    """
    digits = _digits(factors, context.config.wgt_bits)
    channels = source.image[1]
    steps: list[Step] = []
    for index, digit in enumerate(digits):
        if index:
            steps += [Scalar("double")] * (context.config.wgt_bits - 1)
        if not np.any(digit):
            continue
        if digit.min() == digit.max() and source.form == result.form and source.form.is_one_pixel:
            steps.append(shared_diagonal(context, source, result, windows, int(digit[0])))
            continue
        weight = digit.reshape(channels, 1, 1, 1) * kernel
        steps.append(gemm(context, f"{name}.factors", source, result, windows, weight, groups=channels))
    return steps


def scaled_identity(context: Context, name: str, source: Value, result: Rectangle, exponents: Array) -> list[Step]:
    """Every channel times `2**exponents[c]`, added to whatever the accumulators hold; what exceeds a weight is added
    several times.
    """
    largest = context.config.wgt_bits - 2
    excess = np.maximum(np.asarray(exponents, np.int64) - largest, 0)
    steps: list[Step] = []
    for extra in np.unique(excess):
        factors = np.where(excess == extra, np.int64(1) << (exponents - extra).clip(0), 0)
        terms = channel_gemms(context, name, source, result, IDENTITY, factors, np.ones((1, 1), np.int64))
        steps += [replace(term, passes=1 << int(extra)) for term in terms if isinstance(term, Gemm)]
    return steps


def _digits(factors: Array, bits: int) -> list[Array]:
    """Digits of base 2**(bits - 1), most significant first: those that a weight holds."""
    digits, base = [], 1 << (bits - 1)
    rest = np.asarray(factors, np.int64)
    while True:
        digits.append(rest % base)
        rest = rest // base
        if not np.any(rest):
            return digits[::-1]


def shared_diagonal(context: Context, source: Value, result: Rectangle, windows: Windows, factor: int) -> Gemm:
    """One diagonal tile for all blocks and kernel positions, between equal forms of one pixel per tile (empty lanes are
    anything).
    """
    runs = _runs(source, result, windows)
    if runs is None:
        raise Unmapped(f"the form of {source.name} does not suit it")
    pairs = [(y, x) for y in runs[0] for x in runs[1]]
    tile = np.eye(context.block, dtype=np.int64) * factor
    blocks = source.form.lanes // context.block
    arranged = Arranged(np.broadcast_to(tile, (1, 1, max(1, len(pairs)), *tile.shape)), tuple(range(blocks)))
    return _placed(context, f"identity.{factor}", source, arranged, pairs)


def _runs(source: Value, result: Rectangle, windows: Windows) -> tuple[tuple[AxisTap, ...], tuple[AxisTap, ...]] | None:
    if not source.form.is_complete:
        return None
    taps = []
    for axis, window in enumerate(windows):
        tiles = (source.plane.height, source.plane.width)[axis]
        inside = Side(
            source.image[2 + axis],
            tiles,
            source.form.steps[axis],
            source.form.offsets[axis],
            source.form.is_zero_outside,
        )
        outside = Side(result.image[2 + axis], result.tiles[axis], result.form.steps[axis], result.form.offsets[axis])
        taps.append(axis_taps(window, inside, outside))
    return None if taps[0] is None or taps[1] is None else (taps[0], taps[1])


def _placed(
    context: Context, name: str, source: Value, arranged: Arranged, pairs: Sequence[tuple[AxisTap, AxisTap]]
) -> Gemm:
    placed = context.pool.add_weights(name, arranged.tiles)
    offsets = placed.taps if len(placed.taps) > 1 else placed.taps * len(pairs)
    taps = tuple(Tap(y.dst, x.dst, y.src, x.src, offset) for (y, x), offset in zip(pairs, offsets, strict=True))
    return Gemm(
        source.plane,
        taps,
        placed.region,
        0,
        placed.output_stride,
        placed.input_stride,
        arranged.fan_in,
        arranged.first_input,
    )


def covers(steps: Sequence[Step], tiles: tuple[int, int]) -> bool:
    """Whether every accumulator tile is written by some tap."""
    touched = np.zeros(tiles, bool)
    for step in steps:
        for tap in step.taps if isinstance(step, Gemm) else ():
            y, x = tap.dst_y, tap.dst_x
            rows = y.start + y.step * np.arange(y.count)
            touched[rows[:, None], x.start + x.step * np.arange(x.count)] = True
    return bool(touched.all())


def operator(name: str, context: Context, result: Rectangle, steps: Sequence[Step], macs: int = 0) -> TileOp:
    """The `TileOp` of `steps`; where no tap writes an accumulator, an ALU operation does (only written ones may be
    stored).
    """
    first_store = next(i for i, step in enumerate(steps) if isinstance(step, Store))
    body = list(steps)
    if all(isinstance(step, Gemm) for step in body[:first_store]) and not covers(body, result.tiles):
        body.insert(first_store, Scalar("add", 0))
    blocks = result.form.lanes // context.block
    op = TileOp(name, context.batches(result.image[0]), blocks, *result.tiles, tuple(body), macs)
    return split_taps(op, context.config)


def plain_copy(context: Context, value: Value) -> Value:
    """The same variable in plain form, copied once."""
    if value.is_plain:
        return value
    region = context.new_region(f"{value.name}.plain", "", value.image)
    copy = context.plain_value(value.name, region, value.image, value.low, value.high)
    copy_into(context, region, value, copy)
    if context.values.get(value.name) == value:
        context.values[value.name] = copy
    return copy


def copy_into(context: Context, name: str, source: Value, target: Value) -> None:
    """Emit `target = source`, element by element."""
    result = Rectangle.of(target)
    ones = np.ones(source.image[1], np.int64)
    steps = channel_gemms(context, name, source, result, IDENTITY, ones, np.ones((1, 1), np.int64))
    context.emit(operator(name, context, result, [*steps, Store(target.plane)]))
