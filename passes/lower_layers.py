"""Weighted layers in integers: scales, int32 biases, and the proof that no accumulator overflows."""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm import graph
from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.graph import Layer
from lpsn_tvm.passes.integer_ops import IntegerTensor, integer_call, result_attrs, scale_of
from lpsn_tvm.quant import Array, QuantizedWeight, QuantParams

INT32_MAX = 2**31 - 1
Interval = tuple[float, float]
EVERYTHING: Interval = (-np.inf, np.inf)


def lower_layer(
    layer: Layer,
    weight: QuantizedWeight,
    x: IntegerTensor,
    out: QuantParams | None,
    interval: Interval = EVERYTHING,
    residual: IntegerTensor | None = None,
) -> Any:
    """The integer call of a layer with its epilogue.

    Parameters
    ----------
    layer : Layer
        Canonical layer; its float weight is not read.
    weight : QuantizedWeight
        Integer weight in the layer's layout, its scales, the float bias.
    x : IntegerTensor
        Input.
    out : QuantParams or None
        Parameters of the result; None: the result is float32 (no interval, no residual).
    interval : (low, high)
        Real interval that the result is clamped to (ReLU: (0, inf)).
    residual : IntegerTensor, optional
        Added before the clamp.

    Raises
    ------
    QuantizeError
        The worst case of the accumulator does not fit int32, or a scale is not a positive number.
    """
    values, bias, channel_scale = integer_weight(layer, weight, x.params, out)
    if layer.kind != "conv2d_transpose":
        # Every output sums over the zero point as often as over its weights: padding writes the zero point, too.
        sums = rows_by_output(layer, values).astype(np.int64).sum(axis=1)
        bias = (bias.astype(np.int64) - x.zero_point * sums).astype(np.int32)
    if out is None:
        scale, attrs = channel_scale, {"out_dtype": "float32", "out_zero_point": 0, "qmin": 0, "qmax": 0}
    else:
        scale, attrs = channel_scale / scale_of(out), result_attrs(out, *interval)
    tensors = [x.expr, graph.constant(values), graph.constant(bias), graph.constant(scale.astype(np.float32))]
    attrs |= {"x_zero_point": x.zero_point, "x_qmax": x.params.qmax}
    if residual is not None and out is not None:
        tensors.append(residual.expr)
        attrs["residual_multiplier"] = residual.scale / scale_of(out)
        attrs["residual_zero_point"] = residual.zero_point
    return integer_call(f"lpsn.{layer.kind}", tensors, attrs | layer_attrs(layer), out_shape=layer.out_shape)


def layer_attrs(layer: Layer) -> dict[str, Any]:
    """Attributes of the layer's geometry."""
    names = () if layer.kind == "dense" else ("strides", "padding", "dilation", "groups")
    if layer.kind == "conv2d_transpose":
        names = (*names, "output_padding")
    return {name: layer.attrs[name] for name in names}


def integer_weight(
    layer: Layer, weight: QuantizedWeight, x: QuantParams, out: QuantParams | None = None, container_bits: int = 8
) -> tuple[Array, Array, Array]:
    """Integer weight, int32 bias (without zero-point term), float64 accumulator scale per output channel.

    The bias is rounded in units of the accumulator, so that unit must suit it: where the weights use so few bits that
    the rounding would show in the output, they are multiplied by a power of two (within `container_bits`) and the
    unit divided by it; a channel whose bias would leave int32 (a dead channel, usually) gets a coarser unit, its
    weights losing bits that are far below the bias's own float32 resolution.

    Raises
    ------
    QuantizeError
        The worst case of the accumulator does not fit int32, or a scale is not a positive number.
    """
    steps = np.asarray(weight.params.scale, np.float64).reshape(-1)
    scale = np.broadcast_to(steps, (layer.out_channels,)) * scale_of(x)
    bias = np.asarray(weight.bias, np.float64).reshape(-1)
    if not (np.all(np.isfinite(scale)) and np.all(scale > 0)):
        raise QuantizeError("weight and input scales must be positive numbers", where=layer.name)
    if not np.all(np.isfinite(bias)):
        raise QuantizeError("the bias is not finite", where=layer.name)
    values = np.asarray(weight.values).astype(np.int64)
    largest = _largest_input(layer, x)
    reach = np.abs(rows_by_output(layer, values)).sum(axis=1) * largest
    if np.any(reach >= INT32_MAX):
        raise QuantizeError(
            f"the worst case of its accumulator is {int(reach.max())}, above {INT32_MAX}; "
            "list it in `ignore` or use fewer bits",
            where=layer.name,
        )
    finer = _finer_unit(values, reach, scale, bias, out, container_bits)
    values, scale, reach = values * finer, scale / finer, reach * finer
    excess = np.abs(bias / scale) / np.minimum((INT32_MAX - reach) / 2, 2.0**30)
    if np.any(excess > 1):
        coarser = np.exp2(np.ceil(np.log2(np.maximum(excess, 1.0))))
        values = np.rint(values / per_output(layer, coarser, values.ndim))
        scale = scale * coarser
    return values.astype(np.int8), np.rint(bias / scale).astype(np.int32), scale


def _finer_unit(
    values: Array, reach: Array, scale: Array, bias: Array, out: QuantParams | None, container_bits: int
) -> int:
    """Power of two that brings the accumulator's unit below 1/16 of the output's step (float: of the largest bias)."""
    wanted = (float(np.abs(bias).max(initial=0.0)) if out is None else scale_of(out)) / 16
    if not np.any(bias) or wanted <= 0:
        return 1
    finer, limit = 1, (1 << (container_bits - 1)) - 1
    peak, most = int(np.abs(values).max(initial=1)), int(reach.max(initial=1))
    while scale.max() / finer > wanted and 2 * finer * peak <= limit and 2 * finer * most < INT32_MAX // 2:
        finer *= 2
    return finer


def _largest_input(layer: Layer, params: QuantParams) -> int:
    """Largest magnitude that an input integer has in the accumulation."""
    offset = params.zero_point if layer.kind == "conv2d_transpose" else 0
    largest = max(abs(params.qmin - offset), abs(params.qmax - offset))
    # The bias carries zero_point * sum(weight), which needs room too.
    return largest + (0 if layer.kind == "conv2d_transpose" else abs(params.zero_point))


def rows_by_output(layer: Layer, values: Array) -> Array:
    """The weight as a matrix [output channel, everything that the channel sums over]."""
    if layer.kind == "conv2d":
        return values.reshape(values.shape[0], -1)
    if layer.kind == "dense":
        return values.T
    channels, group_out, kh, kw = values.shape
    grouped = values.reshape(layer.groups, channels // layer.groups, group_out, kh * kw)
    return grouped.transpose(0, 2, 1, 3).reshape(layer.groups * group_out, -1)


def per_output(layer: Layer, vector: Array, ndim: int) -> Array:
    """`vector`, one value per output channel, in a shape that broadcasts against the weight."""
    if layer.kind == "conv2d":
        return vector.reshape((-1,) + (1,) * (ndim - 1))
    if layer.kind == "dense":
        return vector.reshape(1, -1)
    channels = layer.in_channels
    per_group = vector.reshape(layer.groups, 1, -1)
    shape = (layer.groups, channels // layer.groups, per_group.shape[2])
    return np.broadcast_to(per_group, shape).reshape(channels, -1, 1, 1)
