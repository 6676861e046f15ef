"""Max, average and global average pooling, integer and float, on blocked or plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import elementwise_kernel, schedule_reduction
from lpsn_tvm.schedules.rounding import output_range, parameters, to_integer
from lpsn_tvm.schedules.views import View, compute, placeholder, prim_func

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


@dataclass(frozen=True)
class Window:
    """A pooling window over one tensor: `padding` is top and left, `size` the output's height and width."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    size: tuple[int, int]

    @property
    def reach(self) -> tuple[int, int]:
        """Height and width of the padded input that windows touch."""
        height, width = (
            (o - 1) * s + (k - 1) * d + 1
            for o, s, k, d in zip(self.size, self.strides, self.kernel, self.dilation, strict=True)
        )
        return height, width


def window_of(shape: tuple[int, ...], attrs: Attrs) -> Window:
    """The window that the attributes of a pooling operator describe."""
    kernel, strides, padding = tuple(attrs["kernel"]), tuple(attrs["strides"]), tuple(attrs["padding"])
    dilation = tuple(attrs.get("dilation", (1, 1)))
    size = []
    for axis in (0, 1):
        room = shape[2 + axis] + padding[axis] + padding[axis + 2] - dilation[axis] * (kernel[axis] - 1) - 1
        size.append((room + (strides[axis] - 1 if attrs.get("ceil_mode") else 0)) // strides[axis] + 1)
    return Window(kernel, strides, dilation, padding[:2], (size[0], size[1]))


def max_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.max_pool2d` and `lpsn.float_max_pool2d`."""
    from tvm import tirx

    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), data.dtype, data.block)

    def define(x: View) -> Any:
        source = _padded(x, window, tirx.min_value(data.dtype))
        return compute(out, lambda n, c, y, x_: reduce(tirx.max, _taps(source, window, n, c, y, x_)))

    return elementwise_kernel("max_pool2d", (data,), (), out, define, window)


def avg_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.avg_pool2d`: int32 sum of `x - zero point`, times a factor per output pixel, requantized."""
    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), str(attrs["out_dtype"]), data.block)
    # The same division as the reference, done once.
    factor = np.float32(attrs["multiplier"]) / counts(data.shape, window, attrs)
    numbers = parameters(attrs["in_zero_point"], *output_range(attrs))

    def define(x: View, factors: Any, p: Any) -> Any:
        zero_point = p[0].astype("int32")
        source = _padded(x, window, zero_point.astype(data.dtype))

        def value(n: Any, c: Any, y: Any, x_: Any) -> Any:
            taps = [tap.astype("int32") for tap in _taps(source, window, n, c, y, x_)]
            total = _sum(taps) - zero_point * len(taps)
            return to_integer(total.astype("float32") * factors[y, x_], p[1], p[2], p[3], out.dtype)

        return compute(out, value)

    return elementwise_kernel("avg_pool2d", (data,), (factor, numbers), out, define, window)


def float_avg_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_avg_pool2d`."""
    from tvm import tirx

    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), "float32", data.block)
    factor = np.float32(1) / counts(data.shape, window, attrs)

    def define(x: View, factors: Any) -> Any:
        source = _padded(x, window, tirx.const(0.0, "float32"))
        return compute(out, lambda n, c, y, x_: _sum(_taps(source, window, n, c, y, x_)) * factors[y, x_])

    return elementwise_kernel("float_avg_pool2d", (data,), (factor,), out, define, window)


def counts(shape: tuple[int, ...], window: Window, attrs: Attrs) -> Array:
    """float32[OH, OW]: how many pixels each window averages, at least 1."""
    padding = attrs["padding"]
    real = []
    for axis in (0, 1):
        extent, before, after = shape[2 + axis], padding[axis], padding[axis + 2]
        first, last = (-before, extent + after) if attrs.get("count_include_pad") else (0, extent)
        start = np.arange(window.size[axis]) * window.strides[axis] - before
        real.append(np.maximum(0, np.minimum(start + window.kernel[axis], last) - np.maximum(start, first)))
    return np.maximum(np.outer(real[0], real[1]), 1).astype(np.float32)


def global_avg_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.global_avg_pool2d`."""
    data = inputs[0]
    out = TensorSpec((*data.shape[:2], 1, 1), str(attrs["out_dtype"]), data.block)
    pixels = data.shape[2] * data.shape[3]
    numbers = parameters(attrs["multiplier"], attrs["in_zero_point"], *output_range(attrs))

    def finish(total: Any, p: Any) -> Any:
        shifted = total - p[1].astype("int32") * pixels
        return to_integer(shifted.astype("float32") * p[0], p[2], p[3], p[4], out.dtype)

    return _global_sum("global_avg_pool2d", data, out, "int32", numbers, finish)


def float_global_avg_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_global_avg_pool2d`."""
    data = inputs[0]
    out = TensorSpec((*data.shape[:2], 1, 1), "float32", data.block)
    numbers = parameters(1.0 / (data.shape[2] * data.shape[3]))
    return _global_sum("float_global_avg_pool2d", data, out, "float32", numbers, lambda total, p: total * p[0])


def _global_sum(
    name: str, data: TensorSpec, out: TensorSpec, dtype: str, numbers: Array, finish: Callable[[Any, Any], Any]
) -> Kernel:
    """Sum over H and W, then `finish(total, numbers)`."""

    def build() -> Any:
        from tvm import te

        x = placeholder(data, "x")
        p = te.placeholder(numbers.shape, "float32", name="p")
        view = View(x, data)
        rows, columns = te.reduce_axis((0, data.shape[2]), "ry"), te.reduce_axis((0, data.shape[3]), "rx")
        total = TensorSpec(out.shape, dtype, out.block)
        acc = compute(
            total, lambda n, c, y, x_: te.sum(view(n, c, rows, columns).astype(dtype), axis=[rows, columns]), "acc"
        )
        sums = View(acc, total)
        return schedule_reduction(prim_func([x, p, compute(out, lambda *i: finish(sums(*i), p))]), out)

    return Kernel(build, (numbers,), out, (name, data, out), (data,))


def _sum(values: list[Any]) -> Any:
    return reduce(lambda a, b: a + b, values)


def _padded(x: View, window: Window, fill: Any) -> View:
    """The input with `fill` around it, as far as windows reach."""
    from tvm import tirx

    n, c, height, width = x.spec.shape
    (top, left), (tall, wide) = window.padding, window.reach
    if not top and not left and tall <= height and wide <= width:
        return x
    spec = TensorSpec((n, c, tall, wide), x.spec.dtype, x.spec.block)

    def value(b: Any, channel: Any, y: Any, z: Any) -> Any:
        inside = tirx.all(y >= top, y < height + top, z >= left, z < width + left)
        return tirx.if_then_else(inside, x(b, channel, y - top, z - left), fill)

    return View(compute(spec, value, "pad"), spec)


def _taps(source: View, window: Window, n: Any, c: Any, y: Any, x: Any) -> list[Any]:
    """The pixels of one window."""
    (sh, sw), (dh, dw) = window.strides, window.dilation
    return [
        source(n, c, y * sh + r * dh, x * sw + s * dw) for r in range(window.kernel[0]) for s in range(window.kernel[1])
    ]
