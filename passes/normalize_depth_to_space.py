"""Depth-to-space has one spelling: `nn.pixel_shuffle` (CRD order).

1. CRD: `reshape(permute_dims(reshape(x, [N, C, b, b, H, W]), [0, 1, 4, 2, 5, 3]), [N, C, H*b, W*b])` ->
   `pixel_shuffle(x, b)`.
2. DCR: `reshape(permute_dims(reshape(x, [N, b, b, C, H, W]), [0, 3, 4, 1, 5, 2]), ...)` -> the same after permuting the
   channels of x, which costs nothing when x comes from a layer (through functions of one tensor) that nobody else
   reads: its output channels are permuted. Else `take` permutes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph

_CRD = (0, 1, 4, 2, 5, 3)
_DCR = (0, 3, 4, 1, 5, 2)
_CHANNELWISE = {
    f"relax.{name}" for name in "nn.relu clip nn.leakyrelu sigmoid tanh nn.silu nn.gelu nn.gelu_tanh".split()
}


def normalize_depth_to_space(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Apply the rules above.

    Parameters
    ----------
    mod : IRModule
        Layers have their biases.
    renamed : dict
        Untouched.
    """
    calls = {var.name: value for var, value in graph.bindings(mod)}
    found = {name: match for name, value in calls.items() if (match := _match(value, calls)) is not None}
    if not found:
        return mod
    users = graph.consumers_of(mod)
    layers = graph.find_layers(mod)
    permuted: dict[str, Any] = {}  # layer or accumulator name -> new order of its output channels
    absorbed: set[str] = set()  # depth-to-space operators whose order a layer took over
    for name, (data, block, dcr) in found.items():
        layer = _layer_of(data, calls, users, layers) if dcr and _is_unshared(name, calls, users) else None
        if layer is not None:
            order = _crd_order(graph.shape_of(data)[1], block)
            permuted[layer], permuted[layers[layer].acc] = order, order
            absorbed.add(name)

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        if var.name in permuted:
            return _permute_layer(value, permuted[var.name], lookup)
        if var.name not in found:
            return None
        data, block, dcr = found[var.name]
        source = lookup(data)
        if dcr and var.name not in absorbed:
            order = graph.constant(_crd_order(graph.shape_of(data)[1], block).astype(np.int64))
            source = graph.emit_named(builder, relax.op.take(source, order, 1, mode="clip"), f"{var.name}.crd")
        return relax.op.nn.pixel_shuffle(source, block)

    return graph.rebuild(mod, rewrite)


def _match(call: Any, calls: dict[str, Any]) -> tuple[Any, int, bool] | None:
    """(data, block, whether DCR) if `call` is the last reshape of a depth-to-space."""
    if graph.op_name(call) != "relax.reshape" or not isinstance(call.args[0], relax.Var):
        return None
    permute: Any = calls.get(call.args[0].name)
    if graph.op_name(permute) != "relax.permute_dims":
        return None
    first: Any = calls.get(permute.args[0].name)
    axes = tuple(graph.call_attrs(permute)["axes"] or ())
    if graph.op_name(first) != "relax.reshape" or axes not in (_CRD, _DCR):
        return None
    data, wide = first.args[0], graph.shape_of(first)
    blocks = wide[1:3] if axes == _DCR else wide[2:4]
    if not isinstance(data, relax.Var) or len(graph.shape_of(data)) != 4 or blocks[0] != blocks[1]:
        return None
    n, c, h, w = graph.shape_of(data)
    block = blocks[0]
    whole = wide[0] == n and wide[4:] == (h, w) and graph.shape_of(call) == (n, c // block**2, h * block, w * block)
    return (data, block, axes == _DCR) if whole else None


def _crd_order(channels: int, block: int) -> Any:
    """CRD channel c * b * b + i takes DCR channel i * C + c; int[channels]."""
    return np.arange(channels).reshape(block * block, -1).T.reshape(-1)


def _is_unshared(name: str, calls: dict[str, Any], users: dict[str, list[str]]) -> bool:
    """Whether nobody else reads the two tensors on the way to the last reshape: they would see permuted channels."""
    permute = calls[name].args[0].name
    return len(users[permute]) == 1 and len(users[calls[permute].args[0].name]) == 1


def _layer_of(
    data: Any, calls: dict[str, Any], users: dict[str, list[str]], layers: dict[str, graph.Layer]
) -> str | None:
    """The ungrouped layer whose output, through functions of one tensor, only `data` carries."""
    name = data.name
    while len(users.get(name, [])) == 1:
        if name in layers:
            return name if layers[name].groups == 1 else None
        if graph.op_name(calls.get(name)) not in _CHANNELWISE:
            return None
        name = calls[name].args[0].name
    return None


def _permute_layer(call: Any, order: Any, lookup: Any) -> Any:
    value = graph.constant_value(call.args[1])
    if graph.op_name(call) == "relax.add":
        return relax.op.add(lookup(call.args[0]), graph.constant(value.reshape(-1)[order].reshape(value.shape)))
    axis = 0 if graph.op_name(call) == "relax.nn.conv2d" else 1
    return relax.Call(
        call.op, [lookup(call.args[0]), graph.constant(value.take(order, axis))], call.attrs, list(call.ty_args)
    )
