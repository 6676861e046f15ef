"""Concatenation, integer (each input requantized where its scale differs) and float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lpsn_tvm.schedules.cuda.convert import existing
from lpsn_tvm.schedules.cuda.threads import LANES, common_block, element_kernel
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.rounding import output_range, parameters, scaled, to_integer
from lpsn_tvm.schedules.views import View, compute

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


def concat(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.concat`."""
    if constants:
        return None
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


def float_concat(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_concat`."""
    if constants:
        return None
    return _concat(
        "float_concat", inputs, int(attrs["axis"]), "float32", parameters(0.0), lambda i, value, p: value, ()
    )


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
    block = common_block(*inputs)
    read = tuple(spec.with_block(block) for spec in inputs)
    shape = list(inputs[0].shape)
    shape[axis] = sum(spec.shape[axis] for spec in inputs)
    out = TensorSpec(tuple(shape), dtype, block)
    starts = [sum(spec.shape[axis] for spec in inputs[:i]) for i in range(len(inputs))]
    along_channels = axis == 1 and block > 0
    aligned = not along_channels or all(start % LANES == 0 for start in [*starts, out.shape[1]])

    def define(*arguments: Any) -> Any:
        views: tuple[View, ...] = arguments[: len(inputs)]
        p = arguments[len(inputs)]

        def value(*given: Any) -> Any:
            index = existing(out, given) if along_channels else given

            def part(i: int) -> Any:
                moved = list(index)
                moved[axis] = index[axis] - starts[i]
                return convert(i, views[i](*moved), p)

            # Four lanes belong to one input, so the choice is one branch per vector.
            position, unit = (tirx.floordiv(index[1], LANES), LANES) if along_channels and aligned else (index[axis], 1)
            chosen = part(len(inputs) - 1)
            for i in reversed(range(len(inputs) - 1)):
                chosen = tirx.if_then_else(position < starts[i + 1] // unit, part(i), chosen)
            return chosen

        return compute(out, value)

    return element_kernel(name, read, (numbers,), out, define, axis, copied, is_gathered=not aligned)
