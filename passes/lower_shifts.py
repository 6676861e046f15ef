"""Layers, sums and concatenations of hardware that requantizes by shifting (`QuantScheme.rounding == "half_up"`).

Before: integer weights and scales whose ratios are powers of two. After: the same integer operators with
`rounding="half_up"`, in a form whose every shift is one that `quant` defines:

1. `shift[c] = -log2(x scale * weight scale[c] / output scale)` lies in [0, `LARGEST_SHIFT`]: a channel with a coarser
   unit gets larger integer weights (as far as their container goes), one with a needlessly fine unit smaller ones.
2. bias, rounding constant and residual fit the int32 accumulator with the worst input.
3. a residual that no shift can bring into the accumulator's unit is added by an operator of its own.
4. zero points (`QuantScheme.has_activation_offset`) go into the bias exactly: `-x * sum(weight)`, `out << shift`,
   `-residual << left`; what is left of them is the value that a convolution's padding holds.
5. a layer whose unit stays coarser than its output's writes float32, which is then quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lpsn_tvm import graph
from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.graph import Layer
from lpsn_tvm.passes.integer_ops import IntegerTensor, integer_call, result_attrs, scale_of
from lpsn_tvm.passes.lower_elementwise import lower_add
from lpsn_tvm.passes.lower_layers import (
    EVERYTHING,
    INT32_MAX,
    Interval,
    integer_weight,
    layer_attrs,
    per_output,
    rows_by_output,
)
from lpsn_tvm.quant import Array, QuantizedWeight, QuantParams, QuantScheme

Emit = Callable[[Any, str], Any]
"""(call, name) -> the bound variable."""

LARGEST_SHIFT = 24
"""A finer accumulator than this many bits below the output's step is noise."""
TOLERANCE = 1e-4
"""How far the float32 scales of a plan may be from an exact power of two."""
SUM_BITS = 22
"""Largest left shift of an int8 addend in a sum: it stays within int32."""


def exponents(ratio: Any) -> Array | None:
    """int64 log2 of ratios of scales, or None where one is not a power of two (up to float32 rounding)."""
    ratio = np.asarray(ratio, np.float64)
    if not (np.all(np.isfinite(ratio)) and np.all(ratio > 0)):
        return None
    exponent = np.rint(np.log2(ratio))
    if np.any(np.abs(ratio * np.exp2(-exponent) - 1) > TOLERANCE):
        return None
    result: Array = exponent.astype(np.int64)
    return result


@dataclass(frozen=True)
class _Shifted:
    """Integer weight and bias of a layer with the right shift of each output channel."""

    values: Array
    bias: Array
    shift: Array


def lower_layer_by_shifts(
    layer: Layer,
    weight: QuantizedWeight,
    x: IntegerTensor,
    out: QuantParams | None,
    interval: Interval,
    residual: IntegerTensor | None,
    scheme: QuantScheme,
    emit: Emit,
    name: str,
) -> Any:
    """The integer call of a layer with its epilogue in shifts; what has to come before it is emitted.

    Parameters
    ----------
    layer, weight, x, out, interval, residual
        As in `lower_layers.lower_layer`.
    scheme : QuantScheme
        `weight_container_bits` and `residual_shift` of the hardware.
    emit : callable
        Binds a call to a name.
    name : str
        Variable that the result will have.

    Raises
    ------
    QuantizeError
        Scales whose ratio is not a power of two, zero points other than 0, an accumulator that could leave int32.
    """
    if not scheme.has_activation_offset:
        _check_zero_points(layer.name, x, residual)
    if out is None:
        values, bias, scale = integer_weight(layer, weight, x.params, None, scheme.weight_container_bits)
        bias = _without_offset(layer, values, bias, x)
        _check_room(layer, values, bias, x, np.int64(0), 0)
        attrs = {"out_dtype": "float32", "out_zero_point": 0, "qmin": 0, "qmax": 0}
        return _call(layer, x, (values, bias, scale), attrs, [])
    shifted = _shifted(layer, weight, x, out, scheme)
    if shifted is None:
        return _through_float(layer, weight, x, out, interval, residual, scheme, emit, name)
    if residual is None:
        return _finished(layer, x, shifted, out, interval, None, scheme)
    exponent = exponents(residual.scale / scale_of(out))
    if exponent is None:
        raise QuantizeError(
            f"a residual of scale {residual.scale:.9g} is added in scale {scale_of(out):.9g}; hardware that shifts "
            "needs powers of two between them",
            where=layer.name,
        )
    if int(exponent) <= scheme.residual_shift and np.all(shifted.shift >= -int(exponent)):
        return _finished(layer, x, shifted, out, interval, residual, scheme)
    apart = _wide(out, residual)
    first = lower_layer_by_shifts(layer, weight, x, apart, EVERYTHING, None, scheme, emit, layer.name)
    term = IntegerTensor(emit(first, layer.name), apart)
    return _sum(term, residual, out, interval)


