"""Poolings, resizes and operators that only move values, in integers.

Each function takes the Relax call and its integer operand and returns the integer call, or None where integers cannot
express it (the caller then leaves the operator float). Operators that keep the scale return integers of the operand's
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lpsn_tvm import graph
from lpsn_tvm.passes.integer_ops import IntegerTensor, integer_call, result_attrs, scale_of
from lpsn_tvm.quant import QuantParams, Rounding

MOVE_ONLY = "relax.reshape relax.squeeze relax.expand_dims relax.flatten relax.nn.batch_flatten".split()
PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "edge": "edge"}
LINEAR_ONE = 128


def integers(expr: Any) -> tuple[int, ...]:
    """The integers of a ShapeExpr or of a tuple of them."""
    fields = expr.values if hasattr(expr, "values") else expr.fields
    return tuple(int(getattr(field, "value", field)) for field in fields)


# --- operators that keep the scale ----------------------------------------------------------------------------------


def lower_max_pool2d(call: Any, x: IntegerTensor) -> Any:
    """max_pool2d, dilation and ceil mode included."""
    attrs = graph.call_attrs(call)
    kept = {name: attrs[name] for name in ("strides", "padding", "dilation", "ceil_mode")}
    return integer_call("lpsn.max_pool2d", [x.expr], {"kernel": attrs["pool_size"], **kept}, graph.shape_of(call))


def lower_global_max(call: Any, x: IntegerTensor) -> Any:
    """Maximum over all of H and W: one window."""
    attrs = {"kernel": graph.shape_of(x.expr)[2:], "strides": (1, 1), "padding": (0, 0, 0, 0)}
    return integer_call("lpsn.max_pool2d", [x.expr], attrs, graph.shape_of(call))


def lower_reshape(call: Any, x: IntegerTensor) -> Any:
    """reshape, squeeze, expand_dims, flatten: all one row-major reshape to the result's shape."""
    return integer_call("lpsn.reshape", [x.expr], {"shape": graph.shape_of(call)})


def lower_transpose(call: Any, x: IntegerTensor) -> Any:
    """permute_dims."""
    rank = len(graph.shape_of(x.expr))
    axes = graph.call_attrs(call)["axes"] or tuple(reversed(range(rank)))
    return integer_call("lpsn.transpose", [x.expr], {"axes": [int(axis) % rank for axis in axes]}, graph.shape_of(call))


def lower_strided_slice(call: Any, x: IntegerTensor) -> Any:
    """strided_slice with constant bounds; negative and oversized bounds are resolved."""
    shape = graph.shape_of(x.expr)
    axes = [axis % len(shape) for axis in integers(call.args[1])]
    strides = integers(call.args[4]) if len(call.args) > 4 else (1,) * len(axes)
    resolved = [
        slice(begin, end, stride).indices(shape[axis])
        for axis, begin, end, stride in zip(axes, integers(call.args[2]), integers(call.args[3]), strides, strict=True)
    ]
    begin, end, step = ([item[k] for item in resolved] for k in range(3))
    attrs = {"axes": axes, "begin": begin, "end": end, "strides": step}
    return integer_call("lpsn.strided_slice", [x.expr], attrs, graph.shape_of(call))


def lower_pad(call: Any, x: IntegerTensor) -> Any | None:
    """Spatial padding by a constant, by reflection or by replication; other axes stay float."""
    attrs = graph.call_attrs(call)
    widths = attrs["pad_width"]
    mode = PAD_MODES.get(attrs["pad_mode"])
    if len(widths) != 8 or any(widths[:4]) or any(width < 0 for width in widths) or mode is None:
        return None
    if mode == "reflect" and any(
        w >= e for w, e in zip(widths[4:], np.repeat(graph.shape_of(x.expr)[2:], 2), strict=True)
    ):
        return None
    top, bottom, left, right = widths[4:]
    value = np.rint(float(attrs["pad_value"]) / x.scale) + x.zero_point
    value = int(np.clip(value, x.params.qmin, x.params.qmax))
    return integer_call(
        "lpsn.pad",
        [x.expr],
        {"pad_width": [top, left, bottom, right], "value": value, "mode": mode},
        graph.shape_of(call),
    )


