"""Rules of `lpsn_tvm.passes.channel_flow` for operators without weights that move data or read over space.

Data movement does to the labels what it does to the data; spatial operators need one channel axis; reductions, softmax
and norms over the channels keep them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm.graph import constant_value, is_constant, shape_of
from lpsn_tvm.passes.channel_labels import Flow, Labels, Node, compress, normalize_axes, reshape_labels


def variables(args: tuple[Any, ...]) -> list[str]:
    """Names of the variables among a call's operands, tuples opened."""
    found: list[str] = []
    for arg in args:
        if isinstance(arg, relax.Tuple):
            found += variables(tuple(arg.fields))
        elif isinstance(arg, relax.Var):
            found.append(arg.name)
    return found


def unknown(flow: Flow, node: Node) -> Labels:
    """Keep everything that the operator reads and writes (rule 5)."""
    reason = f"{node} cannot be followed"
    for name in variables(node.args):
        flow.freeze(flow.labels[name], reason)
    labels = flow.fresh(1).reshape((1,) * len(node.shape))
    flow.freeze(labels, f"comes from {node}, which cannot be followed")
    return labels


# --- data movement (rule 3) ---


def reshape(flow: Flow, node: Node) -> Labels:
    """Row-major reshape, flatten, squeeze, expand_dims."""
    name = node.args[0].name
    return reshape_labels(flow.labels[name], flow.shapes[name], node.shape)


def permute(flow: Flow, node: Node) -> Labels:
    """Transpose."""
    labels = flow.labels[node.args[0].name]
    axes = node.attrs.get("axes") or tuple(reversed(range(labels.ndim)))
    return labels.transpose([int(axis) % labels.ndim for axis in axes])


