"""Weighted layers: convolutions (grouped, depthwise, dilated, transposed) and dense layers, with everything that is
fused behind them.

    taps x weights -> [maximum over windows] -> + bias + rounding -> >> s -> clamp -> store
    taps x weights -> + bias + rounding -> >> p -> + residual -> [maximum over windows] -> >> s -> clamp -> store

Padding with another number than 0 is a sum of constants behind the taps (`offset_padding`).
Maxima commute with the bias of a channel, the shift and the clamp, which are monotone, so a pooling that is the only
reader of a layer runs first and leaves fewer accumulators to the rest. A layer with float32 output leaves in planes of
the output's width, bias added, and the host scales it. A bias is one more reduction step where that pays (`bias`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lpsn_tvm.errors import CompileError
from lpsn_tvm.quant import exponent_of
from lpsn_tvm.schedules.vta.ops import Plane, Pool, Scalar, Step, Store
from lpsn_tvm.targets.vta.bias import bias_steps
from lpsn_tvm.targets.vta.epilogue import add_steps, clamp_steps, rounding_of, shift_steps, sum_range
from lpsn_tvm.targets.vta.first_layer import sources_of
from lpsn_tvm.targets.vta.forms import Array, Value
from lpsn_tvm.targets.vta.gemm import Rectangle, Windows, gemm, operator, scaled_identity
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.layout import ceil_div, image_shape
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped
from lpsn_tvm.targets.vta.lower_pool import pool_step
from lpsn_tvm.targets.vta.narrow import Narrow, narrow_result
from lpsn_tvm.targets.vta.network import HostStep, SymbolicTensor
from lpsn_tvm.targets.vta.offset_padding import padding_steps
from lpsn_tvm.targets.vta.taps import Window


@dataclass(frozen=True)
class WeightedLayer:
    """A layer's geometry and constants: weight int[O, C / groups, kh, kw] whatever the operator."""

    node: Node
    weight: Array
    groups: int
    windows: Windows
    bias: Array
    scale: Array
    residual: str | None
    padding_value: int = 0

    @property
    def macs(self) -> int:
        """Useful multiply-accumulates."""
        n, _, height, width = image_shape(self.node.shape)
        if self.windows[0].is_transposed:
            height, width = (ceil_div(e, w.stride) for e, w in zip((height, width), self.windows, strict=True))
        return int(n * height * width * self.weight.size)


def lower_layer(context: Context, node: Node) -> None:
    """conv2d, conv2d_transpose and dense."""
    layer = read_layer(context, node)
    _check_weights(context, layer)
    pooling = None if node.attrs["out_dtype"] == "float32" else _fused_pool(context, node)
    name = node.name if pooling is None else pooling.name
    narrow = narrow_result(context, node, pooling, layer.windows)
    result = Rectangle.plain(image_shape(node.shape), context.block) if narrow is None else narrow.rectangle
    sums, sum_reach = _sums(context, layer, result, narrow, name)
    if node.attrs["out_dtype"] == "float32":
        _emit_accumulators(context, layer, result, sums, sum_reach)
        return
    pool = None if pooling is None else pool_step(pooling)
    if pool is not None and narrow is not None:
        pool = replace(pool, width=narrow.tiles)
    steps, reach = _requantized(context, layer, result, name, sum_reach, pool)
    qmin, qmax = int(node.attrs["qmin"]), int(node.attrs["qmax"])
    clamp = clamp_steps(qmin, qmax, reach)
    last = node if pooling is None else pooling
    target = context.new_tensor(last, qmin, qmax)
    if narrow is not None:
        target = _in_neighbours(context, last, target, narrow)
    if pooling is not None:
        context.fused.add(pooling.name)
    context.emit(operator(name, context, result, [*sums, *steps, *clamp, Store(target.plane)], layer.macs))


def read_layer(context: Context, node: Node) -> WeightedLayer:
    """Geometry and constants of a weighted operator.

    Raises
    ------
    Unmapped
        Rounding other than half up, or operands without a mapping.
    """
    attrs = node.attrs
    if attrs.get("rounding") != "half_up":
        raise Unmapped("it is requantized by a multiplication, not by a shift")
    weight, bias, scale = node.constant(1), node.constant(2), np.asarray(node.constant(3), np.float32)
    residual = node.variable(4) if len(node.operands) > 4 else None
    padding_value = int(attrs.get("x_zero_point", 0))
    scale = np.broadcast_to(scale.reshape(-1), bias.reshape(-1).shape)
    if node.op == "lpsn.dense":
        if len(node.shape) != 2:
            raise Unmapped(f"a dense layer on a tensor of {len(node.shape)} axes")
        weight, groups = weight.T[:, :, None, None], 1
        windows: Windows = (Window(), Window())
    else:
        groups = int(attrs["groups"])
        is_transposed = node.op == "lpsn.conv2d_transpose"
        if is_transposed and padding_value:
            raise Unmapped("its input has an offset")
        weight = _transposed_weight(weight, groups) if is_transposed else weight
        axes = zip(weight.shape[2:], attrs["strides"], attrs["padding"][:2], attrs["dilation"], strict=True)
        y, x = (Window(int(k), int(s), int(p), int(d), is_transposed) for k, s, p, d in axes)
        windows = (y, x)
    bias = bias.reshape(-1).astype(np.int64)
    return WeightedLayer(node, weight, groups, windows, bias, scale, residual, padding_value)


