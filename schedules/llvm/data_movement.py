"""Kernels that only move elements: slice, depth to space, reshape, transpose and layout conversion, for any data
type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.channel_map import emit, runs
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import prim_func
from lpsn_tvm.schedules.llvm.views import LANES, elementwise_kernel
from lpsn_tvm.schedules.views import View, compute, within

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


def layout_conversion(data: TensorSpec, block: int) -> Kernel:
    """Copy into another layout; lanes beyond C become zero."""
    out = data.with_block(block)

    def define(x: View) -> Any:
        return compute(out, lambda n, c, *rest: within(out, c, lambda: x(n, c, *rest)))

    return elementwise_kernel("layout_conversion", (data,), (), out, define, vectorized=False)


def strided_slice(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.strided_slice`: blocked where only channels or only pixels are cut, else plain output."""
    data = inputs[0]
    begin, step, size = [0] * len(data.shape), [1] * len(data.shape), list(data.shape)
    for axis, b, e, s in zip(attrs["axes"], attrs["begin"], attrs["end"], attrs["strides"], strict=True):
        begin[axis], step[axis], size[axis] = int(b), int(s), len(range(int(b), int(e), int(s)))
    mapped = _channel_slice(data, begin, step, size)
    if mapped is not None:
        return mapped
    keeps_lanes = len(data.shape) < 2 or (begin[1] % LANES == 0 and step[1] == 1)
    out = TensorSpec(tuple(size), data.dtype, data.block if keeps_lanes else 0)

    def define(x: View) -> Any:
        return compute(out, lambda *i: x(*[b + j * s for b, j, s in zip(begin, i, step, strict=True)]))

    return elementwise_kernel("strided_slice", (data,), (), out, define, tuple(begin), tuple(step))


def _channel_slice(data: TensorSpec, begin: list[int], step: list[int], size: list[int]) -> Kernel | None:
    """A slice of blocked channels and of nothing else, as a gather of lanes."""
    shape = data.shape
    if data.block != LANES or len(shape) < 2 or (size[0], *size[2:]) != (shape[0], *shape[2:]):
        return None
    if any(s != 1 for axis, s in enumerate(step) if axis != 1 and size[axis] > 1):
        return None
    plan = runs([(0, begin[1] + step[1] * channel) for channel in range(size[1])])
    if plan is None:
        return None
    out = TensorSpec(tuple(size), data.dtype, LANES)
    arguments = [("data", data.memory_shape, data.dtype), ("out", out.memory_shape, out.dtype)]

    def build() -> Any:
        return prim_func(arguments, lambda x, y: emit(plan, (data,), out, (x,), y, lambda i, value: value))

    return Kernel(build, (), out, ("channel_slice", data, out, begin[1], step[1]), (data,))


def depth_to_space(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.depth_to_space`; blocked output only for whole blocks of channels (images have few)."""
    data, block, mode = inputs[0], int(attrs["block_size"]), str(attrs["mode"])
    n, channels, height, width = data.shape
    channels //= block * block
    keeps_lanes = data.block > 0 and channels % LANES == 0
    out = TensorSpec((n, channels, height * block, width * block), data.dtype, data.block if keeps_lanes else 0)

    def define(x: View) -> Any:
        def value(b: Any, c: Any, y: Any, z: Any) -> Any:
            phase = y % block * block + z % block
            channel = phase * channels + c if mode == "DCR" else c * (block * block) + phase
            return x(b, channel, y // block, z // block)

        return compute(out, value)

    vectorized = mode == "DCR"
    return elementwise_kernel("depth_to_space", (data,), (), out, define, block, mode, vectorized=vectorized)


def reshape(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.reshape`: plain output, input in any layout."""
    data = inputs[0]
    out = TensorSpec(tuple(int(extent) for extent in attrs["shape"]), data.dtype)

    def define(x: View) -> Any:
        def value(*index: Any) -> Any:
            flat: Any = 0
            for i, extent in zip(index, out.shape, strict=True):
                flat = flat * extent + i
            return x(*_unflatten(flat, data.shape))

        return compute(out, value)

    return elementwise_kernel("reshape", (data,), (), out, define)


def _unflatten(flat: Any, shape: tuple[int, ...]) -> list[Any]:
    index: list[Any] = []
    for axis, extent in enumerate(shape):
        stride = int(np.prod(shape[axis + 1 :], dtype=np.int64))
        index.append(flat // stride % extent if axis else flat // stride)
    return index


def transpose(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.transpose`: plain output, input in any layout."""
    data, axes = inputs[0], tuple(int(axis) for axis in attrs["axes"])
    out = TensorSpec(tuple(data.shape[axis] for axis in axes), data.dtype)

    def define(x: View) -> Any:
        def value(*index: Any) -> Any:
            source: list[Any] = [None] * len(axes)
            for position, axis in enumerate(axes):
                source[axis] = index[position]
            return x(*source)

        return compute(out, value)

    return elementwise_kernel("transpose", (data,), (), out, define, axes)
