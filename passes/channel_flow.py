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
from lpsn_tvm.passes.channel_labels import Flow, Labels, Node, compress, normalize_axes, reshape_labels

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
        rule = RULES.get(node.op, _unknown)
        readable = rule in (_elementwise, _concat) or (len(node.args) > 0 and isinstance(node.args[0], relax.Var))
        flow.labels[var.name] = (rule if readable else _unknown)(flow, node)
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


def _variables(args: tuple[Any, ...]) -> list[str]:
    found: list[str] = []
    for arg in args:
        if isinstance(arg, relax.Tuple):
            found += _variables(tuple(arg.fields))
        elif isinstance(arg, relax.Var):
            found.append(arg.name)
    return found


def _unknown(flow: Flow, node: Node) -> Labels:
    """Keep everything that the operator reads and writes (rule 5)."""
    reason = f"{node} cannot be followed"
    for name in _variables(node.args):
        flow.freeze(flow.labels[name], reason)
    labels = flow.fresh(1).reshape((1,) * len(node.shape))
    flow.freeze(labels, f"comes from {node}, which cannot be followed")
    return labels


# --- layers (rule 1) ---


def _layer(flow: Flow, node: Node) -> Labels:
    layer = flow.layers.get(node.name)
    if layer is None or node.attrs.get("data_layout", "NCHW") != "NCHW":
        return _unknown(flow, node)
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
    tensors = [(name, flow.labels[name], flow.shapes[name]) for name in dict.fromkeys(_variables(node.args))]
    aligned = [
        (name, labels.reshape((1,) * (rank - labels.ndim) + labels.shape), (1,) * (rank - len(shape)) + shape)
        for name, labels, shape in tensors
    ]
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
        return _unknown(flow, node)
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


# --- data movement (rule 3) ---


def _reshape(flow: Flow, node: Node) -> Labels:
    name = node.args[0].name
    return reshape_labels(flow.labels[name], flow.shapes[name], node.shape)


def _permute(flow: Flow, node: Node) -> Labels:
    labels = flow.labels[node.args[0].name]
    axes = node.attrs.get("axes") or tuple(reversed(range(labels.ndim)))
    return labels.transpose([int(axis) % labels.ndim for axis in axes])