def _transposed_weight(weight: Array, groups: int) -> Array:
    """[C, O / groups, kh, kw] -> [O, C / groups, kh, kw]."""
    channels, per_group, kh, kw = weight.shape
    grouped = weight.reshape(groups, channels // groups, per_group, kh, kw).transpose(0, 2, 1, 3, 4)
    return grouped.reshape(groups * per_group, channels // groups, kh, kw)


def _check_weights(context: Context, layer: WeightedLayer) -> None:
    limit = 1 << (context.config.wgt_bits - 1)
    low, high = int(layer.weight.min(initial=0)), int(layer.weight.max(initial=0))
    if low < -limit or high >= limit:
        raise Unmapped(f"its weights {low}..{high} do not fit {context.config.wgt_bits} bits")


def _fused_pool(context: Context, node: Node) -> Node | None:
    """The max pooling behind the layer, if nobody else reads the layer and it can run on the accumulators."""
    consumer = context.graph.only_consumer(node.name)
    if consumer is None or consumer.op != "lpsn.max_pool2d" or len(node.shape) != 4:
        return None
    try:
        pool_step(consumer)
    except Unmapped:
        return None
    return consumer


def _in_neighbours(context: Context, node: Node, plain: Value, narrow: Narrow) -> Value:
    """The result with several pixels per tile, in a tensor that the host cannot read."""
    n, _, height, _ = plain.image
    context.tensors[node.name] = SymbolicTensor("", context.layout((n, narrow.block, height, narrow.tiles)))
    plane = Plane.dense(node.name, 0, plain.plane.batches, 1, height, narrow.tiles)
    value = replace(plain, plane=plane, form=narrow.form)
    context.define(node, value)
    return value


def _sums(
    context: Context, layer: WeightedLayer, result: Rectangle, narrow: Narrow | None, name: str
) -> tuple[list[Step], tuple[Array, Array]]:
    """Taps over all parts of the input, and the range of the sums with the bias."""
    variable, windows = layer.node.variable(0), layer.windows
    rectangles = (result,) if narrow is None else narrow.columns
    steps: list[Step] = []
    for sources, doubles in sources_of(context, name, variable, layer.groups, windows, rectangles):
        for column, (source, part) in enumerate(zip(sources, rectangles, strict=True)):
            step = gemm(context, f"{name}.weights", source, part, windows, layer.weight, layer.groups)
            steps.append(step if narrow is None else narrow.placed(step, column))
        steps += [Scalar("double")] * doubles
    extents, value = context.image(variable)[2:], layer.padding_value
    for column, part in enumerate(rectangles):
        added = padding_steps(context, name, layer.weight, windows, extents, part, value)
        steps += added if narrow is None else [narrow.placed(step, column) for step in added]
    smallest, largest = context.ranges[variable]
    low, high = sum_range(layer.weight, min(smallest, value), max(largest, value))
    return steps, (low + layer.bias, high + layer.bias)


def _requantized(
    context: Context,
    layer: WeightedLayer,
    result: Rectangle,
    name: str,
    reach: tuple[Array, Array],
    pooling: Pool | None,
) -> tuple[list[Step], tuple[int, int]]:
    """Bias, residual, pooling and shift (`quant._finish_half_up`), and the range of what comes out."""
    shift = -exponent_of(layer.scale)
    if np.any(shift < 0):
        raise CompileError("its accumulator's unit is coarser than its output's", where=layer.node.name)
    drop, low, high = np.zeros_like(shift), *reach
    steps: list[Step] = []
    if layer.residual is not None:
        left = shift + int(exponent_of(layer.node.attrs["residual_multiplier"]))
        drop = np.maximum(left - int(layer.node.attrs["residual_shift"]), 0)
        if np.any(left < 0) or np.any(shift < drop):
            raise CompileError("its residual's scale is too far from its accumulator's", where=layer.node.name)
    rest = shift - drop
    rounding = rounding_of(rest) << drop
    tiles = result.tiles
    if pooling is not None and layer.residual is None:
        steps.append(pooling)
        tiles = pooling.height, pooling.width
    steps += bias_steps(context, name, result, tiles, layer.bias + rounding)
    steps += shift_steps(context, f"{name}.drop", result.form, drop)
    low, high = (low + rounding) >> drop, (high + rounding) >> drop
    if layer.residual is not None:
        other = context.value(layer.residual)
        if other.image != result.image:
            raise Unmapped("its residual has another shape")
        steps += scaled_identity(context, f"{name}.residual", other, result, left - drop)
        low, high = low + (other.low << (left - drop)), high + (other.high << (left - drop))
    if pooling is not None and layer.residual is not None:
        steps.append(pooling)
    steps += shift_steps(context, name, result.form, rest)
    return steps, (int((low >> rest).min()), int((high >> rest).max()))


def _emit_accumulators(
    context: Context, layer: WeightedLayer, result: Rectangle, sums: list[Step], reach: tuple[Array, Array]
) -> None:
    """Accumulators with the bias, in as many planes of the output's width as their range needs; the host scales."""
    node, bits = layer.node, context.config.out_bits
    needed = 1 + max(int(reach[1].max()).bit_length(), int(-reach[0].min() - 1).bit_length())
    planes = max(2, ceil_div(needed, bits))
    sums += add_steps(context, node.name, result.form, layer.bias)
    name = f"{node.name}.acc"
    layout = context.layout(node.shape, planes)
    context.tensors[name] = SymbolicTensor(name, layout)
    plane = Plane.dense(name, 0, layout.batches, layout.blocks, layout.height, layout.width)
    for index in range(planes):
        if index:
            sums.append(Scalar("shr", bits))
        sums.append(Store(replace(plane, base=index * layout.plane_tiles)))
    context.emit(operator(node.name, context, result, sums, layer.macs))
    context.shapes[node.name] = node.shape
    context.on_host |= {name, node.name}
    reason = "float32 output: scales the accelerator's int32 sums"
    context.emit(HostStep("vta.scale", (name, "scale"), node.name, {}, {"scale": layer.scale}, reason))
