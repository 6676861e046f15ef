"""Kernels that only move elements: slice, depth to space, reshape and transpose, for any data type."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from lpsn_tvm.schedules.cuda.convert import existing
from lpsn_tvm.schedules.cuda.threads import LANES, element_kernel
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.views import View, compute

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


def strided_slice(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.strided_slice`, layout kept; whole vectors where channels are cut at multiples of four."""
    data = inputs[0]
    begin, step, size = [0] * len(data.shape), [1] * len(data.shape), list(data.shape)
    for axis, b, e, s in zip(attrs["axes"], attrs["begin"], attrs["end"], attrs["strides"], strict=True):
        begin[axis], step[axis], size[axis] = int(b), int(s), len(range(int(b), int(e), int(s)))
    out = TensorSpec(tuple(size), data.dtype, data.block)
    keeps_lanes = len(data.shape) < 2 or (begin[1] % LANES == 0 and step[1] == 1 and size[1] % LANES == 0)

    def define(x: View) -> Any:
        def value(*index: Any) -> Any:
            return x(*[b + j * s for b, j, s in zip(begin, existing(out, index), step, strict=True)])

        return compute(out, value)

    return element_kernel(
        "strided_slice", (data,), (), out, define, tuple(begin), tuple(step), is_gathered=not keeps_lanes
    )


def depth_to_space(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.depth_to_space`; blocked output only for whole blocks of channels (images have few)."""
    data, block, mode = inputs[0], int(attrs["block_size"]), str(attrs["mode"])
    n, channels, height, width = data.shape
    channels //= block * block
    keeps_blocks = data.block > 0 and channels % data.block == 0
    shape = (n, channels, height * block, width * block)
    out = TensorSpec(shape, data.dtype, data.block if keeps_blocks else 0)

    def define(x: View) -> Any:
        def value(b: Any, c: Any, y: Any, z: Any) -> Any:
            phase = y % block * block + z % block
            channel = phase * channels + c if mode == "DCR" else c * (block * block) + phase
            return x(b, channel, y // block, z // block)

        return compute(out, value)

    return element_kernel(
        "depth_to_space", (data,), (), out, define, block, mode, is_gathered=not keeps_blocks or mode != "DCR"
    )


def reshape(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.reshape`: plain output, input in any layout."""
    data = inputs[0]
    out = TensorSpec(tuple(int(extent) for extent in attrs["shape"]), data.dtype)

    def define(x: View) -> Any:
        def value(*index: Any) -> Any:
            flat: Any = 0
            for i, extent in zip(index, out.shape, strict=True):
                flat = flat * extent + i
            return x(*_unflatten(flat, data.shape))

        return compute(out, value)

    return element_kernel("reshape", (data,), (), out, define)


def _unflatten(flat: Any, shape: tuple[int, ...]) -> list[Any]:
    index: list[Any] = []
    for axis, extent in enumerate(shape):
        stride = prod(shape[axis + 1 :])
        index.append(flat // stride % extent if axis else flat // stride)
    return index


def transpose(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.transpose`: plain output, input in any layout."""
    data, axes = inputs[0], tuple(int(axis) for axis in attrs["axes"])
    out = TensorSpec(tuple(data.shape[axis] for axis in axes), data.dtype)

    def define(x: View) -> Any:
        def value(*index: Any) -> Any:
            source: list[Any] = [None] * len(axes)
            for position, axis in enumerate(axes):
                source[axis] = index[position]
            return x(*source)

        return compute(out, value)

    return element_kernel("transpose", (data,), (), out, define, axes)
