"""Elementwise kernels: requantize, add, multiply, and fused chains of float operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm import float_ops
from lpsn_tvm.schedules.expressions import evaluate
from lpsn_tvm.schedules.kernel import Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Maker
from lpsn_tvm.schedules.rounding import bounded, output_range, parameters, scaled, to_integer
from lpsn_tvm.schedules.views import View, compute


def requantize(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.requantize`."""
    data = inputs[0]
    out = TensorSpec(data.shape, str(attrs["out_dtype"]), data.block)
    numbers = parameters(attrs["multiplier"], attrs["in_zero_point"], *output_range(attrs))

    def define(x: View, p: Any) -> Any:
        return compute(out, lambda *i: to_integer(scaled(x(*i), p[0], p[1]), p[2], p[3], p[4], out.dtype))

    return maker.kernel("requantize", (data,), (numbers,), out, define)


def add(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.add` (numpy broadcasting between operands of equal rank)."""
    pair = _broadcast_pair(maker, inputs, str(attrs["out_dtype"]))
    if pair is None:
        return None
    read, out = pair
    numbers = parameters(
        attrs["a_multiplier"], attrs["b_multiplier"], attrs["a_zero_point"], attrs["b_zero_point"], *output_range(attrs)
    )

    def define(a: View, b: View, p: Any) -> Any:
        def value(*i: Any) -> Any:
            total = bounded(scaled(a(*i), p[0], p[2])) + bounded(scaled(b(*i), p[1], p[3]))
            return to_integer(total, p[4], p[5], p[6], out.dtype)

        return compute(out, value)

    return maker.kernel("add", read, (numbers,), out, define)


def multiply(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.multiply` (numpy broadcasting between operands of equal rank)."""
    pair = _broadcast_pair(maker, inputs, str(attrs["out_dtype"]))
    if pair is None:
        return None
    read, out = pair
    numbers = parameters(attrs["multiplier"], attrs["a_zero_point"], attrs["b_zero_point"], *output_range(attrs))

    def define(a: View, b: View, p: Any) -> Any:
        def value(*i: Any) -> Any:
            left = a(*i).astype("int32") - p[1].astype("int32")
            product = left * (b(*i).astype("int32") - p[2].astype("int32"))
            return to_integer(product.astype("float32") * p[0], p[3], p[4], p[5], out.dtype)

        return compute(out, value)

    return maker.kernel("multiply", read, (numbers,), out, define)


def _broadcast_pair(maker: Maker, inputs: Inputs, dtype: str) -> tuple[Inputs, TensorSpec] | None:
    """Operands in one common layout, and the output; None where the ranks differ."""
    if len(inputs) != 2 or len(inputs[0].shape) != len(inputs[1].shape):
        return None
    shape = np.broadcast_shapes(inputs[0].shape, inputs[1].shape)
    block = maker.common_block(*[spec for spec in inputs if spec.shape == shape] or inputs)
    return tuple(spec.with_block(block) for spec in inputs), TensorSpec(shape, dtype, block)


def float_elementwise(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.float_elementwise`: the whole program at once, nothing stored in between."""
    rank = max(len(spec.shape) for spec in inputs)
    if any(len(spec.shape) != rank or spec.dtype != "float32" for spec in inputs):
        return None
    shape = np.broadcast_shapes(*[spec.shape for spec in inputs])
    block = maker.common_block(*[spec for spec in inputs if spec.shape == shape] or inputs)
    read = tuple(spec.with_block(block) for spec in inputs)
    out = TensorSpec(shape, "float32", block)
    text = str(attrs["program"])
    program = float_ops.decode_program(text)

    # Argument positions of the constants: `tensors3` is the fourth argument.
    fixed = {int(name.removeprefix("tensors")): array for name, array in constants.items()}
    specs = {position: TensorSpec(array.shape, "float32", block) for position, array in fixed.items()}
    packed = tuple(specs[position].pack(array) for position, array in fixed.items())

    def define(*arguments: Any) -> Any:
        given = iter(arguments[: len(inputs)])
        extra = {
            position: View(t, specs[position]) for position, t in zip(fixed, arguments[len(inputs) :], strict=True)
        }
        views = [extra[k] if k in extra else next(given) for k in range(len(arguments))]
        return compute(out, lambda *i: evaluate(program, [view(*i) for view in views]))

    return maker.kernel("float_elementwise", read, packed, out, define, text, tuple(fixed), kind="program")
