"""Layers that stay float: one thread per output, plain memory. Few networks have any, and none has many."""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm import float_ops
from lpsn_tvm.schedules.cuda.threads import element_kernel, reduction
from lpsn_tvm.schedules.cuda.window_sums import (
    convolution_term,
    convolution_window,
    transposed_term,
    transposed_window,
)
from lpsn_tvm.schedules.expressions import evaluate
from lpsn_tvm.schedules.kernel import Array, Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.rounding import parameters
from lpsn_tvm.schedules.views import View


def _finished(value: Any, residual: View | None, index: tuple[Any, ...], p: Any, program: str) -> Any:
    """`float_ops._finish`: residual, clip, program."""
    from tvm import tirx

    if residual is not None:
        value = value + residual(*index)
    clipped = tirx.max(tirx.min(value, p[1]), p[0])
    return evaluate(float_ops.decode_program(program), [clipped]) if program else clipped


def _extra(weight: Array, constants: Constants, attrs: Attrs) -> list[Array]:
    """Weight, bias and the limits of the clip."""
    limits = parameters(attrs.get("low", -np.inf), attrs.get("high", np.inf))
    bias = np.asarray(constants["bias"], np.float32).reshape(-1)
    return [np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias), limits]


def _is_mine(inputs: Inputs, constants: Constants) -> bool:
    return "weight" in constants and "bias" in constants and all(spec.dtype == "float32" for spec in inputs)


def float_conv2d(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_conv2d` with constant weight, any groups."""
    if not _is_mine(inputs, constants):
        return None
    read, weight = tuple(spec.with_block(0) for spec in inputs), constants["weight"]
    window = convolution_window(read[0].shape, weight.shape[2:], attrs)
    groups, program = int(attrs.get("groups", 1)), str(attrs.get("program", ""))
    out = TensorSpec((read[0].shape[0], weight.shape[0], *window.size), "float32")
    per_group, depth = weight.shape[0] // groups, weight.shape[1]

    def define(*arguments: Any) -> Any:
        from tvm import tirx

        x, residual = arguments[0], arguments[1] if len(inputs) > 1 else None
        w, bias, p = arguments[-3:]

        def product(c: Any, k: Any, r: Any, s: Any) -> tuple[Any, Any]:
            return (tirx.floordiv(c, per_group) * depth + k if groups > 1 else k), w[c, k, r, s]

        def finish(total: Any, *index: Any) -> Any:
            return _finished(total + bias[index[1]], residual, index, p, program)

        term = convolution_term(x, window, depth, product, tirx.const(0.0, "float32"), "float32")
        return reduction(out, "float32", term, finish)

    key = (window, groups, program)
    extra = _extra(weight, constants, attrs)
    return element_kernel("float_conv2d", read, extra, out, define, *key, is_reduction=True)


def float_conv2d_transpose(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_conv2d_transpose` with constant weight, any groups."""
    if not _is_mine(inputs, constants):
        return None
    data, weight = inputs[0].with_block(0), constants["weight"]
    window = transposed_window(data.shape, weight.shape[2:], attrs)
    groups, program = int(attrs.get("groups", 1)), str(attrs.get("program", ""))
    per_group, depth = weight.shape[1], weight.shape[0] // groups
    out = TensorSpec((data.shape[0], per_group * groups, *window.size), "float32")
    split = weight.reshape(groups, depth, *weight.shape[1:]).transpose(1, 3, 4, 0, 2)

    def define(x: View, w: Any, bias: Any, p: Any) -> Any:
        from tvm import tirx

        def finish(total: Any, *index: Any) -> Any:
            return _finished(total + bias[index[1]], None, index, p, program)

        shape = (groups, per_group, depth)
        term = transposed_term(x, w, window, shape, tirx.const(0.0, "float32"), "float32")
        return reduction(out, "float32", term, finish)

    key = (window, groups, program)
    extra = _extra(split.reshape(*split.shape[:3], -1), constants, attrs)
    return element_kernel("float_conv2d_transpose", (data,), extra, out, define, *key, is_reduction=True)


def float_dense(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_dense` with constant weight."""
    if not _is_mine(inputs, constants) or len(inputs[0].shape) != 2:
        return None
    read, weight = tuple(spec.with_block(0) for spec in inputs), constants["weight"]
    out, program = TensorSpec((read[0].shape[0], weight.shape[1]), "float32"), str(attrs.get("program", ""))

    def define(*arguments: Any) -> Any:
        from tvm import te

        x, residual = arguments[0], arguments[1] if len(inputs) > 1 else None
        w, bias, p = arguments[-3:]
        inner = te.reduce_axis((0, weight.shape[0]), "k")

        def finish(total: Any, *index: Any) -> Any:
            return _finished(total + bias[index[1]], residual, index, p, program)

        return reduction(out, "float32", lambda n, m: te.sum(x(n, inner) * w[inner, m], axis=inner), finish)

    extra = _extra(weight, constants, attrs)
    return element_kernel("float_dense", read, extra, out, define, program, is_reduction=True)
