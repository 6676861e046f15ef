"""Concatenations and slices of blocked channels at any offset: vectors are copied or shuffled together
(`channel_map`). Other axes, other layouts and maps of too many pieces are left to the shared kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm.schedules.concat import copied_inputs
from lpsn_tvm.schedules.data_movement import slice_bounds
from lpsn_tvm.schedules.kernel import Array, Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.channel_map import emit, runs
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import MAGIC_BITS, prim_func, requantized, vcast, vector
from lpsn_tvm.schedules.llvm.views import LANES, offered_block
from lpsn_tvm.schedules.rounding import output_range


def concat(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.concat`."""
    if constants:
        return None
    dtype, copied = str(attrs["out_dtype"]), copied_inputs(attrs)
    return _along_channels("concat", inputs, int(attrs["axis"]), dtype, attrs, copied)


def float_concat(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_concat`."""
    if constants:
        return None
    return _along_channels("float_concat", inputs, int(attrs["axis"]), "float32", None, (True,) * len(inputs))


def strided_slice(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.strided_slice` that cuts channels and nothing else."""
    data = inputs[0]
    shape = data.shape
    begin, step, size = slice_bounds(data, attrs)
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