def _sum(a: IntegerTensor, b: IntegerTensor, out: QuantParams, interval: Interval) -> Any:
    """By shifts where that is possible, else by multiplications (which the accelerator leaves to its host)."""
    by_shifts = lower_add_by_shifts(a, b, out, interval)
    return lower_add(a, b, out, interval) if by_shifts is None else by_shifts


def _wide(out: QuantParams, residual: IntegerTensor) -> QuantParams:
    """Parameters of a sum less its residual: both are within their ranges, so it is within twice the larger one."""
    return replace(out, scale=np.asarray(2.0 * max(scale_of(out), residual.scale), np.float32), zero_point=0)


def _without_offset(layer: Layer, values: Array, bias: Array, x: IntegerTensor) -> Array:
    """The bias with the input's zero point folded in, as padding that holds the zero point makes it."""
    if x.zero_point and layer.kind == "conv2d_transpose":
        raise QuantizeError("a transposed convolution needs an input of zero point 0", where=layer.name)
    sums = rows_by_output(layer, values).astype(np.int64).sum(axis=1)
    return np.asarray(bias.astype(np.int64) - x.zero_point * sums)


def _check_zero_points(where: str, *tensors: IntegerTensor | None) -> None:
    if any(tensor is not None and tensor.zero_point != 0 for tensor in tensors):
        raise QuantizeError("hardware that shifts needs zero points of 0 (a symmetric scheme)", where=where)