def pixel_shuffle(flow: Flow, node: Node) -> Labels:
    """Depth to space in CRD order, as one operator."""
    name, factor = node.args[0].name, int(node.attrs["upscale_factor"])
    n, channels, height, width = flow.shapes[name]
    block = (n, channels // factor**2, factor, factor, height, width)
    labels = reshape_labels(flow.labels[name], flow.shapes[name], block).transpose(0, 1, 4, 2, 5, 3)
    return reshape_labels(labels, [block[axis] for axis in (0, 1, 4, 2, 5, 3)], node.shape)


def broadcast_to(flow: Flow, node: Node) -> Labels:
    """Explicit broadcast."""
    labels = flow.labels[node.args[0].name]
    return labels.reshape((1,) * (len(node.shape) - labels.ndim) + labels.shape)


def concat(flow: Flow, node: Node) -> Labels:
    """Concatenation: each part keeps its labels; constants get labels of their own and are sliced with them."""
    axis = int(node.attrs.get("axis") or 0) % len(node.shape)
    fields = list(node.args[0].fields)
    varying = [
        i for item in fields if not is_constant(item) for i, e in enumerate(flow.labels[item.name].shape) if e > 1
    ]
    if any(i != axis for i in varying) and (axis not in varying or (axis != 1 and 1 in varying)):
        return _concat_rows(flow, node, axis)
    parts: list[Labels] = []
    for index, item in enumerate(fields):
        extent = shape_of(item)[axis]
        if is_constant(item):
            own = flow.fresh(extent).reshape([-1 if i == axis else 1 for i in range(len(node.shape))])
            flow.constants[node.name, index] = own
        else:
            own = flow.fold(flow.labels[item.name], [i for i in range(len(node.shape)) if i != axis])
            if any(e > 1 for i, e in enumerate(own.shape) if i != axis):
                return unknown(flow, node)
        parts.append(np.broadcast_to(own, (*own.shape[:axis], extent, *own.shape[axis + 1 :])))
    return compress(np.concatenate(parts, axis))


def _concat_rows(flow: Flow, node: Node, axis: int) -> Labels:
    """Joined along another axis than the channels (rows of an image): all parts carry the same channels."""
    fields = list(node.args[0].fields)
    rows: list[Labels] = []
    for item in fields:
        if not is_constant(item):
            part = flow.labels[item.name]
            rows.append(part.take([0], axis))
            flow.link(part, rows[-1])
            flow.link(rows[0], rows[-1])
    result = compress(max(rows, key=lambda row: row.size))
    for index, item in enumerate(fields):
        if is_constant(item):
            flow.constants[node.name, index] = result
    return result


def slice_bounds(node_args: tuple[Any, ...], shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """(axis, begin, end, stride) of a strided_slice, resolved against the operand's shape."""
    axes, begin, end = ([int(item) for item in node_args[i].fields] for i in (1, 2, 3))
    strides = [int(item) for item in node_args[4].fields] if len(node_args) > 4 else [1] * len(axes)
    return [
        (axis % len(shape), *slice(b, e, s).indices(shape[axis]))
        for axis, b, e, s in zip(axes, begin, end, strides, strict=True)
    ]


def strided_slice(flow: Flow, node: Node) -> Labels:
    """Slice (what is left of a split)."""
    name = node.args[0].name
    labels = flow.labels[name]
    for axis, begin, end, stride in slice_bounds(node.args, flow.shapes[name]):
        if labels.shape[axis] == 1:
            continue
        if stride != 1:
            labels = flow.fold(labels, [axis])
        if labels.shape[axis] == 1:
            continue
        if stride != 1:
            flow.freeze(labels, f"{node} takes channels with stride {stride}")
        stop = None if stride < 0 and end < 0 else end
        labels = labels[(slice(None),) * axis + (slice(begin, stop, stride),)]
    return compress(labels)


def take(flow: Flow, node: Node) -> Labels:
    """Gather by constant indices (a channel permutation)."""
    name, indices = node.args[0].name, node.args[1]
    labels = flow.labels[name]
    axis = node.attrs.get("axis")
    if axis is None or not is_constant(indices) or len(shape_of(indices)) != 1:
        return unknown(flow, node)
    axis = int(axis) % labels.ndim
    if labels.shape[axis] == 1:
        return labels
    return compress(labels.take(constant_value(indices), axis))


def pad(flow: Flow, node: Node) -> Labels:
    """Padding; padded channels get labels of their own."""
    labels = flow.labels[node.args[0].name]
    widths = node.attrs["pad_width"]
    if min(widths) < 0:
        return unknown(flow, node)
    padded = [axis for axis in range(labels.ndim) if widths[2 * axis] or widths[2 * axis + 1]]
    labels = flow.fold(labels, [axis for axis in padded if axis != 1])
    for axis in range(labels.ndim):
        before, after = int(widths[2 * axis]), int(widths[2 * axis + 1])
        if labels.shape[axis] == 1 or before == after == 0:
            continue
        if node.attrs.get("pad_mode", "constant") != "constant":
            return unknown(flow, node)
        parts = [flow.fresh(n).reshape([-1 if i == axis else 1 for i in range(labels.ndim)]) for n in (before, after)]
        others = [extent if i != axis else -1 for i, extent in enumerate(labels.shape)]
        wide = [
            np.broadcast_to(part, [p if e == -1 else e for p, e in zip(part.shape, others, strict=True)])
            for part in parts
        ]
        labels = np.concatenate([wide[0], labels, wide[1]], axis)
    return labels


# --- spatial operators, reductions and norms (rule 4) ---


def spatial(flow: Flow, node: Node) -> Labels:
    """Pooling and resize."""
    axis = str(node.attrs.get("layout", "NCHW")).find("C")
    if axis < 0 or len(node.shape) != 4:
        return unknown(flow, node)
    labels = flow.along(node.args[0].name, axis)
    return compress(labels.reshape([-1 if i == axis else 1 for i in range(4)]))


def _keep_if_mixed(flow: Flow, node: Node, axes: tuple[int, ...]) -> Labels:
    """Freeze the operand if its channels lie along `axes`, which the operator mixes."""
    labels = flow.fold(flow.labels[node.args[0].name], axes)
    if any(labels.shape[axis] > 1 for axis in axes):
        flow.freeze(labels, f"{node} mixes the channels")
        first = labels.reshape(-1)[:1]
        flow.link(labels, first)
        return first.reshape((1,) * labels.ndim)
    return labels


def reduce(flow: Flow, node: Node) -> Labels:
    """Mean, sum, maximum, ... over some axes."""
    rank = len(flow.shapes[node.args[0].name])
    axes = normalize_axes(node.attrs.get("axis"), rank)
    labels = _keep_if_mixed(flow, node, axes)
    if node.attrs.get("keepdims"):
        return labels
    return labels.reshape([extent for axis, extent in enumerate(labels.shape) if axis not in axes])


def softmax(flow: Flow, node: Node) -> Labels:
    """Softmax and log-softmax."""
    return _keep_if_mixed(flow, node, normalize_axes(int(node.attrs["axis"]), len(node.shape)))


def norm(flow: Flow, node: Node) -> Labels:
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
                return unknown(flow, node)
            flow.constants[node.name, index] = vector
    return labels
