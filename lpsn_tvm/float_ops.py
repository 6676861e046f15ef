"""The float operators `lpsn.float_*` of a fused float network, as numpy: what compiled kernels are tested against
(allclose, not bitwise).

Unlike the integer operators of `quant`, sums may be taken in any order, so a target agrees within float rounding.
Logical layout NCHW; a call always carries every attribute. `low` / `high` are the fused ReLU / ReLU6 / clip (minus and
plus infinity where there is none).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from lpsn_tvm import quant
from lpsn_tvm.quant import Array

INFINITY = float("inf")


def _finish(value: Array, low: float, high: float, program: str) -> Array:
    clipped = np.clip(value, low, high).astype(np.float32)
    return float_elementwise(clipped, program=program) if program else clipped


def _bias(bias: Array, rank: int) -> Array:
    return bias.reshape((1, -1) + (1,) * (rank - 2)).astype(np.float64)


def float_conv2d(
    x: Array,
    weight: Array,
    bias: Array,
    residual: Array | None = None,
    *,
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    low: float = -INFINITY,
    high: float = INFINITY,
    program: str = "",
) -> Array:
    """Convolution + bias [+ residual], clipped: x float32[N, C, H, W], weight float32[O, C/groups, kh, kw], padding
    top, left, bottom, right.
    """
    top, left, bottom, right = padding
    data = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    out_channels, group_channels, kh, kw = weight.shape
    oh = (data.shape[2] - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    ow = (data.shape[3] - dilation[1] * (kw - 1) - 1) // strides[1] + 1
    acc = np.zeros((x.shape[0], groups, out_channels // groups, oh, ow))
    grouped = weight.astype(np.float64).reshape(groups, out_channels // groups, group_channels, kh, kw)
    for r in range(kh):
        for s in range(kw):
            y0, x0 = r * dilation[0], s * dilation[1]
            patch = data[
                :, :, y0 : y0 + (oh - 1) * strides[0] + 1 : strides[0], x0 : x0 + (ow - 1) * strides[1] + 1 : strides[1]
            ]
            patch = patch.reshape(x.shape[0], groups, group_channels, oh, ow)
            acc += np.einsum("goc,ngcyx->ngoyx", grouped[..., r, s], patch, optimize=True)
    value = acc.reshape(x.shape[0], out_channels, oh, ow) + _bias(bias, 4)
    return _finish(value if residual is None else value + residual, low, high, program)


def float_conv2d_transpose(
    x: Array,
    weight: Array,
    bias: Array,
    *,
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    output_padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    low: float = -INFINITY,
    high: float = INFINITY,
    program: str = "",
) -> Array:
    """Transposed convolution + bias, clipped: weight float32[C, O/groups, kh, kw]."""
    n, channels, height, width = x.shape
    _, group_out, kh, kw = weight.shape
    full_h = (height - 1) * strides[0] + dilation[0] * (kh - 1) + 1 + output_padding[0]
    full_w = (width - 1) * strides[1] + dilation[1] * (kw - 1) + 1 + output_padding[1]
    acc = np.zeros((n, groups, group_out, full_h, full_w))
    data = x.astype(np.float64).reshape(n, groups, channels // groups, height, width)
    grouped = weight.astype(np.float64).reshape(groups, channels // groups, group_out, kh, kw)
    for r in range(kh):
        for s in range(kw):
            y0, x0 = r * dilation[0], s * dilation[1]
            acc[
                ...,
                y0 : y0 + (height - 1) * strides[0] + 1 : strides[0],
                x0 : x0 + (width - 1) * strides[1] + 1 : strides[1],
            ] += np.einsum("gco,ngcyx->ngoyx", grouped[..., r, s], data, optimize=True)
    top, left, bottom, right = padding
    value = acc.reshape(n, groups * group_out, full_h, full_w)[:, :, top : full_h - bottom, left : full_w - right]
    return _finish(value + _bias(bias, 4), low, high, program)


def float_dense(
    x: Array,
    weight: Array,
    bias: Array,
    residual: Array | None = None,
    *,
    low: float = -INFINITY,
    high: float = INFINITY,
    program: str = "",
) -> Array:
    """Dense layer: x float32[N, K], weight float32[K, M], bias float32[M]."""
    value = x.astype(np.float64) @ weight.astype(np.float64) + bias
    return _finish(value if residual is None else value + residual, low, high, program)


# --- elementwise programs ---------------------------------------------------------------------------------------------

Program = list[list[Any]]
"""Instructions `[operation, operand, ...]`: an int operand is a value (inputs first, then results, in order), a float
is a constant.

