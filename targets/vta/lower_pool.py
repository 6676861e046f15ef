"""Poolings: maxima on the accumulators, averages as sums times a small integer and a shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lpsn_tvm.quant import integer_multiplier
from lpsn_tvm.schedules.vta.ops import Pool, Store
from lpsn_tvm.targets.vta.epilogue import add_steps, clamp_steps, rounding_of, shift_steps
from lpsn_tvm.targets.vta.forms import Value
from lpsn_tvm.targets.vta.gemm import IDENTITY, Rectangle, Windows, channel_gemms, operator
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped
from lpsn_tvm.targets.vta.lower_elementwise import check_rounding
from lpsn_tvm.targets.vta.taps import Window

MOST_RECTANGLES = 25
"""Averages whose windows differ in size run rectangle by rectangle; beyond this many the host is the better place."""

INT32_MAX = 2**31 - 1


def pool_step(node: Node) -> Pool:
    """The maximum over windows of a max_pool2d.

    Raises
    ------
    Unmapped
        Dilated windows, or windows that lie wholly in the padding.
    """
    attrs = node.attrs
    if tuple(attrs["dilation"]) != (1, 1):
        raise Unmapped("its windows are dilated")
    kernel, strides = _pair(attrs["kernel"]), _pair(attrs["strides"])
    padding = _pair(attrs["padding"][:2])
    if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
        raise Unmapped("some of its windows lie in the padding")
    return Pool(kernel, strides, padding, *node.shape[2:])


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def lower_max_pool2d(context: Context, node: Node) -> None:
    """A pooling of its own: the tensor goes through the accumulators with identity weights."""
    pool = pool_step(node)
    source = context.value(node.variable(0))
    _check_windows(pool, source)
    result = Rectangle.plain(source.image, context.block)
    ones = np.ones(source.image[1], np.int64)
    steps = channel_gemms(context, node.name, source, result, IDENTITY, ones, np.ones((1, 1), np.int64))
    target = context.new_tensor(node, source.low, source.high)
    context.emit(operator(node.name, context, result, [*steps, pool, Store(target.plane)]))


def _check_windows(pool: Pool, source: Value) -> None:
    """The last window begins within the rectangle."""
    for axis, tiles in enumerate((pool.height, pool.width)):
        if (tiles - 1) * pool.strides[axis] - pool.padding[axis] >= source.image[2 + axis]:
            raise Unmapped("some of its windows lie in the padding")


@dataclass(frozen=True)
class _Run:
    """Consecutive positions of one axis whose windows hold equally many pixels."""

    start: int
    count: int
    pixels: int


def lower_avg_pool2d(context: Context, node: Node) -> None:
    """Sum over windows times m, `+ 2**(t-1) >> t`: one operator per rectangle of windows of equal size."""
    check_rounding(node)
    attrs, source = node.attrs, context.value(node.variable(0))
    kernel, strides = _pair(attrs["kernel"]), _pair(attrs["strides"])
    padding = attrs["padding"]
    rows, columns = (
        _runs(
            node.shape[2 + axis],
            source.image[2 + axis],
            (kernel[axis], strides[axis]),
            (int(padding[axis]), int(padding[2 + axis])),
            bool(attrs["count_include_pad"]),
        )
        for axis in range(2)
    )
    if len(rows) * len(columns) > MOST_RECTANGLES:
        raise Unmapped(f"its windows have {len(rows) * len(columns)} different sizes")
    target = context.new_tensor(node, int(attrs["qmin"]), int(attrs["qmax"]))
    for y in rows:
        for x in columns:
            factor = np.float32(attrs["multiplier"]) / np.float32(max(1, y.pixels * x.pixels))
            windows = (
                Window(kernel[0], strides[0], int(padding[0]) - y.start * strides[0]),
                Window(kernel[1], strides[1], int(padding[1]) - x.start * strides[1]),
            )
            plane = replace(
                target.plane,
                base=y.start * target.plane.row_stride + x.start,
                height=y.count,
                width=x.count,
            )
            part = replace(target, image=(*target.image[:2], y.count, x.count), plane=plane)
            _average(context, node, source, part, windows, float(factor))


def lower_global_avg_pool2d(context: Context, node: Node) -> None:
    """One window."""
    check_rounding(node)
    source = context.value(node.variable(0))
    target = context.new_tensor(node, int(node.attrs["qmin"]), int(node.attrs["qmax"]))
    windows = (Window(source.image[2]), Window(source.image[3]))
    _average(context, node, source, target, windows, float(np.float32(node.attrs["multiplier"])))


def _runs(
    positions: int, pixels: int, window: tuple[int, int], padding: tuple[int, int], counts_padding: bool
) -> list[_Run]:
    """Positions along an axis, grouped by how many pixels their windows count."""
    kernel, stride = window
    first, last = (-padding[0], pixels + padding[1]) if counts_padding else (0, pixels)
    runs: list[_Run] = []
    for index in range(positions):
        start = index * stride - padding[0]
        count = max(0, min(start + kernel, last) - max(start, first))
        if runs and runs[-1].pixels == count:
            runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
        else:
            runs.append(_Run(index, 1, count))
    return runs


def _average(context: Context, node: Node, source: Value, target: Value, windows: Windows, factor: float) -> None:
    """`(sum * m + 2**(t-1)) >> t`, clamped."""
    try:
        multiplier, shift = integer_multiplier(factor)
    except ValueError as error:
        raise Unmapped(str(error)) from error
    result = Rectangle.of(target)
    kernel = np.ones((windows[0].kernel, windows[1].kernel), np.int64)
    amount = np.asarray([shift])
    weight, half = int(kernel.size) * multiplier, int(rounding_of(amount)[0])
    if max(-source.low, source.high) * weight + half > INT32_MAX:
        raise Unmapped(f"its sums of {kernel.size} numbers may leave int32")
    factors = np.full(source.image[1], multiplier, np.int64)
    steps = channel_gemms(context, node.name, source, result, windows, factors, kernel)
    steps += add_steps(context, node.name, result.form, rounding_of(amount))
    steps += shift_steps(context, node.name, result.form, amount)
    reach = (min(0, source.low) * weight + half) >> shift, (max(0, source.high) * weight + half) >> shift
    steps += clamp_steps(target.low, target.high, reach)
    context.emit(operator(node.name, context, result, [*steps, Store(target.plane)]))
