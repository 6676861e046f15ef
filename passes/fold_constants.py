"""Evaluate calls whose operands are all constants.

Before: `w = reshape(Const); y = multiply(x, w)`. After: `y = multiply(x, Const)`. Evaluated by numpy: TVM's own
constant folding compiles every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph

_EVALUATE: dict[str, Callable[..., Any]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.power": np.power,
    "relax.matmul": np.matmul,
    "relax.negative": np.negative,
    "relax.exp": np.exp,
    "relax.log": np.log,
    "relax.sqrt": np.sqrt,
    "relax.rsqrt": lambda x: 1 / np.sqrt(x),
    "relax.abs": np.abs,
    "relax.square": np.square,
    "relax.tanh": np.tanh,
    "relax.sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relax.nn.relu": lambda x: np.maximum(x, 0),
}


def fold_constants(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Replace calls on constants by their value.

    Parameters
    ----------
    mod : IRModule
        Any module of one dataflow block.
    renamed : dict
        Untouched: what is constant is no activation.
    """
    calls = [value for _, value in graph.bindings(mod) if isinstance(value, relax.Call)]
    if not any(_fold(call, list(call.args)) is not None for call in calls):
        return mod
    values: dict[str, Any] = {}

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        arguments = [values.get(a.name, a) if isinstance(a, relax.Var) else a for a in value.args]
        folded = _fold(value, arguments)
        if folded is not None:
            values[var.name] = folded
            # The binding stays until nothing reads it; `remove_dead` takes it.
            return None
        if any(new is not old for new, old in zip(arguments, value.args, strict=True)):
            arguments = [lookup(a) if isinstance(a, (relax.Var, relax.Tuple)) else a for a in arguments]
            return relax.Call(value.op, arguments, value.attrs, list(value.ty_args))
        return None

    return graph.rebuild(mod, rewrite)


def _fold(call: Any, arguments: list[Any]) -> Any:
    name = graph.op_name(call)
    data = [graph.constant_value(a) for a in arguments if graph.is_constant(a)]
    if name in _EVALUATE and len(data) == len(arguments):
        return graph.constant(np.asarray(_EVALUATE[name](*data), np.float32))
    if not data or not graph.is_constant(arguments[0]):
        return None
    if name == "relax.reshape":
        return graph.constant(data[0].reshape(graph.shape_of(call)))
    if name == "relax.permute_dims":
        return graph.constant(data[0].transpose(graph.call_attrs(call)["axes"]))
    if name == "relax.broadcast_to":
        return graph.constant(np.broadcast_to(data[0], graph.shape_of(call)))
    return None