Example: SiLU-gated sum of two inputs is `[["sigmoid", 0], ["multiply", 0, 2], ["add", 3, 1]]`; the last result is the
program's value.
"""


def _erf(x: Array) -> Array:
    from scipy.special import erf

    return np.asarray(erf(x))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "power": np.power,
    "negative": np.negative,
    "abs": np.abs,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "square": np.square,
    "floor": np.floor,
    "ceil": np.ceil,
    "tanh": np.tanh,
    "erf": _erf,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: np.maximum(x, 0.0),
    "clip": np.clip,
    "leaky_relu": lambda x, alpha: np.where(x > 0, x, x * alpha),
    "prelu": lambda x, slope: np.where(x > 0, x, x * slope),
    "round": np.rint,
    "sign": np.sign,
    "softplus": lambda x: np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / np.sqrt(2.0))),
}
"""Operation -> its meaning, on float64 arrays with numpy broadcasting."""


def encode_program(program: Program) -> str:
    """The program as the string that a call's attribute holds."""
    return json.dumps(
        [
            [step[0], *[operand if isinstance(operand, int) else float(operand) for operand in step[1:]]]
            for step in program
        ]
    )


def decode_program(text: str) -> Program:
    """Inverse of `encode_program`; value operands stay ints, constants floats."""
    return [list(step) for step in json.loads(text)]


def float_elementwise(*tensors: Array, program: str) -> Array:
    """A fused chain of elementwise operations on broadcastable tensors; see `Program`."""
    values: list[Any] = [tensor.astype(np.float64) for tensor in tensors]
    for name, *operands in decode_program(program):
        values.append(ELEMENTWISE[name](*[values[o] if isinstance(o, int) else o for o in operands]))
    shape = np.broadcast_shapes(*[tensor.shape for tensor in tensors])
    return np.broadcast_to(values[-1], shape).astype(np.float32)


# --- pooling, data movement, normalization ----------------------------------------------------------------------------


def float_max_pool2d(
    x: Array,
    *,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
) -> Array:
    """Maximum over windows; padding never wins."""
    return np.asarray(np.max(_windows(x, kernel, strides, padding, dilation, ceil_mode, -INFINITY), axis=0), np.float32)


def float_avg_pool2d(
    x: Array,
    *,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    ceil_mode: bool = False,
    count_include_pad: bool = False,
) -> Array:
    """Mean over windows; counts as in `quant.avg_pool2d`."""
    total = np.sum(_windows(x, kernel, strides, padding, (1, 1), ceil_mode, 0.0), axis=0)
    ones = np.ones((1, 1, *x.shape[2:]), np.float64)
    if count_include_pad:
        top, left, bottom, right = padding
        ones = np.pad(ones, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=1)
        padding = (0, 0, 0, 0)
    count = np.sum(_windows(ones, kernel, strides, padding, (1, 1), ceil_mode, 0.0), axis=0)
    return np.asarray(total / np.maximum(count, 1), np.float32)


