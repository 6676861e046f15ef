"""Concatenation, integer (each input requantized where its scale differs) and float.

Along channels in blocked layout, vectors are copied or shuffled together (`channel_map`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.channel_map import emit, runs
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import MAGIC_BITS, prim_func, requantized, vcast, vector
from lpsn_tvm.schedules.llvm.views import LANES, elementwise_kernel, offered_block
from lpsn_tvm.schedules.rounding import output_range, parameters, scaled, to_integer
from lpsn_tvm.schedules.views import View, compute

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


def concat(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.concat`."""
    zero_point = int(attrs["out_zero_point"])
    copied = tuple(
        float(m) == 1.0 and int(z) == zero_point
        for m, z in zip(attrs["multipliers"], attrs["zero_points"], strict=True)
    )
    dtype = str(attrs["out_dtype"])
    numbers = parameters(*output_range(attrs), *attrs["multipliers"], *attrs["zero_points"])

    def convert(position: int, value: Any, p: Any) -> Any:
        if copied[position]:
            return value.astype(dtype)
        return to_integer(scaled(value, p[3 + position], p[3 + len(inputs) + position]), p[0], p[1], p[2], dtype)

    mapped = _along_channels("concat", inputs, int(attrs["axis"]), dtype, attrs, copied)
    return mapped or _concat("concat", inputs, int(attrs["axis"]), dtype, numbers, convert, copied)


def float_concat(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_concat`."""
    if constants:
        return None
    mapped = _along_channels("float_concat", inputs, int(attrs["axis"]), "float32", None, (True,) * len(inputs))
    if mapped is not None:
        return mapped
    numbers = parameters(0.0)
    return _concat("float_concat", inputs, int(attrs["axis"]), "float32", numbers, lambda position, value, p: value, ())


def _along_channels(
    name: str, inputs: Inputs, axis: int, dtype: str, attrs: Attrs | None, copied: tuple[bool, ...]
) -> Kernel | None:
    """Concatenation of blocked channels; None where the axis or the layouts are others."""
    rank = len(inputs[0].shape)
    if rank < 2 or axis % rank != 1 or not offered_block(*inputs):
        return None
    read = tuple(spec.with_block(LANES) for spec in inputs)
    plan = runs([(i, channel) for i, spec in enumerate(inputs) for channel in range(spec.shape[1])])
    if plan is None:
        return None
    shape = inputs[0].shape
    out = TensorSpec((shape[0], sum(spec.shape[1] for spec in inputs), *shape[2:]), dtype, LANES)
    constants: tuple[Array, ...] = ()
    if attrs is not None:
        low, high, zero_point = output_range(attrs)
        floats = [low, high, *(float(m) for m in attrs["multipliers"])]
        integers = [int(zero_point) - MAGIC_BITS, *(int(z) for z in attrs["zero_points"])]
        constants = (np.asarray(floats, np.float32), np.asarray(integers, np.int32))

    def build() -> Any:
        arguments = [(f"x{i}", spec.memory_shape, spec.dtype) for i, spec in enumerate(read)]
        arguments += [(f"p{i}", array.shape, str(array.dtype)) for i, array in enumerate(constants)]

        def body(*buffers: Any) -> None:
            def convert(i: int, value: Any) -> Any:
                if copied[i]:
                    return vcast(value, dtype, LANES) if read[i].dtype != dtype else value
                floats, integers = buffers[len(read) : -1]
                centred = vcast(value, "int32", LANES) - vector(integers[1 + i], LANES)
                product = vcast(centred, "float32", LANES) * vector(floats[2 + i], LANES)
                return requantized(product, floats[0], floats[1], integers[0], dtype, LANES)

            emit(plan, read, out, buffers[: len(read)], buffers[-1], convert)

        return prim_func([*arguments, ("out", out.memory_shape, dtype)], body)

    return Kernel(build, constants, out, (name, read, out, copied), read)


def _concat(
    name: str,
    inputs: Inputs,
    axis: int,
    dtype: str,
    numbers: Array,
    convert: Callable[[int, Any, Any], Any],
    copied: tuple[bool, ...],
) -> Kernel:
    from tvm import tirx

    axis %= len(inputs[0].shape)
    block = offered_block(*inputs)
    read = tuple(spec.with_block(block) for spec in inputs)
    shape = list(inputs[0].shape)
    shape[axis] = sum(spec.shape[axis] for spec in inputs)
    out = TensorSpec(tuple(shape), dtype, block)
    starts = [sum(spec.shape[axis] for spec in inputs[:i]) for i in range(len(inputs))]
    aligned = axis != 1 or not block or all(start % LANES == 0 for start in starts)

    def define(*arguments: Any) -> Any:
        views: tuple[View, ...] = arguments[: len(inputs)]
        p = arguments[len(inputs)]

        def value(*index: Any) -> Any:
            def part(i: int) -> Any:
                moved = list(index)
                moved[axis] = index[axis] - starts[i]
                return convert(i, views[i](*moved), p)

            # Whole blocks are chosen by the block's number, so that the choice is one scalar branch per vector. Lanes
            # beyond C belong to the last input, which has them too.
            chosen = part(len(inputs) - 1)
            for i in reversed(range(len(inputs) - 1)):
                position = index[axis] // LANES if aligned and axis == 1 and block else index[axis]
                limit = starts[i + 1] // LANES if aligned and axis == 1 and block else starts[i + 1]
                chosen = tirx.if_then_else(position < limit, part(i), chosen)
            return chosen

        def masked(*index: Any) -> Any:
            inside = index[1] < out.shape[1]
            return tirx.if_then_else(inside, value(*index), tirx.const(0, dtype))

        needs_mask = not aligned and out.shape[1] % LANES != 0
        return compute(out, masked if needs_mask else value)

    return elementwise_kernel(name, read, (numbers,), out, define, axis, copied, vectorized=aligned)
