"""Max, average and global average pooling, integer and float, on blocked or plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Maker
from lpsn_tvm.schedules.rounding import output_range, parameters, to_integer


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


@dataclass(frozen=True)
class Pooling:
    """What an operator makes of the pixels under a window.

    Parameters
    ----------
    dtype : str
        Of the accumulator.
    is_maximum : bool
        The largest pixel; otherwise their sum.
    fill : callable (*constants) -> value of the data's type
        What a pixel outside the tensor counts as.
    finish : callable (accumulator, y, x, *constants) -> output, or None
        The output at pixel (y, x) from the maximum or sum, fills included; None where it is that itself.
    """

    dtype: str
    is_maximum: bool
    fill: Callable[..., Any]
    finish: Callable[..., Any] | None


def window_of(shape: tuple[int, ...], attrs: Attrs) -> Window:
    """The window that the attributes of a pooling operator describe."""
    kernel, strides, padding = tuple(attrs["kernel"]), tuple(attrs["strides"]), tuple(attrs["padding"])
    dilation = tuple(attrs.get("dilation", (1, 1)))
    size = []
    for axis in (0, 1):
        room = shape[2 + axis] + padding[axis] + padding[axis + 2] - dilation[axis] * (kernel[axis] - 1) - 1
        size.append((room + (strides[axis] - 1 if attrs.get("ceil_mode") else 0)) // strides[axis] + 1)
    return Window(kernel, strides, dilation, padding[:2], (size[0], size[1]))


def max_pool2d(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.max_pool2d` and `lpsn.float_max_pool2d`."""
    from tvm import tirx

    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), data.dtype, data.block)
    pooling = Pooling(data.dtype, True, lambda: tirx.min_value(data.dtype), None)
    return maker.pool("max_pool2d", data, (), out, window, pooling)


def avg_pool2d(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.avg_pool2d`: int32 sum of `x - zero point`, times a factor per output pixel, requantized."""
    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), str(attrs["out_dtype"]), data.block)
    # The same division as the reference, done once.
    factor = np.float32(attrs["multiplier"]) / counts(data.shape, window, attrs)
    numbers = parameters(attrs["in_zero_point"], *output_range(attrs))
    pixels = window.kernel[0] * window.kernel[1]

    def fill(factors: Any, p: Any) -> Any:
        return p[0].astype("int32").astype(data.dtype)

    def finish(total: Any, y: Any, x: Any, factors: Any, p: Any) -> Any:
        centred = total - p[0].astype("int32") * pixels
        return to_integer(centred.astype("float32") * factors[y, x], p[1], p[2], p[3], out.dtype)

    return maker.pool("avg_pool2d", data, (factor, numbers), out, window, Pooling("int32", False, fill, finish))


def float_avg_pool2d(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.float_avg_pool2d`."""
    from tvm import tirx

    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), "float32", data.block)
    factor = np.float32(1) / counts(data.shape, window, attrs)
    pooling = Pooling(
        "float32", False, lambda factors: tirx.const(0.0, "float32"), lambda total, y, x, factors: total * factors[y, x]
    )
    return maker.pool("float_avg_pool2d", data, (factor,), out, window, pooling)


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


def global_avg_pool2d(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.global_avg_pool2d`."""
    data = inputs[0]
    out = TensorSpec((*data.shape[:2], 1, 1), str(attrs["out_dtype"]), data.block)
    pixels = data.shape[2] * data.shape[3]
    numbers = parameters(attrs["multiplier"], attrs["in_zero_point"], *output_range(attrs))

    def finish(total: Any, p: Any) -> Any:
        shifted = total - p[1].astype("int32") * pixels
        return to_integer(shifted.astype("float32") * p[0], p[2], p[3], p[4], out.dtype)

    return maker.plane_sum("global_avg_pool2d", data, out, "int32", numbers, finish)


def float_global_avg_pool2d(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.float_global_avg_pool2d`."""
    data = inputs[0]
    out = TensorSpec((*data.shape[:2], 1, 1), "float32", data.block)
    numbers = parameters(1.0 / (data.shape[2] * data.shape[3]))
    return maker.plane_sum("float_global_avg_pool2d", data, out, "float32", numbers, lambda total, p: total * p[0])
