"""Single Relax operators -> the float call of the same meaning: pooling, resize, data movement, normalization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.float_calls import float_call
from lpsn_tvm.passes.integer_ops import IntegerTensor
from lpsn_tvm.passes.lower_shapes import (
    PAD_MODES,
    is_global_average,
    lower_max_pool2d,
    lower_reshape,
    lower_strided_slice,
    lower_transpose,
    nearest_index,
    source_coordinate,
)
from lpsn_tvm.passes.operator_rules import Node
from lpsn_tvm.quant import QuantParams

Lookup = Callable[[Any], Any]
_UNREAD = QuantParams(np.ones((), np.float32), 0, 8, signed=False)


def single_call(node: Node) -> Callable[[Lookup], Any] | None:
    """A function that makes the float call of one node from its new operands; None where there is none."""
    call = node.call
    operands = list(call.args[0].fields) if call.args and isinstance(call.args[0], relax.Tuple) else list(call.args[:1])
    tensors = [operand for operand in operands if isinstance(operand, relax.Var)]
    if len(tensors) != len(operands) or not tensors or not isinstance(call.op, tvm.ir.Op):
        return None
    if any(graph.dtype_of(expr) != "float32" or not graph.shape_of(expr) for expr in (*tensors, call)):
        return None
    described = _describe(node.op, call)
    if described is None:
        return None
    op, constants, attrs = described
    shape = graph.shape_of(call)
    return lambda lookup: float_call(op, [*(lookup(tensor) for tensor in tensors), *constants], attrs, shape)


def _describe(op: str, call: Any) -> tuple[str, list[Any], dict[str, Any]] | None:
    """(float operator, constant operands, attributes)."""
    attrs = graph.call_attrs(call)
    if op in _MOVES:
        # The integer form has the same attributes; its operand's parameters are not read.
        moved = _MOVES[op](call, IntegerTensor(call.args[0], _UNREAD))
        return "lpsn.float_" + graph.op_name(moved).removeprefix("lpsn."), [], graph.call_attrs(moved)
    if op == "relax.nn.avg_pool2d":
        if tuple(attrs["dilation"]) != (1, 1):
            return None
        kept = {name: attrs[name] for name in ("strides", "padding", "ceil_mode", "count_include_pad")}
        return "lpsn.float_avg_pool2d", [], {"kernel": attrs["pool_size"], **kept}
    if is_global_average(call):
        return "lpsn.float_global_avg_pool2d", [], {}
    if op == "relax.concat":
        return "lpsn.float_concat", [], {"axis": int(attrs["axis"]) % len(graph.shape_of(call))}
    if op == "relax.nn.softmax":
        return "lpsn.float_softmax", [], {"axis": int(attrs["axis"]) % len(graph.shape_of(call))}
    if op == "relax.nn.pixel_shuffle" and len(graph.shape_of(call)) == 4:
        return "lpsn.float_depth_to_space", [], {"block_size": int(attrs["upscale_factor"]), "mode": "CRD"}
    special = {"relax.nn.pad": _pad, "relax.image.resize2d": _resize, "relax.nn.instance_norm": _instance_norm}
    return special[op](call, attrs) if op in special else None


def _pad(call: Any, attrs: dict[str, Any]) -> tuple[str, list[Any], dict[str, Any]] | None:
    width, mode = [int(item) for item in attrs["pad_width"]], PAD_MODES.get(str(attrs["pad_mode"]))
    if len(width) != 8 or any(width[:4]) or min(width) < 0 or mode is None:
        return None
    top, bottom, left, right = width[4:]
    value = float(attrs["pad_value"])
    return "lpsn.float_pad", [], {"pad_width": [top, left, bottom, right], "value": value, "mode": mode}


def _resize(call: Any, attrs: dict[str, Any]) -> tuple[str, list[Any], dict[str, Any]] | None:
    transform = str(attrs["coordinate_transformation_mode"])
    if attrs["layout"] != "NCHW" or transform == "tf_crop_and_resize":
        return None
    sizes = list(zip(graph.shape_of(call.args[0])[2:], graph.shape_of(call)[2:], strict=True))
    if attrs["method"] == "nearest_neighbor":
        rows, columns = (nearest_index(a, b, transform, str(attrs["rounding_method"])) for a, b in sizes)
        return "lpsn.float_resize_nearest", [], {"rows": rows, "columns": columns}
    if attrs["method"] == "linear":
        (rows, row_weights), (columns, column_weights) = (_linear_weights(a, b, transform) for a, b in sizes)
        plan = {"rows": rows, "row_weights": row_weights, "columns": columns, "column_weights": column_weights}
        return "lpsn.float_resize_linear", [], plan
    return None


def _linear_weights(size: int, target: int, transform: str) -> tuple[list[int], list[float]]:
    """Two input indices and two weights per output index, interleaved."""
    indices, weights = [], []
    for position in source_coordinate(size, target, transform):
        low = math.floor(position)
        indices += [min(max(low, 0), size - 1), min(max(low + 1, 0), size - 1)]
        weights += [1.0 - (position - low), position - low]
    return indices, weights


def _instance_norm(call: Any, attrs: dict[str, Any]) -> tuple[str, list[Any], dict[str, Any]] | None:
    scale, shift = call.args[1], call.args[2]
    rank = len(graph.shape_of(call))
    axes = sorted(int(axis) % rank for axis in attrs["axes"])
    if rank != 4 or axes != [2, 3] or int(attrs["channel_axis"]) % rank != 1:
        return None
    if not (graph.is_constant(scale) and graph.is_constant(shift)):
        return None
    flat = [graph.constant(graph.constant_value(item).reshape(-1)) for item in (scale, shift)]
    return "lpsn.float_instance_norm", flat, {"epsilon": float(attrs["epsilon"])}


_MOVES: dict[str, Callable[[Any, Any], Any]] = {
    "relax.nn.max_pool2d": lower_max_pool2d,
    "relax.permute_dims": lower_transpose,
    "relax.strided_slice": lower_strided_slice,
    **{f"relax.{name}": lower_reshape for name in ("reshape", "squeeze", "expand_dims", "flatten", "nn.batch_flatten")},
}
