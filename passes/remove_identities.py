"""Remove operators that change nothing, and join reshapes of reshapes.

reshape to the same shape, permute_dims in order, pad by nothing, slice of everything, concat of one, x * 1, x + 0,
pooling with a 1x1 window, and `reshape(reshape(x))`. The add behind a layer's accumulator is the layer's bias and
stays. A reshape that ends a depth-to-space or channel shuffle stays too: other passes know it by its shape.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.constants import scalar_value


def remove_identities(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Before: `a = reshape(x, shape of x); y = relu(a)`. After: `y = relu(x)`.

    Parameters
    ----------
    mod : IRModule
        Any module of one dataflow block.
    renamed : dict
        Gets the removed names.
    """
    bound = [(var, value) for var, value in graph.bindings(mod) if isinstance(value, relax.Call)]
    calls = {var.name: value for var, value in bound}
    identities = {var.name for var, value in bound if _is_identity(value, var) and not _is_bias(value, calls)}
    chained = any(
        _is_reshape(call) and _is_reshape(calls.get(getattr(call.args[0], "name", ""))) for call in calls.values()
    )
    if not chained and not identities:
        return mod

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        if var.name in identities:
            data = value.args[0].fields[0] if isinstance(value.args[0], relax.Tuple) else value.args[0]
            renamed[var.name] = lookup(data).name
            return lookup(data)
        if graph.op_name(value) == "relax.reshape" and isinstance(value.args[0], relax.Var):
            data = lookup(value.args[0])
            producer = builder.lookup_binding(data)
            if _is_reshape(producer) and not _ends_shuffle(producer, builder):
                source = producer.args[0]
                if graph.shape_of(source) == graph.shape_of(var):
                    renamed[var.name] = source.name
                    return source
                return relax.op.reshape(source, graph.shape_of(var))
        return None

    return graph.rebuild(mod, rewrite)


def _is_reshape(call: Any) -> bool:
    return graph.op_name(call) == "relax.reshape"


def _is_bias(call: Any, calls: dict[str, Any]) -> bool:
    """Whether a call is the first thing that happens to a layer's accumulator."""
    return isinstance(call.args[0], relax.Var) and graph.op_name(calls.get(call.args[0].name)) in graph.LAYER_OPS


def _ends_shuffle(reshape: Any, builder: Any) -> bool:
    """Whether a reshape undoes the split axes of a transposed tensor of more than four dimensions."""
    source = reshape.args[0]
    producer = builder.lookup_binding(source) if isinstance(source, relax.Var) else None
    return graph.op_name(producer) == "relax.permute_dims" and len(graph.shape_of(source)) > 4


def _is_identity(call: Any, var: Any) -> bool:
    name = graph.op_name(call)
    operand = call.args[0].fields[0] if isinstance(call.args[0], relax.Tuple) and call.args[0].fields else call.args[0]
    if not isinstance(operand, relax.Var) or graph.shape_of(operand) != graph.shape_of(var):
        return False
    attrs = graph.call_attrs(call)
    if name in ("relax.reshape", "relax.broadcast_to"):
        return True
    if name == "relax.permute_dims":
        return list(attrs["axes"] or ()) == list(range(len(graph.shape_of(var))))
    if name == "relax.nn.pad":
        return not any(attrs["pad_width"])
    if name == "relax.strided_slice":
        return len(call.args) < 5 or all(int(step.value) > 0 for step in call.args[4].fields)
    if name == "relax.concat":
        return len(call.args[0].fields) == 1
    if name in ("relax.multiply", "relax.add"):
        return scalar_value(call.args[1]) == (1.0 if name == "relax.multiply" else 0.0)
    if name in ("relax.nn.max_pool2d", "relax.nn.avg_pool2d"):
        return tuple(attrs["pool_size"]) == (1, 1) and tuple(attrs["strides"]) == (1, 1) and not any(attrs["padding"])
    return False
