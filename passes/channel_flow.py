"""How channels flow through each operator family: the rules behind the channel groups.

Each rule reads the labels of its operands (`lpsn_tvm.passes.channel_labels`), links what must agree, freezes what
cannot be removed, and returns the labels of its result:

1. a layer consumes the channels it reads and produces new ones; depthwise layers, and grouped layers with at least as
   many groups as channels per group, pass them on (unit: a whole group); other grouped layers keep all groups and lose
   the same positions in each;
2. an elementwise operator ties its operands; a constant is sliced with them; an operand that is spread over the
   channels of another is kept;
3. data movement (reshape, transpose, slice, concat, depth-to-space, padding) moves the labels as it moves the data;
4. spatial operators (pooling, resize) need one channel axis; reductions, softmax and norms over the channels keep them;
5. anything else keeps what it reads, with the operator's name as the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm.graph import bindings, call_attrs, find_layers, is_constant, op_name, shape_of
from lpsn_tvm.passes.channel_labels import Flow, Labels, Node, compress
from lpsn_tvm.passes.channel_moves import (
    broadcast_to,
    concat,
    norm,
    pad,
    permute,
    pixel_shuffle,
    reduce,
    reshape,
    softmax,
    spatial,
    strided_slice,
    take,
    unknown,
    variables,
)

Rule = Callable[[Flow, Node], Labels]


def trace_channels(mod: tvm.IRModule) -> Flow:
    """Walk a canonical function once and collect labels, links, producers, consumers and what is frozen."""
    flow = Flow({layer.acc: layer for layer in find_layers(mod).values()})
    for param in mod["main"].params:
        flow.shapes[param.name] = shape_of(param)
        flow.labels[param.name] = flow.fresh(1).reshape((1,) * len(shape_of(param)))
        flow.freeze(flow.labels[param.name], f"shares channels with the graph input {param.name!r}")
    aliases: dict[Any, Any] = {}
    for var, value in bindings(mod):
        if isinstance(value, (relax.Var, relax.Tuple)):
            aliases[var] = value
            continue
        flow.shapes[var.name] = shape_of(var)
        node = Node(var.name, op_name(value), call_attrs(value), tuple(value.args), flow.shapes[var.name])
        rule = RULES.get(node.op, unknown)
        readable = rule in (_elementwise, concat) or (len(node.args) > 0 and isinstance(node.args[0], relax.Var))
        flow.labels[var.name] = (rule if readable else unknown)(flow, node)
    _freeze_outputs(flow, mod["main"].body.body, aliases)
    return flow


def _freeze_outputs(flow: Flow, expr: Any, aliases: dict[Any, Any]) -> None:
    if isinstance(expr, relax.Tuple):
        for item in expr.fields:
            _freeze_outputs(flow, item, aliases)
    elif expr in aliases:
        _freeze_outputs(flow, aliases[expr], aliases)
    elif isinstance(expr, relax.Var):
        flow.freeze(flow.labels[expr.name], f"the graph output {expr.name!r} reads it")


# --- layers (rule 1) ---


def _layer(flow: Flow, node: Node) -> Labels:
    layer = flow.layers.get(node.name)
    if layer is None or node.attrs.get("data_layout", "NCHW") != "NCHW":
        return unknown(flow, node)
    channel_axis = len(node.shape) - 1 if layer.kind == "dense" else 1
    read = flow.along(node.args[0].name, channel_axis)
    transposed = layer.kind == "conv2d_transpose"
    groups, per_in = layer.groups, len(read) // layer.groups
    per_out = node.shape[channel_axis] // groups
    if groups > 1 and groups >= max(per_in, per_out):
        blocks = read.reshape(groups, per_in)
        flow.link(blocks[:, :1], blocks)
        written = np.repeat(blocks[:, 0], per_out)
        flow.followers.append((layer.name, read, written))
        flow.axes[node.name, 1] = {0: read if transposed else written}
    else:
        position = flow.fresh(per_out)
        written = np.tile(position, groups)
        blocks = read.reshape(groups, per_in)
        flow.link(blocks[:1], blocks)
        flow.producers.append((layer.name, written))
        flow.consumers.append((layer.name, read))
        if layer.kind == "conv2d":
            flow.axes[node.name, 1] = {0: written, 1: blocks[0]}
        else:
            flow.axes[node.name, 1] = {0: read, 1: position}
    shape = [1] * len(node.shape)
    shape[channel_axis] = -1
    return compress(written.reshape(shape))


# --- elementwise (rule 2) ---


def _pass(flow: Flow, node: Node) -> Labels:
    return flow.labels[node.args[0].name]


def _elementwise(flow: Flow, node: Node) -> Labels:
    rank = len(node.shape)
    tensors = [(name, flow.labels[name], flow.shapes[name]) for name in dict.fromkeys(variables(node.args))]
    aligned = [
        (name, labels.reshape((1,) * (rank - labels.ndim) + labels.shape), (1,) * (rank - len(shape)) + shape)
        for name, labels, shape in tensors
    ]
    # What a gate [N, C, 1, 1] scales must be the same along height and width.
    spread_axes = [i for i in range(2, rank) if any(shape[i] < node.shape[i] for _, _, shape in aligned)]
    aligned = [(name, flow.fold(labels, spread_axes), shape) for name, labels, shape in aligned]
    result: Labels | None = None
    for name, labels, shape in aligned:
        spread = any(
            shape[axis] == 1 and other.shape[axis] > 1
            for axis in range(rank)
            for _, other, _ in aligned
            if other is not labels
        )
        if spread:
            flow.freeze(labels, f"{node} spreads {name!r} over the channels of another operand")
            continue
        if result is not None:
            flow.link(result, labels)
        result = labels if result is None else np.broadcast_arrays(result, labels)[0]
    if result is None:
        return unknown(flow, node)
    result = compress(result)
    for index, arg in enumerate(node.args):
        if is_constant(arg):
            extents = (1,) * (rank - len(shape_of(arg))) + shape_of(arg)
            own = result[tuple(slice(0, 1) if extent == 1 else slice(None) for extent in extents)]
            flow.constants[node.name, index] = own.reshape(own.shape[rank - len(shape_of(arg)) :])
    return result


def _prelu(flow: Flow, node: Node) -> Labels:
    data, slope = node.args[0], node.args[1]
    if not is_constant(slope) or len(shape_of(slope)) != 1:
        return _elementwise(flow, node)
    if shape_of(slope)[0] > 1:
        flow.constants[node.name, 1] = flow.along(data.name, int(node.attrs["axis"]) % len(node.shape))
    return flow.labels[data.name]


_UNARY = """
    abs astype atan ceil clip cos erf exp floor log negative nn.dropout nn.gelu nn.gelu_tanh nn.leakyrelu nn.relu
    nn.relu6 nn.selu nn.silu nn.softplus round rsqrt sigmoid sign sin sqrt square tan tanh trunc
"""
_ELEMENTWISE = """
    add divide equal floor_divide greater greater_equal less less_equal maximum minimum mod multiply not_equal power
    subtract where
"""
_FAMILIES: dict[Rule, str] = {
    _layer: "nn.conv2d nn.conv2d_transpose matmul",
    _pass: _UNARY,
    _elementwise: _ELEMENTWISE,
    _prelu: "nn.prelu",
    reshape: "reshape flatten nn.batch_flatten squeeze expand_dims",
    permute: "permute_dims",
    pixel_shuffle: "nn.pixel_shuffle",
    broadcast_to: "broadcast_to",
    concat: "concat",
    strided_slice: "strided_slice",
    take: "take",
    pad: "nn.pad",
    spatial: "nn.max_pool2d nn.avg_pool2d nn.adaptive_avg_pool2d image.resize2d",
    reduce: "mean sum max min prod variance std",
    softmax: "nn.softmax nn.log_softmax",
    norm: "nn.instance_norm nn.layer_norm nn.group_norm",
}
RULES: dict[str, Rule] = {f"relax.{op}": rule for rule, ops in _FAMILIES.items() for op in ops.split()}
"""Relax operator -> its rule; what is not here is left whole."""