def _windows(
    x: Array,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, ...],
    dilation: tuple[int, int],
    ceil_mode: bool,
    fill: float,
) -> Array:
    """The shifted, strided views of padded x, [kh * kw, N, C, OH, OW]."""
    top, left, bottom, right = padding
    rounding = (strides[0] - 1, strides[1] - 1) if ceil_mode else (0, 0)
    oh = (x.shape[2] + top + bottom - dilation[0] * (kernel[0] - 1) - 1 + rounding[0]) // strides[0] + 1
    ow = (x.shape[3] + left + right - dilation[1] * (kernel[1] - 1) - 1 + rounding[1]) // strides[1] + 1
    more_h = max(0, (oh - 1) * strides[0] + dilation[0] * (kernel[0] - 1) + 1 - x.shape[2] - top - bottom)
    more_w = max(0, (ow - 1) * strides[1] + dilation[1] * (kernel[1] - 1) + 1 - x.shape[3] - left - right)
    data = np.pad(
        x.astype(np.float64), ((0, 0), (0, 0), (top, bottom + more_h), (left, right + more_w)), constant_values=fill
    )
    views = [
        data[:, :, r * dilation[0] :, s * dilation[1] :][
            :, :, : (oh - 1) * strides[0] + 1 : strides[0], : (ow - 1) * strides[1] + 1 : strides[1]
        ]
        for r in range(kernel[0])
        for s in range(kernel[1])
    ]
    return np.stack(views)


def float_global_avg_pool2d(x: Array) -> Array:
    """Mean over H and W, kept as 1."""
    return np.asarray(x.astype(np.float64).mean(axis=(2, 3), keepdims=True), np.float32)


def float_concat(*tensors: Array, axis: int) -> Array:
    """Concatenation."""
    return np.asarray(np.concatenate(tensors, axis=axis))


def float_resize_linear(
    x: Array,
    *,
    rows: tuple[int, ...],
    row_weights: tuple[float, ...],
    columns: tuple[int, ...],
    column_weights: tuple[float, ...],
) -> Array:
    """Bilinear resize: output row i is `row_weights[2i] * x[rows[2i]] + row_weights[2i+1] * x[rows[2i+1]]`; columns
    likewise.
    """
    data = x.astype(np.float64)
    rw, cw = np.asarray(row_weights), np.asarray(column_weights)
    tall = data[:, :, list(rows[0::2])] * rw[0::2][:, None] + data[:, :, list(rows[1::2])] * rw[1::2][:, None]
    return np.asarray(tall[..., list(columns[0::2])] * cw[0::2] + tall[..., list(columns[1::2])] * cw[1::2], np.float32)


def float_pad(x: Array, *, pad_width: tuple[int, ...], value: float, mode: str = "constant") -> Array:
    """Spatial padding top, left, bottom, right: "constant", "reflect" or "edge"."""
    top, left, bottom, right = pad_width
    spec = ((0, 0), (0, 0), (top, bottom), (left, right))
    if mode == "constant":
        return np.pad(x, spec, constant_values=value)
    return np.pad(x, spec, mode="reflect" if mode == "reflect" else "edge")


def float_instance_norm(x: Array, scale: Array, shift: Array, *, epsilon: float) -> Array:
    """Per sample and channel: `(x - mean) / sqrt(variance + epsilon) * scale + shift` over H and W.

    Statistics in float64, each value as `(x - centre) * slope + offset` in float32: in whatever order a target sums in
    float64, those three come out as the same float32 numbers, so results agree bit for bit.
    """
    data = x.astype(np.float64)
    mean, variance = data.mean(axis=(2, 3), keepdims=True), data.var(axis=(2, 3), keepdims=True)
    factor = _bias(scale, 4) / np.sqrt(variance + epsilon)
    centre, slope = mean.astype(np.float32), factor.astype(np.float32)
    offset = (_bias(shift, 4) - (mean - centre) * factor).astype(np.float32)
    return np.asarray((x.astype(np.float32) - centre) * slope + offset)


def float_softmax(x: Array, *, axis: int) -> Array:
    """Softmax along `axis`."""
    shifted = np.exp(x.astype(np.float64) - x.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True), np.float32)


OPERATORS: dict[str, Any] = {
    f"lpsn.{function.__name__}": function
    for function in (
        float_conv2d,
        float_conv2d_transpose,
        float_dense,
        float_elementwise,
        float_max_pool2d,
        float_avg_pool2d,
        float_global_avg_pool2d,
        float_concat,
        float_resize_linear,
        float_pad,
        float_instance_norm,
        float_softmax,
    )
} | {
    # Pure data movement means the same for every data type.
    f"lpsn.float_{function.__name__}": function
    for function in (quant.resize_nearest, quant.strided_slice, quant.depth_to_space, quant.reshape, quant.transpose)
}
"""Packed-function name -> its meaning."""