def _shifted(
    layer: Layer, weight: QuantizedWeight, x: IntegerTensor, out: QuantParams, scheme: QuantScheme
) -> _Shifted | None:
    """Rule 1; None where the unit of a channel stays coarser than the output's."""
    values, bias, scale = integer_weight(layer, weight, x.params, out, scheme.weight_container_bits)
    exponent = exponents(scale / scale_of(out))
    if exponent is None:
        raise QuantizeError(
            "input scale * weight scale / output scale is not a power of two for every output channel; plan it with "
            "the backend's scheme",
            where=layer.name,
        )
    shift = -exponent
    rows = np.abs(rows_by_output(layer, values)).astype(np.int64).max(axis=1, initial=0)
    limit = (1 << (scheme.weight_container_bits - 1)) - 1
    # Left shifts of the integers (negative: right shifts) that bring the amounts into their range.
    left = np.maximum(-shift, 0) - np.maximum(shift - LARGEST_SHIFT, 0)
    if np.any((left > 0) & (rows * np.exp2(np.minimum(left, 24)) > limit)):
        return None
    factor = np.exp2(left)
    wide_bias = np.rint(bias * factor)
    if np.any(np.abs(wide_bias) > INT32_MAX // 2):
        return None
    values = np.rint(values * per_output(layer, factor, values.ndim)).astype(np.int8)
    shift = shift + left
    bias = _without_offset(layer, values, wide_bias, x) + (np.int64(out.zero_point) << shift)
    _check_room(layer, values, bias, x, shift, 128 << scheme.residual_shift)
    return _Shifted(values, bias, shift)


def _check_room(layer: Layer, values: Array, bias: Array, x: IntegerTensor, shift: Any, room: int) -> None:
    """Rule 2; `room` is for a residual: at most 128 steps, shifted left."""
    largest = max(abs(x.params.qmin), abs(x.params.qmax))
    reach = np.abs(rows_by_output(layer, values).astype(np.int64)).sum(axis=1) * largest
    worst = reach + np.abs(bias.astype(np.int64)) + ((np.int64(1) << shift) >> 1) + room
    if np.any(worst > INT32_MAX):
        raise QuantizeError(
            f"the worst case of its accumulator with bias and rounding is {int(worst.max())}, above {INT32_MAX}; "
            "list it in `ignore` or use fewer bits",
            where=layer.name,
        )


def _finished(
    layer: Layer,
    x: IntegerTensor,
    shifted: _Shifted,
    out: QuantParams,
    interval: Interval,
    residual: IntegerTensor | None,
    scheme: QuantScheme,
) -> Any:
    attrs = result_attrs(out, *interval) | {"out_zero_point": 0}
    bias = shifted.bias
    if residual is not None:
        exponent = exponents(residual.scale / scale_of(out))
        assert exponent is not None
        bias = bias - (np.int64(residual.zero_point) << (shifted.shift + exponent))
        attrs |= {"residual_multiplier": float(np.exp2(exponent)), "residual_shift": scheme.residual_shift}
    scale = np.exp2(-shifted.shift.astype(np.float64))
    more = [] if residual is None else [residual.expr]
    return _call(layer, x, (shifted.values, bias, scale), attrs, more)


def _call(
    layer: Layer, x: IntegerTensor, arrays: tuple[Array, Array, Array], attrs: dict[str, Any], more: Sequence[Any]
) -> Any:
    values, bias, scale = arrays
    if layer.kind == "conv2d" and any(layer.attrs["padding"]):
        attrs = attrs | {"x_zero_point": x.zero_point}
    tensors = [
        x.expr,
        graph.constant(values),
        graph.constant(bias.astype(np.int32)),
        graph.constant(scale.astype(np.float32)),
        *more,
    ]
    attrs = attrs | layer_attrs(layer) | {"rounding": "half_up"}
    return integer_call(f"lpsn.{layer.kind}", tensors, attrs, out_shape=layer.out_shape)


def _through_float(
    layer: Layer,
    weight: QuantizedWeight,
    x: IntegerTensor,
    out: QuantParams,
    interval: Interval,
    residual: IntegerTensor | None,
    scheme: QuantScheme,
    emit: Emit,
    name: str,
) -> Any:
    """Rule 5."""
    call = lower_layer_by_shifts(layer, weight, x, None, EVERYTHING, None, scheme, emit, name)
    target = out if residual is None else _wide(out, residual)
    attrs = result_attrs(target, *(interval if residual is None else EVERYTHING))
    attrs["zero_point"] = attrs.pop("out_zero_point")
    scale = scale_of(target)
    attrs |= {"inv_scale": np.float32(1.0) / np.float32(scale), "scale": scale}
    quantized = integer_call("lpsn.quantize", [emit(call, f"{layer.name}.f")], attrs)
    if residual is None:
        return quantized
    return _sum(IntegerTensor(emit(quantized, layer.name), target), residual, out, interval)


def lower_add_by_shifts(a: IntegerTensor, b: IntegerTensor, out: QuantParams, interval: Interval) -> Any | None:
    """Sum in shifts; None where the scales' ratios are not powers of two or do not fit int32 together."""
    target = scale_of(out)
    ratios = exponents([a.scale / target, b.scale / target])
    if (
        ratios is None
        or any((a.zero_point, b.zero_point, out.zero_point))
        or int(ratios.max() - min(int(ratios.min()), 0)) > SUM_BITS
    ):
        return None
    attrs = {
        "a_multiplier": float(np.exp2(ratios[0])),
        "b_multiplier": float(np.exp2(ratios[1])),
        "a_zero_point": 0,
        "b_zero_point": 0,
        "rounding": "half_up",
    }
    return integer_call("lpsn.add", [a.expr, b.expr], attrs | result_attrs(out, *interval))


def lower_concat_by_shifts(axis: int, parts: Sequence[IntegerTensor], out: QuantParams) -> Any | None:
    """Concatenation whose parts are requantized by shifts; None where a ratio of scales is not a power of two."""
    ratios = exponents([part.scale / scale_of(out) for part in parts])
    if ratios is None or out.zero_point or any(part.zero_point for part in parts) or int(ratios.max()) > SUM_BITS:
        return None
    attrs: dict[str, Any] = {
        "axis": axis,
        "multipliers": [float(value) for value in np.exp2(ratios)],
        "zero_points": [0] * len(parts),
        "rounding": "half_up",
    }
    return integer_call("lpsn.concat", [part.expr for part in parts], attrs | result_attrs(out))
