"""Max, average and global average pooling, integer and float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.block_reduction import block_sum
from lpsn_tvm.schedules.cuda.threads import element_kernel, reduction
from lpsn_tvm.schedules.cuda.window_sums import Term, axes, tap
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.pooling import Window, counts, window_of
from lpsn_tvm.schedules.rounding import output_range, parameters, to_integer
from lpsn_tvm.schedules.views import View

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


def max_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.max_pool2d` and of the float maximum."""
    from tvm import te, tirx

    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), data.dtype, data.block)

    def define(x: View) -> Any:
        rows, columns = axes(window)

        def value(n: Any, c: Any, y: Any, z: Any) -> Any:
            return te.max(tap(x, window, (n, c, y, z), rows, columns, tirx.min_value(data.dtype)), axis=[rows, columns])

        return reduction(out, data.dtype, value, lambda largest, *index: largest)

    return element_kernel("max_pool2d", (data,), (), out, define, window, is_reduction=True)


def avg_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.avg_pool2d`: int32 sum of `x - zero point`, times a factor per output pixel, requantized."""
    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), str(attrs["out_dtype"]), data.block)
    # The same division as the reference, done once.
    factor = np.float32(attrs["multiplier"]) / counts(data.shape, window, attrs)
    numbers = parameters(attrs["in_zero_point"], *output_range(attrs))

    def define(x: View, factors: Any, p: Any) -> Any:
        term = _window_sum(x, window, "int32", lambda value: value.astype("int32") - p[0].astype("int32"))

        def finish(total: Any, n: Any, c: Any, y: Any, z: Any) -> Any:
            return to_integer(total.astype("float32") * factors[y, z], p[1], p[2], p[3], out.dtype)

        return reduction(out, "int32", term, finish)

    return element_kernel("avg_pool2d", (data,), (factor, numbers), out, define, window, is_reduction=True)


def float_avg_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_avg_pool2d`."""
    data = inputs[0]
    window = window_of(data.shape, attrs)
    out = TensorSpec((*data.shape[:2], *window.size), "float32", data.block)
    factor = np.float32(1) / counts(data.shape, window, attrs)

    def define(x: View, factors: Any) -> Any:
        term = _window_sum(x, window, "float32", lambda value: value)
        return reduction(out, "float32", term, lambda total, n, c, y, z: total * factors[y, z])

    return element_kernel("float_avg_pool2d", (data,), (factor,), out, define, window, is_reduction=True)


def _window_sum(x: View, window: Window, dtype: str, function: Callable[[Any], Any]) -> Term:
    from tvm import te, tirx

    rows, columns = axes(window)

    def value(n: Any, c: Any, y: Any, z: Any) -> Any:
        term = tap(x, window, (n, c, y, z), rows, columns, tirx.const(0, dtype), function)
        return te.sum(term, axis=[rows, columns])

    return value


def global_avg_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.global_avg_pool2d`."""
    data = inputs[0]
    out = TensorSpec((*data.shape[:2], 1, 1), str(attrs["out_dtype"]), data.block)
    pixels = data.shape[2] * data.shape[3]
    numbers = parameters(attrs["multiplier"], attrs["in_zero_point"], *output_range(attrs))

    def finish(total: Any, p: Any) -> Any:
        shifted = total - p[1].astype("int32") * pixels
        return to_integer(shifted.astype("float32") * p[0], p[2], p[3], p[4], out.dtype)

    return block_sum("global_avg_pool2d", data, out, "int32", numbers, finish)


def float_global_avg_pool2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_global_avg_pool2d`."""
    data = inputs[0]
    out = TensorSpec((*data.shape[:2], 1, 1), "float32", data.block)
    numbers = parameters(1.0 / (data.shape[2] * data.shape[3]))
    return block_sum("float_global_avg_pool2d", data, out, "float32", numbers, lambda total, p: total * p[0])
