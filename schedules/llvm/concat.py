"""Concatenation, integer (each input requantized where its scale differs) and float.

Along channels in blocked layout, inputs that start at whole blocks are copied vector by vector; others lane by lane.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.rounding import output_range, parameters, scaled, to_integer
from lpsn_tvm.schedules.llvm.views import LANES, View, compute, elementwise_kernel, offered_block

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

    return _concat("concat", inputs, int(attrs["axis"]), dtype, numbers, convert, copied)


def float_concat(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_concat`."""
    if constants:
        return None
    numbers = parameters(0.0)
    return _concat("float_concat", inputs, int(attrs["axis"]), "float32", numbers, lambda position, value, p: value, ())


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
