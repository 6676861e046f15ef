"""Concatenation: along channels, producers write into their blocks of the result where scales allow; what has to be
requantized, or cannot move, is copied there.
"""

from __future__ import annotations

from dataclasses import replace

from lpsn_tvm.quant import exponent_of
from lpsn_tvm.schedules.vta.ops import Plane, Store
from lpsn_tvm.targets.vta.forms import Form, Image, Value
from lpsn_tvm.targets.vta.gemm import Rectangle, operator
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.layout import ceil_div, image_shape
from lpsn_tvm.targets.vta.lower_context import Context, Placement, Unmapped
from lpsn_tvm.targets.vta.lower_elementwise import rescaled
from lpsn_tvm.targets.vta.network import SymbolicTensor

Part = tuple[Value, int]
"""An operand and the exponent of its multiplier."""


def lower_concat(context: Context, node: Node) -> None:
    """Any axis but the batch."""
    if len(node.variables) != len(node.operands):
        raise Unmapped("one of its operands is a constant")
    exponents = []
    for multiplier in node.attrs["multipliers"]:
        if multiplier != 1.0 and node.attrs.get("rounding") != "half_up":
            raise Unmapped("it requantizes by a multiplication, not by a shift")
        exponents.append(int(exponent_of(multiplier)))
    parts = list(zip((context.value(name) for name in node.variables), exponents, strict=True))
    rank = len(node.shape)
    axis = {2: (0, 1), 3: (0, 1, 3), 4: (0, 1, 2, 3)}[rank][int(node.attrs["axis"]) % rank]
    if axis == 0:
        raise Unmapped("it concatenates batches")
    if axis == 1:
        _along_channels(context, node, parts)
    else:
        _along_pixels(context, node, parts, axis)


def _limits(node: Node, parts: list[Part]) -> tuple[int, int]:
    """Range of the result; operands in its scale are copied, whatever they hold."""
    bounds = [(v.low, v.high) if e == 0 else (int(node.attrs["qmin"]), int(node.attrs["qmax"])) for v, e in parts]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def _along_pixels(context: Context, node: Node, parts: list[Part], axis: int) -> None:
    target = context.new_tensor(node, *_limits(node, parts))
    start = 0
    for index, part in enumerate(parts):
        image, plane = part[0].image, target.plane
        distance = plane.row_stride if axis == 2 else 1
        place = replace(plane, base=plane.base + start * distance, height=image[2], width=image[3])
        _copy(context, node, f"{node.name}.{index}", part, replace(target, image=image, plane=place))
        start += image[axis]


def _along_channels(context: Context, node: Node, parts: list[Part]) -> None:
    n, _, height, width = image_shape(node.shape)
    block, tiles = context.block, height * width
    placeable = _placeable(context, parts, (n, 0, height, width))
    blocks = [
        value.form.lanes // block if index in placeable else ceil_div(value.image[1], block)
        for index, (value, _) in enumerate(parts)
    ]
    total = sum(blocks)
    whole = Plane.dense(node.name, 0, context.batches(n), total, height, width)
    context.tensors[node.name] = SymbolicTensor("", context.layout((n, total * block, height, width)))
    channels: list[int] = []
    first_channel = first_block = 0
    for index, (part, count) in enumerate(zip(parts, blocks, strict=True)):
        value = part[0]
        if index in placeable:
            placement = Placement(node.name, first_block * tiles, whole.batch_stride)
            context.place(value.plane.region, placement)
            form = value.form
        else:
            plane = replace(whole, base=first_block * tiles, blocks=count)
            form = Form.plain(value.image[1], block)
            name = f"{node.name}.{index}"
            _copy(context, node, name, part, Value(name, value.image, plane, form, value.low, value.high))
        channels += [first_channel + channel if channel >= 0 else -1 for channel in form.channels]
        first_channel += value.image[1]
        first_block += count
    form = Form.plain(channels, block)
    result = Value(node.name, image_shape(node.shape), whole, form, *_limits(node, parts))
    if result.is_plain:
        context.tensors[node.name] = SymbolicTensor(node.name, context.layout(node.shape))
    context.define(node, result)


def _placeable(context: Context, parts: list[Part], image: Image) -> set[int]:
    """Operands whose producers can write into the result."""
    found: set[int] = set()
    regions: set[str] = set()
    for index, (value, exponent) in enumerate(parts):
        region = value.plane.region
        fits = exponent == 0 and value.form.is_one_pixel and value.image[2:] == image[2:]
        if fits and region not in regions and context.is_placeable(value):
            found.add(index)
            regions.add(region)
    return found


def _copy(context: Context, node: Node, name: str, part: Part, target: Value) -> None:
    """Emit `target = part`, requantized."""
    value, exponent = part
    result = Rectangle.of(target)
    low, high = (value.low, value.high) if exponent == 0 else (int(node.attrs["qmin"]), int(node.attrs["qmax"]))
    steps = rescaled(context, name, [part], result, low, high)
    context.emit(operator(name, context, result, [*steps, Store(target.plane)]))
