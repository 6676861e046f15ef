"""Weighted integer layers whatever they are, one thread per output or four output channels of a pixel: correct
everywhere, fast nowhere.

What still comes here: layers whose residual is not of the output's type, or that write floats and have a residual;
transposed convolutions with dilation, or in groups other than 1, 2 or 4 channels to as many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.epilogue import stored_tables
from lpsn_tvm.schedules.cuda.isa import BLOCK
from lpsn_tvm.schedules.cuda.threads import LANES, element_kernel, reduction
from lpsn_tvm.schedules.cuda.window_sums import (
    convolution_term,
    convolution_window,
    transposed_term,
    transposed_window,
)
from lpsn_tvm.schedules.kernel import Array, Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.pooling import Window
from lpsn_tvm.schedules.rounding import bounded, output_range, parameters, scaled, to_integer
from lpsn_tvm.schedules.views import View

ENOUGH_THREADS = 2048
"""Enough to keep a GPU's memory busy when each of them loads several vectors."""


def _padded(array: Array, width: int, dtype: str) -> Array:
    """The last axis filled with zeros up to `width`."""
    extra = width - array.shape[-1]
    return np.ascontiguousarray(np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, extra)]), dtype)


def _blocked(data: TensorSpec) -> TensorSpec:
    return data if data.block else data.with_block(BLOCK)


def _constants(weight: Array, constants: Constants, attrs: Attrs, out: TensorSpec) -> list[Array]:
    """Weight [..., O], bias, scale, all widened to whole blocks, the numbers of the epilogue, and its table if any."""
    width, channels = out.blocks * out.block, out.shape[1]
    scale = np.broadcast_to(np.asarray(constants["scale"], np.float32).reshape(-1), (channels,))
    numbers = parameters(
        attrs.get("x_zero_point", 0),
        *(output_range(attrs) if out.dtype != "float32" else (0, 0, 0)),
        attrs.get("residual_multiplier", 0.0),
        attrs.get("residual_zero_point", 0),
    )
    return [
        _padded(weight, width, "int8"),
        _padded(constants["bias"].reshape(-1), width, "int32"),
        _padded(scale, width, "float32"),
        numbers,
        *stored_tables(attrs),
    ]


def _finished(total: Any, scale: Any, last: tuple[Any, ...], dtype: str, residual: Any = None) -> Any:
    """`quant._finish`: scale, residual, clamp, round; then the table. `last` is what `_constants` ends in."""
    p, *table = last
    value = total.astype("float32") * scale
    if dtype == "float32":
        return value
    if residual is not None:
        value = bounded(value) + bounded(scaled(residual, p[4], p[5]))
    if table:
        return table[0][to_integer(value, p[1], p[2], p[3], "int32") & 255]
    return to_integer(value, p[1], p[2], p[3], dtype)


def _out_dtype(attrs: Attrs) -> str:
    return str(attrs.get("out_dtype", "uint8"))


