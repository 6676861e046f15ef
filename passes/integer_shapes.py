"""Result shapes of the integer operators, from the shapes of their tensors and their attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lpsn_tvm.errors import QuantizeError

Shape = tuple[int, ...]
Attrs = dict[str, Any]


def _same(shapes: list[Shape], attrs: Attrs) -> Shape:
    return shapes[0]


def _conv2d(shapes: list[Shape], attrs: Attrs) -> Shape:
    (n, channels, height, width), (out_channels, group_channels, kh, kw) = shapes[0], shapes[1]
    groups = attrs["groups"]
    if channels != group_channels * groups or out_channels % groups:
        raise QuantizeError(
            f"weight {shapes[1]} does not fit input {shapes[0]} in {groups} groups", where="lpsn.conv2d"
        )
    top, left, bottom, right = attrs["padding"]
    (sh, sw), (dh, dw) = attrs["strides"], attrs["dilation"]
    shape = (
        n,
        out_channels,
        (height + top + bottom - dh * (kh - 1) - 1) // sh + 1,
        (width + left + right - dw * (kw - 1) - 1) // sw + 1,
    )
    if len(shapes) > 4 and shapes[4] != shape:
        raise QuantizeError(f"residual {shapes[4]} is not the output's shape {shape}", where="lpsn.conv2d")
    block = attrs["block_size"]
    if block == 1:
        return shape
    if attrs["out_dtype"] != "float32" or out_channels % (block * block):
        raise QuantizeError(
            f"{out_channels} channels of {attrs['out_dtype']} cannot become pixels {block} x {block}; float32 and a "
            f"multiple of {block * block} are needed",
            where="lpsn.conv2d",
        )
    return _depth_to_space([shape], attrs)


def _conv2d_transpose(shapes: list[Shape], attrs: Attrs) -> Shape:
    (n, channels, height, width), (in_channels, group_out, kh, kw) = shapes[0], shapes[1]
    if channels != in_channels:
        raise QuantizeError(f"weight {shapes[1]} does not fit input {shapes[0]}", where="lpsn.conv2d_transpose")
    top, left, bottom, right = attrs["padding"]
    (sh, sw), (dh, dw), (ph, pw) = attrs["strides"], attrs["dilation"], attrs["output_padding"]
    return (
        n,
        group_out * attrs["groups"],
        (height - 1) * sh + dh * (kh - 1) + 1 + ph - top - bottom,
        (width - 1) * sw + dw * (kw - 1) + 1 + pw - left - right,
    )


def _dense(shapes: list[Shape], attrs: Attrs) -> Shape:
    if shapes[0][-1] != shapes[1][0]:
        raise QuantizeError(f"weight {shapes[1]} does not fit input {shapes[0]}", where="lpsn.dense")
    return (*shapes[0][:-1], shapes[1][1])


def _broadcast(shapes: list[Shape], attrs: Attrs) -> Shape:
    return tuple(int(extent) for extent in np.broadcast_shapes(*shapes[:2]))


def _concat(shapes: list[Shape], attrs: Attrs) -> Shape:
    axis = attrs["axis"] % len(shapes[0])
    if len(attrs["multipliers"]) != len(shapes) or len(attrs["zero_points"]) != len(shapes):
        raise QuantizeError(f"{len(shapes)} tensors need as many multipliers and zero points", where="lpsn.concat")
    result = list(shapes[0])
    result[axis] = sum(shape[axis] for shape in shapes)
    return tuple(result)


def _pool2d(shapes: list[Shape], attrs: Attrs) -> Shape:
    n, channels, *extent = shapes[0]
    top, left, bottom, right = attrs["padding"]
    dilation = attrs.get("dilation", (1, 1))
    result = []
    for size, pad, kernel, stride, step in zip(
        extent, (top + bottom, left + right), attrs["kernel"], attrs["strides"], dilation, strict=True
    ):
        rounding = stride - 1 if attrs["ceil_mode"] else 0
        result.append((size + pad - step * (kernel - 1) - 1 + rounding) // stride + 1)
    return (n, channels, *result)


def _global_avg_pool2d(shapes: list[Shape], attrs: Attrs) -> Shape:
    return (*shapes[0][:2], 1, 1)


def _resize_nearest(shapes: list[Shape], attrs: Attrs) -> Shape:
    return (*shapes[0][:2], len(attrs["rows"]), len(attrs["columns"]))


def _resize_linear(shapes: list[Shape], attrs: Attrs) -> Shape:
    return (*shapes[0][:2], len(attrs["rows"]) // 2, len(attrs["columns"]) // 2)


def _pad(shapes: list[Shape], attrs: Attrs) -> Shape:
    n, channels, height, width = shapes[0]
    top, left, bottom, right = attrs["pad_width"]
    return (n, channels, height + top + bottom, width + left + right)


def _strided_slice(shapes: list[Shape], attrs: Attrs) -> Shape:
    result = list(shapes[0])
    for axis, begin, end, stride in zip(attrs["axes"], attrs["begin"], attrs["end"], attrs["strides"], strict=True):
        result[axis] = len(range(begin, end, stride))
    return tuple(result)


def _depth_to_space(shapes: list[Shape], attrs: Attrs) -> Shape:
    n, channels, height, width = shapes[0]
    block = attrs["block_size"]
    return (n, channels // (block * block), height * block, width * block)


def _reshape(shapes: list[Shape], attrs: Attrs) -> Shape:
    shape = tuple(attrs["shape"])
    if int(np.prod(shape)) != int(np.prod(shapes[0])):
        raise QuantizeError(f"cannot reshape {shapes[0]} to {shape}", where="lpsn.reshape")
    return shape


def _transpose(shapes: list[Shape], attrs: Attrs) -> Shape:
    return tuple(shapes[0][axis] for axis in attrs["axes"])


SHAPES: dict[str, Callable[[list[Shape], Attrs], Shape]] = {
    "lpsn.quantize": _same,
    "lpsn.dequantize": _same,
    "lpsn.requantize": _same,
    "lpsn.lookup": _same,
    "lpsn.channel_lookup": _same,
    "lpsn.conv2d": _conv2d,
    "lpsn.conv2d_transpose": _conv2d_transpose,
    "lpsn.dense": _dense,
    "lpsn.add": _broadcast,
    "lpsn.multiply": _broadcast,
    "lpsn.concat": _concat,
    "lpsn.max_pool2d": _pool2d,
    "lpsn.avg_pool2d": _pool2d,
    "lpsn.global_avg_pool2d": _global_avg_pool2d,
    "lpsn.resize_nearest": _resize_nearest,
    "lpsn.resize_linear": _resize_linear,
    "lpsn.pad": _pad,
    "lpsn.strided_slice": _strided_slice,
    "lpsn.depth_to_space": _depth_to_space,
    "lpsn.reshape": _reshape,
    "lpsn.transpose": _transpose,
}
"""Operator -> shape of its result, given its tensors' shapes and its complete attributes."""
