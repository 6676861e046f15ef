"""Kernels that only move elements: slice, depth to space, reshape and transpose, for any data type."""

from __future__ import annotations

from math import prod
from typing import Any

from lpsn_tvm.schedules.kernel import Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Maker
from lpsn_tvm.schedules.views import View, compute, existing


def slice_bounds(data: TensorSpec, attrs: Attrs) -> tuple[list[int], list[int], list[int]]:
    """First index, step and extent of a slice along every axis."""
    begin, step, size = [0] * len(data.shape), [1] * len(data.shape), list(data.shape)
    for axis, b, e, s in zip(attrs["axes"], attrs["begin"], attrs["end"], attrs["strides"], strict=True):
        begin[axis], step[axis], size[axis] = int(b), int(s), len(range(int(b), int(e), int(s)))
    return begin, step, size


def strided_slice(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.strided_slice`: blocked where channels are cut at multiples of a run, else as the target
    prefers.
    """
    data = inputs[0]
    begin, step, size = slice_bounds(data, attrs)
    run = 1
    if len(data.shape) < 2 or (begin[1] == 0 and step[1] == 1):
        run = 0
    elif step[1] == 1:
        run = maker.run_of(begin[1])
    out = TensorSpec(tuple(size), data.dtype, data.block if run != 1 or maker.gathers_blocked else 0)
    # Lanes beyond C have no meaning, but what they read must exist.
    held = out.block > 0 and not 0 <= begin[1] + (out.blocks * out.block - 1) * step[1] < data.blocks * data.block

    def define(x: View) -> Any:
        def value(*index: Any) -> Any:
            read = existing(out, index, max(run, 1)) if held else index
            return x(*[b + j * s for b, j, s in zip(begin, read, step, strict=True)])

        return compute(out, value)

    return maker.kernel("strided_slice", (data,), (), out, define, tuple(begin), tuple(step), kind="move", run=run)


def depth_to_space(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.depth_to_space`; blocked output only for whole blocks of channels (images have few)."""
    data, block, mode = inputs[0], int(attrs["block_size"]), str(attrs["mode"])
    n, channels, height, width = data.shape
    channels //= block * block
    keeps_blocks = data.block > 0 and channels % data.block == 0
    out = TensorSpec((n, channels, height * block, width * block), data.dtype, data.block if keeps_blocks else 0)

    def define(x: View) -> Any:
        def value(b: Any, c: Any, y: Any, z: Any) -> Any:
            phase = y % block * block + z % block
            channel = phase * channels + c if mode == "DCR" else c * (block * block) + phase
            return x(b, channel, y // block, z // block)

        return compute(out, value)

    run = 0 if mode == "DCR" else 1
    return maker.kernel("depth_to_space", (data,), (), out, define, block, mode, kind="move", run=run)


def reshape(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
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

    return maker.kernel("reshape", (data,), (), out, define, kind="move")


def _unflatten(flat: Any, shape: tuple[int, ...]) -> list[Any]:
    index: list[Any] = []
    for axis, extent in enumerate(shape):
        stride = prod(shape[axis + 1 :])
        index.append(flat // stride % extent if axis else flat // stride)
    return index


def transpose(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
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

    return maker.kernel("transpose", (data,), (), out, define, axes, kind="move")