def depthwise(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.conv2d` with one input channel per output channel."""
    data, weight = inputs[0], constants.get("weight")
    if weight is None or weight.shape[1] != 1 or int(attrs.get("groups", 1)) != data.shape[1] != 1:
        return None
    if weight.shape[0] != data.shape[1] or data.dtype not in ("uint8", "int8"):
        return None
    data, window = _blocked(data), convolution_window(data.shape, weight.shape[2:], attrs)
    out = TensorSpec((*data.shape[:2], *window.size), _out_dtype(attrs), data.block)
    extra = _constants(weight[:, 0].transpose(1, 2, 0), constants, attrs, out)

    def define(*arguments: Any) -> Any:
        x, residual = arguments[0], arguments[1] if len(inputs) > 1 else None
        w, *last = arguments[len(inputs) :]
        return _convolved(x, residual, last, window, out, lambda c, _, r, s: (c, w[r, s, c]), 1)

    read = (data, *(spec.with_block(out.block) for spec in inputs[1:]))
    pixels = _pixels(out) if data.shape[1] > 1 else 1
    return element_kernel("depthwise", read, extra, out, define, window, is_reduction=True, pixels=pixels)


def _pixels(out: TensorSpec) -> int:
    """Neighbouring outputs of one thread: more share more loads, as long as there is work for every thread."""
    threads = out.shape[0] * out.blocks * out.block // LANES * out.shape[2] * out.shape[3]
    return next((p for p in (4, 2) if out.shape[3] % p == 0 and threads // p >= ENOUGH_THREADS), 1)


def conv2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.conv2d` with a constant weight and any groups: correct everywhere, fast nowhere."""
    data, weight = inputs[0], constants.get("weight")
    if weight is None or data.dtype not in ("uint8", "int8") or int(attrs.get("block_size", 1)) > 1:
        return None
    window, groups = convolution_window(data.shape, weight.shape[2:], attrs), int(attrs.get("groups", 1))
    out = TensorSpec((data.shape[0], weight.shape[0], *window.size), _out_dtype(attrs), BLOCK)
    per_group, depth = weight.shape[0] // groups, weight.shape[1]
    extra = _constants(weight.transpose(1, 2, 3, 0), constants, attrs, out)

    def define(*arguments: Any) -> Any:
        from tvm import tirx

        x, residual = arguments[0], arguments[1] if len(inputs) > 1 else None
        w, *last = arguments[len(inputs) :]

        def product(c: Any, k: Any, r: Any, s: Any) -> tuple[Any, Any]:
            group = tirx.min(tirx.floordiv(c, per_group), groups - 1) if groups > 1 else 0
            return group * depth + k, w[k, r, s, c]

        return _convolved(x, residual, last, window, out, product, depth)

    read = (data, *(spec.with_block(BLOCK) for spec in inputs[1:]))
    # One input pixel for all lanes: TVM's code generator cannot spread a byte over a vector.
    details = (window, groups)
    return element_kernel("conv2d_direct", read, extra, out, define, *details, is_reduction=True, is_gathered=True)


def _convolved(
    x: View,
    residual: View | None,
    last: Sequence[Any],
    window: Window,
    out: TensorSpec,
    product: Callable[..., tuple[Any, Any]],
    depth: int,
) -> Any:
    """Sum over `depth` input channels and the window, then the epilogue (`last` is what `_constants` has behind the
    weight); see `convolution_term`.
    """
    bias, scale, *p = last

    def finish(total: Any, *index: Any) -> Any:
        other = None if residual is None else residual(*index)
        return _finished(total + bias[index[1]], scale[index[1]], (*p,), out.dtype, other)

    term = convolution_term(x, window, depth, product, p[0][0].astype("int32"), "int32")
    return reduction(out, "int32", term, finish)


def conv2d_transpose(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.conv2d_transpose` with a constant weight: each output pixel gathers what reaches it."""
    data, weight = inputs[0], constants.get("weight")
    if weight is None or data.dtype not in ("uint8", "int8"):
        return None
    groups, per_group = int(attrs.get("groups", 1)), weight.shape[1]
    window = transposed_window(data.shape, weight.shape[2:], attrs)
    out = TensorSpec((data.shape[0], per_group * groups, *window.size), _out_dtype(attrs), BLOCK)
    # [C, O/groups, kh, kw] -> [C/groups, kh, kw, O]
    depth = weight.shape[0] // groups
    split = weight.reshape(groups, depth, *weight.shape[1:]).transpose(1, 3, 4, 0, 2)
    extra = _constants(split.reshape(*split.shape[:3], -1), constants, attrs, out)
    shape = (groups, per_group, depth)

    def define(x: View, w: Any, bias: Any, scale: Any, p: Any, *table: Any) -> Any:
        def finish(total: Any, n: Any, c: Any, y: Any, z: Any) -> Any:
            return _finished(total + bias[c], scale[c], (p, *table), out.dtype)

        return reduction(out, "int32", transposed_term(x, w, window, shape, p[0].astype("int32"), "int32"), finish)

    is_gathered = groups > 1 and per_group % LANES != 0
    key = (window, groups)
    return element_kernel(
        "conv2d_transpose", (data,), extra, out, define, *key, is_reduction=True, is_gathered=is_gathered
    )


def dense(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.dense` with a constant weight, one thread per output."""
    data, weight = inputs[0], constants.get("weight")
    if weight is None or data.dtype not in ("uint8", "int8") or len(data.shape) != 2:
        return None
    out = TensorSpec((data.shape[0], weight.shape[1]), _out_dtype(attrs), BLOCK)
    extra = _constants(weight, constants, attrs, out)

    def define(*arguments: Any) -> Any:
        from tvm import te

        x, residual = arguments[0], arguments[1] if len(inputs) > 1 else None
        w, bias, scale, *last = arguments[len(inputs) :]
        inner = te.reduce_axis((0, weight.shape[0]), "k")

        def term(n: Any, m: Any) -> Any:
            return te.sum(x(n, inner).astype("int32") * w[inner, m].astype("int32"), axis=inner)

        def finish(total: Any, *index: Any) -> Any:
            other = None if residual is None else residual(*index)
            return _finished(total + bias[index[1]], scale[index[1]], (*last,), out.dtype, other)

        return reduction(out, "int32", term, finish)

    read = (data, *(spec.with_block(BLOCK) for spec in inputs[1:]))
    return element_kernel("dense_direct", read, extra, out, define, is_reduction=True, is_gathered=True)
