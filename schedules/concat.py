"""Concatenation, integer (each input requantized where its scale differs) and float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lpsn_tvm.schedules.kernel import Array, Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Maker
from lpsn_tvm.schedules.rounding import output_range, parameters, scaled, to_integer
from lpsn_tvm.schedules.views import View, compute, existing, within

Convert = Callable[[int, Any, Any], Any]
"""(number of the input, its element, numbers) -> element of the output."""


def copied_inputs(attrs: Attrs) -> tuple[bool, ...]:
    """Which inputs of an integer concatenation have the output's scale and zero point already."""
    zero_point = int(attrs["out_zero_point"])
    pairs = zip(attrs["multipliers"], attrs["zero_points"], strict=True)
    return tuple(float(multiplier) == 1.0 and int(point) == zero_point for multiplier, point in pairs)


def concat(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.concat`."""
    if constants:
        return None
    copied, dtype = copied_inputs(attrs), str(attrs["out_dtype"])
    numbers = parameters(*output_range(attrs), *attrs["multipliers"], *attrs["zero_points"])

    def convert(position: int, value: Any, p: Any) -> Any:
        if copied[position]:
            return value.astype(dtype)
        return to_integer(scaled(value, p[3 + position], p[3 + len(inputs) + position]), p[0], p[1], p[2], dtype)

    return _concat(maker, "concat", inputs, int(attrs["axis"]), dtype, numbers, convert, copied)


def float_concat(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.float_concat`."""
    if constants:
        return None
    numbers, axis = parameters(0.0), int(attrs["axis"])
    return _concat(maker, "float_concat", inputs, axis, "float32", numbers, lambda i, value, p: value, ())


def _concat(
    maker: Maker,
    name: str,
    inputs: Inputs,
    axis: int,
    dtype: str,
    numbers: Array,
    convert: Convert,
    copied: tuple[bool, ...],
) -> Kernel:
    axis %= len(inputs[0].shape)
    block = maker.common_block(*inputs)
    read = tuple(spec.with_block(block) for spec in inputs)
    shape = list(inputs[0].shape)
    shape[axis] = sum(spec.shape[axis] for spec in inputs)
    out = TensorSpec(tuple(shape), dtype, block)
    starts = [sum(spec.shape[axis] for spec in inputs[:i]) for i in range(len(inputs))]
    along_channels = axis == 1 and block > 0
    run = maker.run_of(*starts) if along_channels else 0
    # Lanes beyond C belong to the last input; what they read must exist.
    beyond = along_channels and starts[-1] + read[-1].blocks * block < out.blocks * block

    def define(*arguments: Any) -> Any:
        views, p = arguments[: len(inputs)], arguments[len(inputs)]

        def value(*index: Any) -> Any:
            def chosen() -> Any:
                read = existing(out, index, run) if beyond and run > 1 else index
                return _chosen(views, read, axis, starts, max(run, 1), lambda i, element: convert(i, element, p))

            return within(out, index[1], chosen) if run == 1 else chosen()

        return compute(out, value)

    kind = "move" if all(copied) and all(spec.dtype == dtype for spec in inputs) else "gather"
    return maker.kernel(name, read, (numbers,), out, define, axis, copied, kind=kind, run=run)


def _chosen(
    views: tuple[View, ...],
    index: tuple[Any, ...],
    axis: int,
    starts: list[int],
    run: int,
    convert: Callable[[int, Any], Any],
) -> Any:
    """The element at `index` of the concatenation; whole runs are chosen by their number, so that the choice is one
    scalar branch per vector.
    """
    from tvm import tirx

    def part(i: int) -> Any:
        moved = list(index)
        moved[axis] = index[axis] - starts[i]
        return convert(i, views[i](*moved))

    chosen, position = part(len(views) - 1), index[axis] // run
    for i in reversed(range(len(views) - 1)):
        chosen = tirx.if_then_else(position < starts[i + 1] // run, part(i), chosen)
    return chosen
