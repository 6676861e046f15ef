"""Every weighted layer becomes `acc` and `out = add(acc, bias)`.

Before: `conv = conv2d(x, W)`. After: `conv.acc = conv2d(x, W); conv = add(conv.acc, 0)`. A layer that has its bias
already keeps it; its accumulator is called `<layer>.acc`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.constants import per_channel


def add_missing_bias(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Give every layer exactly one bias.

    Parameters
    ----------
    mod : IRModule
        Raw or half-normalized module.
    renamed : dict
        Untouched: a layer keeps its name.
    """
    users = graph.consumers_of(mod)
    calls = {var.name: value for var, value in graph.bindings(mod)}
    params = {param.name for param in mod["main"].params}
    biases = {
        name: user
        for name, value in calls.items()
        if is_layer(value) and (user := _bias_of(name, users, calls)) is not None
    }
    layers = set(biases.values())
    taken = set(calls) | params

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        if var.name in layers:
            shape = graph.shape_of(var)
            bias = per_channel(graph.constant_value(value.args[1]), shape)
            return relax.op.add(lookup(value.args[0]), _shaped(bias, len(shape)))
        if not is_layer(value):
            return None
        call = relax.Call(value.op, [lookup(value.args[0]), value.args[1]], value.attrs, list(value.ty_args))
        if var.name in biases:
            return call
        name = var.name + graph.ACC_SUFFIX
        while name in taken:
            name += "_"
        taken.add(name)
        acc = graph.emit_named(builder, call, name)
        shape = graph.shape_of(var)
        return relax.op.add(acc, _shaped(np.zeros(shape[1], np.float32), len(shape)))

    return graph.rebuild(mod, rewrite)


def is_layer(call: Any) -> bool:
    """Whether a call is a weighted layer: its second operand is a constant, its first is not; dense layers are two-
    dimensional.
    """
    if (
        graph.op_name(call) not in graph.LAYER_OPS
        or not isinstance(call.args[0], relax.Var)
        or not graph.is_constant(call.args[1])
    ):
        return False
    return graph.op_name(call) != "relax.matmul" or (
        len(graph.shape_of(call.args[0])) == 2 and len(graph.shape_of(call.args[1])) == 2
    )


def _shaped(bias: Any, rank: int) -> Any:
    return graph.constant(bias if rank == 2 else bias.reshape(1, -1, 1, 1))


def _bias_of(name: str, users: dict[str, list[str]], calls: dict[str, Any]) -> str | None:
    """The only reader of an accumulator, if it is the layer's own bias; a separate Add node is folded later, under the
    name of the layer.
    """
    readers = users.get(name, [])
    if len(readers) != 1 or name != readers[0] + graph.ACC_SUFFIX:
        return None
    call: Any = calls.get(readers[0])
    if (
        graph.op_name(call) != "relax.add"
        or not graph.is_constant(call.args[1])
        or not isinstance(call.args[0], relax.Var)
    ):
        return None
    value = per_channel(graph.constant_value(call.args[1]), graph.shape_of(call.args[0]))
    return readers[0] if value is not None else None