def _pixel_shuffle(flow: Flow, node: Node) -> Labels:
    name, factor = node.args[0].name, int(node.attrs["upscale_factor"])
    n, channels, height, width = flow.shapes[name]
    block = (n, channels // factor**2, factor, factor, height, width)
    labels = reshape_labels(flow.labels[name], flow.shapes[name], block).transpose(0, 1, 4, 2, 5, 3)
    return reshape_labels(labels, [block[axis] for axis in (0, 1, 4, 2, 5, 3)], node.shape)


def _broadcast_to(flow: Flow, node: Node) -> Labels:
    labels = flow.labels[node.args[0].name]
    return labels.reshape((1,) * (len(node.shape) - labels.ndim) + labels.shape)


def _concat(flow: Flow, node: Node) -> Labels:
    axis = int(node.attrs.get("axis") or 0) % len(node.shape)
    parts: list[Labels] = []
    for index, item in enumerate(node.args[0].fields):
        shape = shape_of(item)
        if is_constant(item):
            own = flow.fresh(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
            flow.constants[node.name, index] = own
        else:
            own = flow.labels[item.name]
        parts.append(own)
    if any(part.shape[i] > 1 for part in parts for i in range(part.ndim) if i != axis):
        # Joined along another axis than the channels (rows of an image): all parts carry the same channels.
        rows = [part.take([0], axis) for part in parts]
        for part, row in zip(parts, rows, strict=True):
            flow.link(part, row)
            flow.link(rows[0], row)
        widest = max(rows, key=lambda row: row.size)
        return compress(widest)
    extents = [shape_of(item)[axis] for item in node.args[0].fields]
    full = [
        np.broadcast_to(part, (*part.shape[:axis], n, *part.shape[axis + 1 :]))
        for part, n in zip(parts, extents, strict=True)
    ]
    return compress(np.concatenate(full, axis))


def slice_bounds(node_args: tuple[Any, ...], shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """(axis, begin, end, stride) of a strided_slice, resolved against the operand's shape."""
    axes, begin, end = ([int(item) for item in node_args[i].fields] for i in (1, 2, 3))
    strides = [int(item) for item in node_args[4].fields] if len(node_args) > 4 else [1] * len(axes)
    return [
        (axis % len(shape), *slice(b, e, s).indices(shape[axis]))
        for axis, b, e, s in zip(axes, begin, end, strides, strict=True)
    ]


def _strided_slice(flow: Flow, node: Node) -> Labels:
    name = node.args[0].name
    labels = flow.labels[name]
    for axis, begin, end, stride in slice_bounds(node.args, flow.shapes[name]):
        if labels.shape[axis] == 1:
            continue
        if stride != 1:
            flow.freeze(labels, f"{node} takes every {stride}th channel")
        stop = None if stride < 0 and end < 0 else end
        labels = labels[(slice(None),) * axis + (slice(begin, stop, stride),)]
    return compress(labels)


def _pad(flow: Flow, node: Node) -> Labels:
    labels = flow.labels[node.args[0].name]
    widths = node.attrs["pad_width"]
    if min(widths) < 0:
        return _unknown(flow, node)
    for axis in range(labels.ndim):
        before, after = int(widths[2 * axis]), int(widths[2 * axis + 1])
        if labels.shape[axis] == 1 or before == after == 0:
            continue
        if node.attrs.get("pad_mode", "constant") != "constant":
            flow.freeze(labels, f"{node} mirrors channels")
            return flow.labels[node.args[0].name].take([0], axis)
        parts = [flow.fresh(n).reshape([-1 if i == axis else 1 for i in range(labels.ndim)]) for n in (before, after)]
        others = [extent if i != axis else -1 for i, extent in enumerate(labels.shape)]
        wide = [
            np.broadcast_to(part, [p if e == -1 else e for p, e in zip(part.shape, others, strict=True)])
            for part in parts
        ]
        labels = np.concatenate([wide[0], labels, wide[1]], axis)
    return labels


# --- spatial operators, reductions and norms (rule 4) ---


def _spatial(flow: Flow, node: Node) -> Labels:
    axis = str(node.attrs.get("layout", "NCHW")).find("C")
    if axis < 0 or len(node.shape) != 4:
        return _unknown(flow, node)
    labels = flow.along(node.args[0].name, axis)
    return compress(labels.reshape([-1 if i == axis else 1 for i in range(4)]))


def _keep_if_mixed(flow: Flow, node: Node, axes: tuple[int, ...]) -> Labels:
    """Freeze the operand if its channels lie along `axes`, which the operator mixes."""
    labels = flow.labels[node.args[0].name]
    if any(labels.shape[axis] > 1 for axis in axes):
        flow.freeze(labels, f"{node} mixes the channels")
        first = labels.reshape(-1)[:1]
        flow.link(labels, first)
        return first.reshape((1,) * labels.ndim)
    return labels


def _reduce(flow: Flow, node: Node) -> Labels:
    rank = len(flow.shapes[node.args[0].name])
    axes = normalize_axes(node.attrs.get("axis"), rank)
    labels = _keep_if_mixed(flow, node, axes)
    if node.attrs.get("keepdims"):
        return labels
    return labels.reshape([extent for axis, extent in enumerate(labels.shape) if axis not in axes])


def _softmax(flow: Flow, node: Node) -> Labels:
    return _keep_if_mixed(flow, node, normalize_axes(int(node.attrs["axis"]), len(node.shape)))


def _norm(flow: Flow, node: Node) -> Labels:
    """Instance norm per channel passes; its scale and offset are sliced. Layer and group norm mix channels."""
    rank = len(node.shape)
    axes = normalize_axes(node.attrs["axes"], rank)
    if node.op != "relax.nn.instance_norm":
        channel = node.attrs.get("channel_axis")
        return _keep_if_mixed(flow, node, axes if channel is None else (*axes, int(channel) % rank))
    labels = _keep_if_mixed(flow, node, axes)
    axis = int(node.attrs["channel_axis"]) % rank
    if labels.shape[axis] > 1:
        vector = flow.along(node.args[0].name, axis)
        for index, arg in enumerate(node.args[1:], start=1):
            if not is_constant(arg):
                return _unknown(flow, node)
            flow.constants[node.name, index] = vector
    return labels


_UNARY = (
    "abs astype ceil clip cos erf exp floor log negative nn.dropout nn.gelu nn.gelu_tanh nn.leakyrelu nn.relu nn.relu6
    nn.selu nn.silu " "nn.softplus round rsqrt sigmoid sign sin sqrt square tan tanh trunc"
)
_ELEMENTWISE = "add divide equal floor_divide greater greater_equal less less_equal maximum minimum mod multiply not_equal power subtract where"
_FAMILIES: dict[Rule, str] = {
    _layer: "nn.conv2d nn.conv2d_transpose matmul",
    _pass: _UNARY,
    _elementwise: _ELEMENTWISE,
    _prelu: "nn.prelu",
    _reshape: "reshape flatten nn.batch_flatten squeeze expand_dims",
    _permute: "permute_dims",
    _pixel_shuffle: "nn.pixel_shuffle",
    _broadcast_to: "broadcast_to",
    _concat: "concat",
    _strided_slice: "strided_slice",
    _pad: "nn.pad",
    _spatial: "nn.max_pool2d nn.avg_pool2d nn.adaptive_avg_pool2d image.resize2d",
    _reduce: "mean sum max min prod variance std",
    _softmax: "nn.softmax nn.log_softmax",
    _norm: "nn.instance_norm nn.layer_norm nn.group_norm",
}
RULES: dict[str, Rule] = {f"relax.{op}": rule for rule, ops in _FAMILIES.items() for op in ops.split()}
"""Relax operator -> its rule; what is not here is left whole."""