def lower_depth_to_space(x: IntegerTensor, block_size: int, mode: str) -> Any:
    """DepthToSpace, however the graph spells it (`find_depth_to_space`)."""
    return integer_call("lpsn.depth_to_space", [x.expr], {"block_size": block_size, "mode": mode})


def lower_resize(call: Any, x: IntegerTensor) -> Any | None:
    """Nearest and linear resize2d; cubic and cropping stay float."""
    attrs = graph.call_attrs(call)
    transform = attrs["coordinate_transformation_mode"]
    if attrs["layout"] != "NCHW" or transform == "tf_crop_and_resize":
        return None
    sizes = list(zip(graph.shape_of(x.expr)[2:], graph.shape_of(call)[2:], strict=True))
    if attrs["method"] == "nearest_neighbor":
        rows, columns = (nearest_index(a, b, transform, attrs["rounding_method"]) for a, b in sizes)
        return integer_call("lpsn.resize_nearest", [x.expr], {"rows": rows, "columns": columns}, graph.shape_of(call))
    if attrs["method"] == "linear":
        (rows, row_weights), (columns, column_weights) = (linear_index(a, b, transform) for a, b in sizes)
        taps: dict[str, Any] = {"rows": rows, "row_weights": row_weights}
        taps |= {"columns": columns, "column_weights": column_weights, "qmin": x.params.qmin, "qmax": x.params.qmax}
        return integer_call("lpsn.resize_linear", [x.expr], taps, graph.shape_of(call))
    return None


def source_coordinate(size: int, target: int, transform: str) -> Sequence[float]:
    """Where each output pixel lies in the input, as TVM's resize2d computes it."""
    out = np.arange(target, dtype=np.float64)
    ratio = size / target
    if transform == "align_corners":
        return [float(v) for v in out * ((size - 1) / (target - 1) if target > 1 else 0.0)]
    if transform == "asymmetric":
        return [float(v) for v in out * ratio]
    if transform == "tf_half_pixel_for_nn":
        return [float(v) for v in (out + 0.5) * ratio]
    if transform == "pytorch_half_pixel" and target <= 1:
        return [0.0] * target
    return [float(v) for v in (out + 0.5) * ratio - 0.5]


def nearest_index(size: int, target: int, transform: str, rounding: str) -> list[int]:
    """Input index of each output index for nearest-neighbour resizing."""
    # 1e-5 absorbs float noise of ratios such as 1/3; TVM's resize does the same for floor and ceil.
    rules: dict[str, Callable[[float], float]] = {
        "round": lambda v: math.floor(v + 0.5),
        "round_prefer_floor": lambda v: math.ceil(v - 0.5 - 1e-9),
        "round_prefer_ceil": lambda v: math.floor(v + 0.5 + 1e-9),
        "floor": lambda v: math.floor(v + 1e-5),
        "ceil": lambda v: math.ceil(v - 1e-5),
    }
    rule = rules[rounding or ("round" if transform == "align_corners" else "floor")]
    return [min(max(int(rule(v)), 0), size - 1) for v in source_coordinate(size, target, transform)]


def linear_index(size: int, target: int, transform: str) -> tuple[list[int], list[int]]:
    """Two input indices and two weights of sum 128 per output index, interleaved, for linear resizing."""
    indices, weights = [], []
    for v in source_coordinate(size, target, transform):
        low = math.floor(v)
        second = round((v - low) * LINEAR_ONE)
        indices += [min(max(low, 0), size - 1), min(max(low + 1, 0), size - 1)]
        weights += [LINEAR_ONE - second, second]
    return indices, weights


# --- operators that choose a new scale ------------------------------------------------------------------------------


def lower_avg_pool2d(
    call: Any, x: IntegerTensor, out: QuantParams, interval: tuple[float, float], rounding: Rounding = "half_even"
) -> Any:
    """avg_pool2d."""
    attrs = graph.call_attrs(call)
    kept = {name: attrs[name] for name in ("strides", "padding", "ceil_mode", "count_include_pad")}
    kept |= {"kernel": attrs["pool_size"], "in_zero_point": x.zero_point, "multiplier": x.scale / scale_of(out)}
    kept["rounding"] = rounding
    return integer_call("lpsn.avg_pool2d", [x.expr], kept | result_attrs(out, *interval), graph.shape_of(call))


