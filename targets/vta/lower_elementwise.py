"""Sums and requantizations: identity weights times powers of two, doublings where a weight cannot hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpsn_tvm.quant import exponent_of
from lpsn_tvm.schedules.vta.ops import Scalar, Step, Store
from lpsn_tvm.targets.vta.epilogue import add_steps, clamp_steps, rounding_of, shift_steps
from lpsn_tvm.targets.vta.forms import Value
from lpsn_tvm.targets.vta.gemm import IDENTITY, Rectangle, channel_gemms, operator
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.layout import image_shape
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped

Term = tuple[Value, int]
"""A value and the power of two that it is multiplied by."""


def lower_add(context: Context, node: Node) -> None:
    """`(a * 2**i + b * 2**j + 2**(s-1)) >> s`, clamped."""
    check_rounding(node)
    if len(node.variables) != 2:
        raise Unmapped("one of its operands is a constant")
    values = [context.value(name) for name in node.variables]
    image = image_shape(node.shape)
    if any(value.image != image for value in values):
        raise Unmapped("it broadcasts one operand")
    exponents = [int(exponent_of(node.attrs[f"{side}_multiplier"])) for side in "ab"]
    rescale(context, node, list(zip(values, exponents, strict=True)))


def lower_requantize(context: Context, node: Node) -> None:
    """`(x * 2**i + 2**(s-1)) >> s`, clamped."""
    check_rounding(node)
    rescale(context, node, [(context.value(node.variable(0)), int(exponent_of(node.attrs["multiplier"])))])


def check_rounding(node: Node) -> None:
    """Only half up is a shift."""
    if node.attrs.get("rounding") != "half_up":
        raise Unmapped("it is requantized by a multiplication, not by a shift")


def rescale(context: Context, node: Node, terms: Sequence[Term]) -> None:
    """Emit the operator of a sum of terms, into a tensor of its own."""
    qmin, qmax = int(node.attrs["qmin"]), int(node.attrs["qmax"])
    steps = rescaled(context, node.name, terms, Rectangle.plain(image_shape(node.shape), context.block), qmin, qmax)
    target = context.new_tensor(node, qmin, qmax)
    context.emit(operator(node.name, context, Rectangle.of(target), [*steps, Store(target.plane)]))


def rescaled(context: Context, name: str, terms: Sequence[Term], result: Rectangle, qmin: int, qmax: int) -> list[Step]:
    """Steps that leave the sum of `value * 2**exponent`, rounded half up and clamped, in the accumulators."""
    shift = max(0, -min(exponent for _, exponent in terms))
    scaled = [(value, exponent + shift) for value, exponent in terms]
    steps = scaled_sum(context, name, scaled, result)
    form, amount = result.form, np.asarray([shift])
    steps += add_steps(context, name, form, rounding_of(amount))
    steps += shift_steps(context, name, form, amount)
    half = int(rounding_of(amount)[0])
    low, high = (
        sum(bound << e for bound, e in zip(bounds, (e for _, e in scaled), strict=True))
        for bounds in (
            [value.low for value, _ in scaled],
            [value.high for value, _ in scaled],
        )
    )
    return steps + clamp_steps(qmin, qmax, ((low + half) >> shift, (high + half) >> shift))


def scaled_sum(context: Context, name: str, terms: Sequence[Term], result: Rectangle) -> list[Step]:
    """Sum of values times powers of two in empty accumulators: the largest first, doubled until the next fits a weight.

    Raises
    ------
    Unmapped
        A power beyond what an int32 holds of an int8.
    """
    largest = context.config.wgt_bits - 2
    steps: list[Step] = []
    unit: int | None = None
    for value, exponent in sorted(terms, key=lambda term: -term[1]):
        if exponent > 24:
            raise Unmapped(f"an operand is shifted left by {exponent} bits, more than an accumulator holds")
        below = max(0, exponent - largest)
        if unit is not None:
            steps += [Scalar("double")] * (unit - below)
        unit = below
        factors = np.full(value.image[1], 1 << (exponent - below), np.int64)
        steps += channel_gemms(context, name, value, result, IDENTITY, factors, np.ones((1, 1), np.int64))
    return steps + [Scalar("double")] * (unit or 0)
