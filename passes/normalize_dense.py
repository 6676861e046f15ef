"""Dense layers over more than two dimensions, and dense layers behind a channels-last flatten, become `matmul(x[N, K],
Const[K, M])`.

1. Before: `y = matmul(x[N, T, K], W)`; after: `y.rows = reshape(x, [N*T, K]); y = matmul(y.rows, W); y.shape =
   reshape(y, [N, T, M])`; an `add` of a constant [M] that alone reads y becomes the bias, in front of the reshape.
2. Before: `t = permute_dims(x, NCHW->NHWC); f = reshape(t, [N, K]); y = matmul(f, W)`; after: `f = reshape(x, [N, K]);
   y = matmul(f, W with rows permuted)`.
3. `matmul(Const, x[K, M])` stays: it is no layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph

op = relax.op


def normalize_dense(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Apply the rules above.

    Parameters
    ----------
    mod : IRModule
        Any module of one dataflow block.
    renamed : dict
        Untouched.
    """
    users = graph.consumers_of(mod)
    calls = {var.name: value for var, value in graph.bindings(mod)}
    flattened = {
        name: call
        for name, value in calls.items()
        if (call := _channels_last_flatten(value, calls, users, name)) is not None
    }
    if not flattened and not any(_is_wide(call) for call in calls.values()):
        return mod
    wide: dict[str, Any] = {}  # matmul over many dimensions whose only reader adds a constant [M]

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        name = graph.op_name(value)
        if var.name in flattened:
            return op.reshape(lookup(flattened[var.name].args[0]), graph.shape_of(var))
        if (
            name == "relax.add"
            and isinstance(value.args[0], relax.Var)
            and value.args[0].name in wide
            and graph.is_constant(value.args[1])
        ):
            name, rows = value.args[0].name, wide[value.args[0].name]
            added = graph.emit_named(
                builder, op.add(rows, graph.constant(graph.constant_value(value.args[1]).reshape(-1))), name
            )
            return op.reshape(added, graph.shape_of(var))
        if name != "relax.matmul" or not graph.is_constant(value.args[1]) or graph.is_constant(value.args[0]):
            return None
        weight = graph.constant_value(value.args[1])
        source = value.args[0].name
        if source in flattened:
            return op.matmul(lookup(value.args[0]), graph.constant(_permuted_rows(weight, flattened[source])))
        if _is_wide(value):
            return _as_rows(builder, var, lookup(value.args[0]), value.args[1], wide, users, calls)
        return None

    return graph.rebuild(mod, rewrite)


def _is_wide(call: Any) -> bool:
    """A dense layer over more or fewer than two dimensions."""
    if graph.op_name(call) != "relax.matmul" or not graph.is_constant(call.args[1]) or graph.is_constant(call.args[0]):
        return False
    return len(graph.shape_of(call.args[1])) == 2 and len(graph.shape_of(call.args[0])) != 2


def _as_rows(
    builder: Any,
    var: Any,
    data: Any,
    weight: Any,
    wide: dict[str, Any],
    users: dict[str, list[str]],
    calls: dict[str, Any],
) -> Any:
    depth, width = graph.shape_of(weight)
    rows = graph.emit_named(
        builder, op.reshape(data, (int(np.prod(graph.shape_of(data))) // depth, depth)), f"{var.name}.rows"
    )
    readers = users.get(var.name, [])
    if len(readers) == 1 and readers[0] and graph.op_name(calls[readers[0]]) == "relax.add":
        addend = calls[readers[0]].args[1]
        if (
            graph.is_constant(addend)
            and graph.constant_value(addend).size == width == graph.constant_value(addend).shape[-1]
        ):
            wide[var.name] = graph.emit_named(builder, op.matmul(rows, weight), f"{var.name}{graph.ACC_SUFFIX}")
            return wide[var.name]
    product = graph.emit_named(builder, op.matmul(rows, weight), var.name)
    return graph.emit_named(builder, op.reshape(product, graph.shape_of(var)), f"{var.name}.shape")


def _channels_last_flatten(value: Any, calls: dict[str, Any], users: dict[str, list[str]], name: str) -> Any:
    """The `permute_dims` call in front of a flatten whose readers are all dense layers."""
    if graph.op_name(value) != "relax.reshape" or not isinstance(value.args[0], relax.Var):
        return None
    source = calls.get(value.args[0].name)
    if graph.op_name(source) != "relax.permute_dims":
        return None
    axes = graph.call_attrs(source)["axes"]
    shape = graph.shape_of(source)
    flat = len(axes) == 4 and axes[0] == 0 and graph.shape_of(value) == (shape[0], int(np.prod(shape[1:])))
    readers = users.get(name, [])
    dense = [
        r for r in readers if r and graph.op_name(calls[r]) == "relax.matmul" and graph.is_constant(calls[r].args[1])
    ]
    return source if flat and readers and len(dense) == len(readers) else None


def _permuted_rows(weight: Any, permute: Any) -> Any:
    axes = graph.call_attrs(permute)["axes"]
    shape = graph.shape_of(permute)  # of the transposed tensor
    inverse = np.argsort(axes)
    return weight.reshape(*shape[1:], weight.shape[1]).transpose(*(inverse[1:] - 1), 3).reshape(weight.shape)
