"""Sums over windows as TE expressions: what one output of a convolution (plain, transposed, integer, float) adds up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lpsn_tvm.schedules.pooling import Window
from lpsn_tvm.schedules.views import View

Term = Callable[..., Any]
"""(n, c, y, x) -> `te.sum` or `te.max` of one output element."""


def pair(values: Any) -> tuple[int, int]:
    """Two integers."""
    return int(values[0]), int(values[1])


def convolution_window(shape: tuple[int, ...], kernel: Any, attrs: Mapping[str, Any]) -> Window:
    """The window of a convolution over a tensor of `shape`."""
    strides, dilation = pair(attrs["strides"]), pair(attrs.get("dilation", (1, 1)))
    padding = [int(p) for p in attrs["padding"]]
    size = [
        (shape[2 + i] + padding[i] + padding[i + 2] - dilation[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        for i in (0, 1)
    ]
    return Window(pair(kernel), strides, dilation, pair(padding), pair(size))


def transposed_window(shape: tuple[int, ...], kernel: Any, attrs: Mapping[str, Any]) -> Window:
    """The window of a transposed convolution; `padding` is what is cut off at the top and left."""
    strides, dilation = pair(attrs["strides"]), pair(attrs.get("dilation", (1, 1)))
    padding, beyond = [int(p) for p in attrs["padding"]], pair(attrs.get("output_padding", (0, 0)))
    size = [
        (shape[2 + i] - 1) * strides[i] + dilation[i] * (kernel[i] - 1) + 1 + beyond[i] - padding[i] - padding[i + 2]
        for i in (0, 1)
    ]
    return Window(pair(kernel), strides, dilation, pair(padding), pair(size))


def axes(window: Window) -> tuple[Any, Any]:
    """Reduction axes over the rows and columns of a window."""
    from tvm import te

    return te.reduce_axis((0, window.kernel[0]), "ry"), te.reduce_axis((0, window.kernel[1]), "rx")


def tap(
    x: View,
    window: Window,
    index: tuple[Any, Any, Any, Any],
    row: Any,
    column: Any,
    fill: Any,
    function: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """`function` of the pixel under one position of a window, or `fill` where that lies outside the tensor."""
    from tvm import tirx

    n, c, y, z = index
    height, width = x.spec.shape[2:]
    at_y = y * window.strides[0] + row * window.dilation[0] - window.padding[0]
    at_z = z * window.strides[1] + column * window.dilation[1] - window.padding[1]
    conditions = inside(window, (height, width), (at_y, at_z), window.reach)
    value = function(x(n, c, at_y, at_z))
    return tirx.if_then_else(tirx.all(*conditions), value, fill) if conditions else value


def inside(window: Window, size: tuple[int, ...], place: tuple[Any, Any], reach: tuple[int, int]) -> list[Any]:
    """What must hold for a row and column to lie in a tensor of that size, as far as it is not certain; `reach` is the
    padded height and width that reads touch.
    """
    conditions = []
    for axis in (0, 1):
        if window.padding[axis]:
            conditions.append(place[axis] >= 0)
        if reach[axis] - window.padding[axis] > size[axis]:
            conditions.append(place[axis] < size[axis])
    return conditions


def convolution_term(
    x: View, window: Window, depth: int, product: Callable[..., tuple[Any, Any]], fill: Any, dtype: str
) -> Term:
    """Products summed over `depth` input channels and the window; `product(c, k, row, column)` is (input channel,
    weight), padding counts as `fill`.
    """
    from tvm import te

    inner = te.reduce_axis((0, depth), "k")
    rows, columns = axes(window)

    def term(n: Any, c: Any, y: Any, z: Any) -> Any:
        channel, weight = product(c, inner, rows, columns)
        pixel = tap(x, window, (n, channel, y, z), rows, columns, fill, lambda value: value.astype(dtype))
        return te.sum(pixel * weight.astype(dtype), axis=[inner, rows, columns])

    return term


def transposed_term(x: View, w: Any, window: Window, groups: tuple[int, int, int], zero_point: Any, dtype: str) -> Term:
    """What reaches one output of a transposed convolution: `x - zero_point` times the weight [k, row, column, output
    channel]; `groups` is (count, output channels of one, input channels of one).
    """
    from tvm import te, tirx

    count, per_group, depth = groups
    inner = te.reduce_axis((0, depth), "k")
    rows, columns = axes(window)

    def term(n: Any, c: Any, y: Any, z: Any) -> Any:
        group = tirx.min(tirx.floordiv(c, per_group), count - 1) if count > 1 else 0
        place = [
            at + window.padding[i] - step * window.dilation[i] for i, (at, step) in enumerate(((y, rows), (z, columns)))
        ]
        conditions = []
        for i in (0, 1):
            conditions += [place[i] >= 0, place[i] < x.spec.shape[2 + i] * window.strides[i]]
            if window.strides[i] > 1:
                conditions.append(tirx.floormod(place[i], window.strides[i]) == 0)
        source = [tirx.floordiv(place[i], window.strides[i]) for i in (0, 1)]
        pixel = x(n, group * depth + inner, *source).astype(dtype) - zero_point
        taken = tirx.if_then_else(tirx.all(*conditions), pixel, tirx.const(0, dtype))
        return te.sum(taken * w[inner, rows, columns, c].astype(dtype), axis=[inner, rows, columns])

    return term
