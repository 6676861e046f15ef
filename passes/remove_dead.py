"""Remove bindings that no output needs."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from lpsn_tvm import graph


def remove_dead(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Before: `a = relu(x); b = tanh(x); return b`. After: `b = tanh(x); return b`. Parameters stay.

    Parameters
    ----------
    mod : IRModule
        Any module of one dataflow block.
    renamed : dict
        Untouched.
    """
    needed: set[str] = set()

    def mark(expr: Any) -> None:
        if isinstance(expr, relax.Var):
            needed.add(expr.name)
        elif isinstance(expr, relax.Tuple):
            for item in expr.fields:
                mark(item)

    mark(mod["main"].body.body)
    order = list(graph.bindings(mod))
    for var, value in reversed(order):
        if var.name in needed:
            for argument in value.args if isinstance(value, relax.Call) else (value,):
                mark(argument)
    if all(var.name in needed for var, _ in order):
        return mod

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        return None if var.name in needed else mod["main"].params[0]

    return graph.rebuild(mod, rewrite)
