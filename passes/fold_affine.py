"""Fold per-channel affine maps (batch norm above all) into the layer before them.

Before: `c.acc = conv2d(x, W); c = add(c.acc, b); m = multiply(c, s); y = add(m, t)`, nobody else reads c or m.
After: `c.acc = conv2d(x, W * s); c = add(c.acc, b * s + t)`; readers of y read c. Computed in float64.
Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.constants import Array, affine_step


@dataclass
class _Folded:
    """`y = scale * layer + shift`, and the variables that are the layer now."""

    scale: Array
    shift: Array
    removed: list[str] = field(default_factory=list)


def fold_affine(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Fold chains of `multiply` and `add` by per-channel or scalar constants into the layer that alone feeds them.

    Parameters
    ----------
    mod : IRModule
        Every layer has its bias (`add_missing_bias`).
    renamed : dict
        Gets the folded names -> layer.
    """
    folded = _analyse(mod)
    if not folded:
        return mod
    accumulators = {graph_acc: layer for layer, graph_acc in _accumulators(mod).items() if layer in folded}
    removed = {name: layer for layer, item in folded.items() for name in item.removed}
    renamed.update(removed)

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        if var.name in removed:
            return lookup(value.args[0])
        if var.name in accumulators:
            weight = _scaled(value, folded[accumulators[var.name]].scale)
            return relax.Call(value.op, [lookup(value.args[0]), weight], value.attrs, list(value.ty_args))
        if var.name in folded:
            item = folded[var.name]
            bias = graph.constant_value(value.args[1])
            total = bias.reshape(-1).astype(np.float64) * item.scale + item.shift + 0.0  # no negative zeros
            return relax.op.add(lookup(value.args[0]), graph.constant(total.astype(np.float32).reshape(bias.shape)))
        return None

    return graph.rebuild(mod, rewrite)


def _accumulators(mod: tvm.IRModule) -> dict[str, str]:
    """Layer name -> name of its accumulator."""
    return {name: layer.acc for name, layer in graph.find_layers(mod).items()}


def _analyse(mod: tvm.IRModule) -> dict[str, _Folded]:
    users = graph.consumers_of(mod)
    layers = {name: len(layer.bias) for name, layer in graph.find_layers(mod).items() if len(users[layer.acc]) == 1}
    layer_of = {name: name for name in layers}
    folded: dict[str, _Folded] = {}
    for var, value in graph.bindings(mod):
        step = affine_step(value) if isinstance(value, relax.Call) and var.name not in layer_of else None
        if step is None:
            continue
        data, kind, numbers = step
        layer = layer_of.get(data.name)
        if layer is None or len(users[data.name]) != 1:
            continue
        size = layers[layer]
        item = folded.setdefault(layer, _Folded(np.ones(size), np.zeros(size)))
        if kind == "scale":
            item.scale, item.shift = item.scale * numbers, item.shift * numbers
        else:
            item.shift = item.shift + numbers
        item.removed.append(var.name)
        layer_of[var.name] = layer
    return folded


def _scaled(call: Any, scale: Array) -> Any:
    """The weight constant with every output channel times its scale."""
    weight = graph.constant_value(call.args[1]).astype(np.float64)
    name = graph.op_name(call)
    if name == "relax.matmul":
        weight = weight * scale
    elif name == "relax.nn.conv2d":
        weight = weight * scale.reshape(-1, 1, 1, 1)
    else:
        # IOHW: the output channels of group g stand beside the input channels of group g.
        groups = int(graph.call_attrs(call)["groups"])
        inputs, outputs = weight.shape[:2]
        weight = weight * np.repeat(scale.reshape(groups, outputs), inputs // groups, axis=0)[:, :, None, None]
    return graph.constant(weight.astype(np.float32))
