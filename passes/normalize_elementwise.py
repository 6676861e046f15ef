"""One spelling per elementwise function.

Rules:
1. `add`, `multiply`, `maximum`, `minimum` with a constant have it second.
2. `x - c -> x + (-c)`, `x / c -> x * (1/c)`, `c - x -> (x * -1) + c`.
3. A constant with one element that broadcasts to nothing has rank 0; a per-channel constant has shape [1, C, 1, 1] or
   [C].
4. `maximum(x, 0) -> relu`; `minimum(maximum(x, lo), hi)` and the reverse -> `clip`; `clip` has float bounds, and
   without finite ones is relu, maximum or minimum.
5. `multiply(x, sigmoid(x)) -> silu`; `power(x, 2) -> square`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.constants import per_channel, scalar_value

op = relax.op
_COMMUTES = {"relax.add", "relax.multiply", "relax.maximum", "relax.minimum"}
_BINARY = {*_COMMUTES, "relax.subtract", "relax.divide", "relax.power"}


def normalize_elementwise(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Apply the rules above.

    Parameters
    ----------
    mod : IRModule
        Any module of one dataflow block.
    renamed : dict
        Gets values that turned out to be their own operand.
    """
    consumers = graph.consumers_of(mod)

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        name = graph.op_name(value)
        if name == "relax.clip":
            return _clip(value, lookup)
        if name not in _BINARY:
            return None
        left, right = (lookup(argument) for argument in value.args)
        if graph.is_constant(left) and graph.is_constant(right):
            return None
        if name in _COMMUTES and graph.is_constant(left):
            left, right = right, left
        if graph.is_constant(left):
            return _constant_first(builder, var, name, left, right)
        if graph.is_constant(right):
            return _constant_second(builder, name, left, right, len(consumers.get(graph_name(value), [])) == 1)
        if name == "relax.multiply":
            data = _silu(builder, left, right)
            return op.multiply(left, right) if data is None else op.nn.silu(data)
        return None

    return graph.rebuild(mod, rewrite)


def graph_name(call: Any) -> str:
    """Name of the variable operand of a binary call with one constant."""
    return next((str(argument.name) for argument in call.args if isinstance(argument, relax.Var)), "")


def _shaped(constant: Any, tensor: Any) -> Any:
    """Rule 3."""
    value, shape = graph.constant_value(constant), graph.shape_of(tensor)
    if np.broadcast_shapes(value.shape, shape) != shape:
        return constant
    if value.size == 1:
        return constant if value.ndim == 0 else graph.constant(value.reshape(()))
    if len(shape) in (2, 4):
        channels = per_channel(value, shape)
        if channels is not None:
            return graph.constant(channels if len(shape) == 2 else channels.reshape(1, -1, 1, 1))
    return constant


def _constant_first(builder: Any, var: Any, name: str, left: Any, right: Any) -> Any:
    left = _shaped(left, right)
    if name == "relax.subtract":
        return op.add(
            graph.emit_named(builder, op.multiply(right, relax.const(-1.0, "float32")), f"{var.name}.neg"), left
        )
    return {"relax.divide": op.divide, "relax.power": op.power}[name](left, right)


def _constant_second(builder: Any, name: str, left: Any, right: Any, single: bool) -> Any:
    right = _shaped(right, left)
    number = scalar_value(right)
    if name == "relax.subtract":
        return op.add(left, graph.constant(-graph.constant_value(right)))
    if name == "relax.divide":
        return op.multiply(
            left, graph.constant((1.0 / graph.constant_value(right).astype(np.float64)).astype(np.float32))
        )
    if name in ("relax.maximum", "relax.minimum") and number is not None:
        clipped = _bounded(
            builder, left, "relax.minimum" if name == "relax.maximum" else "relax.maximum", number, single
        )
        if clipped is not None:
            return clipped
        if name == "relax.maximum" and number == 0.0:
            return op.nn.relu(left)
    if name == "relax.power" and number == 2.0:
        return op.square(left)
    return {
        "relax.add": op.add,
        "relax.multiply": op.multiply,
        "relax.maximum": op.maximum,
        "relax.minimum": op.minimum,
        "relax.power": op.power,
    }[name](left, right)


def _bounded(builder: Any, data: Any, other: str, bound: float, single: bool) -> Any:
    """Rule 4: the second half of a clip, if `data` is the first half and nobody else reads it."""
    producer = builder.lookup_binding(data) if single and isinstance(data, relax.Var) else None
    if producer is None:
        return None
    first = scalar_value(producer.args[1]) if graph.op_name(producer) == other else None
    if graph.op_name(producer) == "relax.nn.relu" and other == "relax.maximum":
        first = 0.0
    if first is None:
        return None
    low, high = (first, bound) if other == "relax.maximum" else (bound, first)
    return op.clip(producer.args[0], low, high) if low <= high else None


def _clip(call: Any, lookup: Any) -> Any:
    data, low, high = lookup(call.args[0]), *(float(bound.value) for bound in call.args[1:3])
    if math.isfinite(low) and math.isfinite(high):
        return op.clip(data, low, high)
    if math.isfinite(low):
        return op.nn.relu(data) if low == 0.0 else op.maximum(data, relax.const(low, "float32"))
    return op.minimum(data, relax.const(high, "float32")) if math.isfinite(high) else data


def _silu(builder: Any, left: Any, right: Any) -> Any:
    """Rule 5: the tensor of which one operand is the sigmoid and the other is the tensor itself."""
    for data, gate in ((left, right), (right, left)):
        producer = builder.lookup_binding(gate) if isinstance(gate, relax.Var) else None
        if producer is not None and graph.op_name(producer) == "relax.sigmoid" and producer.args[0].same_as(data):
            return data
    return None