def lower_global_avg_pool2d(
    x: IntegerTensor, out: QuantParams, interval: tuple[float, float], rounding: Rounding = "half_even"
) -> Any:
    """Mean over H and W, kept as extents of 1."""
    height, width = graph.shape_of(x.expr)[2:]
    attrs: dict[str, Any] = {"in_zero_point": x.zero_point, "multiplier": x.scale / scale_of(out) / (height * width)}
    attrs["rounding"] = rounding
    return integer_call("lpsn.global_avg_pool2d", [x.expr], attrs | result_attrs(out, *interval))


def is_global_average(call: Any) -> bool:
    """Whether `call` averages all of H and W and keeps the rank."""
    attrs = graph.call_attrs(call)
    if graph.op_name(call) == "relax.mean":
        axes = sorted(int(axis) % 4 for axis in attrs["axis"] or ())
        return len(graph.shape_of(call.args[0])) == 4 and axes == [2, 3] and bool(attrs["keepdims"])
    return graph.op_name(call) == "relax.nn.adaptive_avg_pool2d" and graph.shape_of(call)[2:] == (1, 1)


def lower_concat(call: Any, parts: Sequence[IntegerTensor], out: QuantParams) -> Any:
    """Concatenation; parts that already have the result's scale are copied."""
    target = scale_of(out)
    attrs: dict[str, Any] = {
        "axis": concat_axis(call),
        "multipliers": [part.scale / target for part in parts],
        "zero_points": [part.zero_point for part in parts],
    }
    return integer_call("lpsn.concat", [part.expr for part in parts], attrs | result_attrs(out), graph.shape_of(call))


def concat_axis(call: Any) -> int:
    """Non-negative axis of a concatenation."""
    return int(graph.call_attrs(call)["axis"]) % len(graph.shape_of(call))


# --- DepthToSpace ---------------------------------------------------------------------------------------------------

_PERMUTATIONS = {(0, 3, 4, 1, 5, 2): "DCR", (0, 1, 4, 2, 5, 3): "CRD"}


def match_depth_to_space(
    call: Any, definitions: dict[str, Any], single_use: Callable[[str], bool]
) -> tuple[Any, int, str, list[str]] | None:
    """Recognize DepthToSpace that ends in `call`: (source, block size, mode, names of the absorbed variables), or None.

    reshape(permute_dims(reshape(x, [n, b, b, c, h, w]), [0, 3, 4, 1, 5, 2])) -> x, b, "DCR"; [n, c, b, b, h, w] and
    [0, 1, 4, 2, 5, 3]: "CRD".
    """
    if graph.op_name(call) == "relax.nn.pixel_shuffle":
        return call.args[0], int(graph.call_attrs(call)["upscale_factor"]), "CRD", []
    if graph.op_name(call) != "relax.reshape" or not hasattr(call.args[0], "name"):
        return None
    permuted: Any = definitions.get(call.args[0].name)
    if graph.op_name(permuted) != "relax.permute_dims" or not hasattr(permuted.args[0], "name"):
        return None
    mode = _PERMUTATIONS.get(tuple(graph.call_attrs(permuted)["axes"] or ()))
    split: Any = definitions.get(permuted.args[0].name)
    if mode is None or graph.op_name(split) != "relax.reshape" or len(graph.shape_of(split.args[0])) != 4:
        return None
    absorbed = [call.args[0].name, permuted.args[0].name]
    n, channels, height, width = graph.shape_of(split.args[0])
    six = graph.shape_of(split)
    block = six[2]
    part = channels // (block * block)
    wanted = (n, block, block, part, height, width) if mode == "DCR" else (n, part, block, block, height, width)
    if six != wanted or graph.shape_of(call) != (n, part, height * block, width * block):
        return None
    return (split.args[0], block, mode, absorbed) if all(single_use(name) for name in absorbed) else None
