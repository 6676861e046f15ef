"""Turn per-channel affine maps that no layer precedes into depthwise 1x1 layers.

Before: `m = multiply(x, s[1, C, 1, 1]); y = add(m, t[1, C, 1, 1])`, nobody else reads m (a batch norm after a concat or
an add). After: `y.acc = conv2d(x, s as [C, 1, 1, 1], groups=C); y = add(y.acc, t)`. Over [N, C], with reshapes around
it. Chains of scalars only stay elementwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.constants import Array, affine_step

op = relax.op


@dataclass
class _Chain:
    """`y = scale * data + shift` along a chain that ends in `last`."""

    data: Any
    scale: Array
    shift: Array
    names: list[str]
    per_channel: bool


def affine_to_depthwise(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Replace every remaining per-channel chain by a layer named after its last operator.

    Parameters
    ----------
    mod : IRModule
        After `fold_affine`.
    renamed : dict
        Untouched: the values inside a chain no longer exist.
    """
    chains = {chain.names[-1]: chain for chain in _chains(mod) if chain.per_channel}
    if not chains:
        return mod
    inner = {name for chain in chains.values() for name in chain.names[:-1]}

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        if var.name in inner:
            return lookup(value.args[0])
        if var.name not in chains:
            return None
        return _layer(builder, var, chains[var.name], lookup)

    return graph.rebuild(mod, rewrite)


def _layer(builder: Any, var: Any, chain: _Chain, lookup: Any) -> Any:
    shape, channels = graph.shape_of(var), len(chain.scale)
    weight = graph.constant(chain.scale.astype(np.float32).reshape(-1, 1, 1, 1))
    data = lookup(chain.data)
    if len(shape) == 2:
        data = graph.emit_named(builder, op.reshape(data, (*shape, 1, 1)), f"{var.name}.image")
    acc = graph.emit_named(
        builder,
        op.nn.conv2d(data, weight, padding=(0, 0, 0, 0), groups=channels, out_dtype="float32"),
        var.name + graph.ACC_SUFFIX,
    )
    shift = (chain.shift + 0.0).astype(np.float32).reshape(1, -1, 1, 1)  # no negative zeros
    out = op.add(acc, graph.constant(shift))
    if len(shape) == 4:
        return out
    out = graph.emit_named(builder, out, var.name)
    return graph.emit_named(builder, op.reshape(out, shape), f"{var.name}.shape")


def _chains(mod: tvm.IRModule) -> list[_Chain]:
    users = graph.consumers_of(mod)
    layers = set(graph.find_layers(mod))
    open_chains: dict[str, _Chain] = {}
    chains = []
    for var, value in graph.bindings(mod):
        step = affine_step(value) if isinstance(value, relax.Call) and var.name not in layers else None
        if step is None:
            continue
        data, kind, numbers = step
        chain = open_chains.pop(data.name, None) if len(users[data.name]) == 1 else None
        if chain is None:
            chain = _Chain(data, np.ones(len(numbers)), np.zeros(len(numbers)), [], False)
            chains.append(chain)
        if kind == "scale":
            chain.scale, chain.shift = chain.scale * numbers, chain.shift * numbers
        else:
            chain.shift = chain.shift + numbers
        chain.per_channel |= graph.constant_value(value.args[1]).size > 1
        chain.names.append(var.name)
        open_chains[var.name] = chain
    return chains
