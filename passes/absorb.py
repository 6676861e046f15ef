"""Operators that become part of the layer before them, which the passes `fuse_*` for one kind of target share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.integer_ops import integer_call, tensors_of

Merge = Callable[[Any, Any], "dict[str, Any] | None"]


def absorb(mod: tvm.IRModule, layers: tuple[str, ...], merge: Merge) -> tvm.IRModule:
    """Give layers new attributes that say what the only operator that reads them did.

    Parameters
    ----------
    mod : IRModule
        Integer, or mixed, module.
    layers : tuple of str
        Operators ("lpsn.conv2d") that can take others in.
    merge : callable (layer's call, reader's call) -> attributes or None
        All attributes of the layer that does both; None where the two stay apart.

    Returns
    -------
    IRModule
        The same function; a layer has the name of what it took over.
    """
    users = graph.consumers_of(mod)
    found: dict[str, Any] = {}
    merged: dict[str, tuple[Any, dict[str, Any]]] = {}
    taken: set[str] = set()
    for var, value in graph.bindings(mod):
        if graph.op_name(value) in layers:
            found[var.name] = value
        elif isinstance(value, relax.Call) and len(value.args) > 1 and isinstance(value.args[1], relax.Var):
            name = value.args[1].name
            if name in found and users[name] == [var.name]:
                attrs = merge(found[name], value)
                if attrs is not None:
                    merged[var.name] = found[name], attrs
                    taken.add(name)

    def rewrite(builder: relax.BlockBuilder, var: Any, value: Any, lookup: Any) -> Any:
        if var.name in taken:
            # Nobody asks for it any more: any variable will do.
            return lookup(value.args[1])
        if var.name in merged:
            layer, attrs = merged[var.name]
            return integer_call(graph.op_name(layer), [lookup(tensor) for tensor in tensors_of(layer)], attrs)
        return None

    return graph.rebuild(mod, rewrite) if merged else mod
