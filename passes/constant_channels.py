"""Which channels of a canonical function have one known value for every input: the facts behind dead channel removal.

Every variable gets a float64 array of its own rank, axes full or 1, with the value where it is the same for every
input, batch sample and position, and NaN where it is not known. Layers with zero weights start it; operators that are
not listed forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from lpsn_tvm.graph import Layer, bindings, call_attrs, constant_value, find_layers, is_constant, op_name, shape_of
from lpsn_tvm.passes import channel_moves
from lpsn_tvm.passes.channel_labels import Flow, Labels, Node, compress, normalize_axes

Values = NDArray[np.float64]
Lookup = Callable[[Any], Values]


def constant_channels(mod: tvm.IRModule) -> dict[str, Values]:
    """Variable -> its known values, NaN where unknown."""
    layers = {layer.acc: layer for layer in find_layers(mod).values()}
    known: dict[str, Values] = {p.name: np.full((1,) * len(shape_of(p)), np.nan) for p in mod["main"].params}
    shapes = {p.name: shape_of(p) for p in mod["main"].params}

    def lookup(expr: Any) -> Values:
        return constant_value(expr).astype(np.float64) if is_constant(expr) else known[expr.name]

    for var, value in bindings(mod):
        if isinstance(value, (relax.Var, relax.Tuple)):
            continue
        shapes[var.name] = shape_of(var)
        node = Node(var.name, op_name(value), call_attrs(value), tuple(value.args), shapes[var.name])
        with np.errstate(all="ignore"):
            if var.name in layers:
                result = _layer(layers[var.name], lookup(value.args[0]))
            elif node.op in _MOVES:
                result = _move(node, known, shapes)
            else:
                result = _RULES.get(node.op, _forget)(node, lookup)
        known[var.name] = _tidy(result)
    return known


def _tidy(values: Values) -> Values:
    """Unknown is one NaN pattern, so that arrays of unknowns are recognised as constant along an axis."""
    tidy = np.ascontiguousarray(np.where(np.isfinite(values), values, np.nan))
    return compress(tidy.view(np.int64)).view(np.float64)


def contribution(layer: Layer, values: Values) -> Values:
    """float64[O]: what constant input channels add to a layer's output where they reach it through the whole kernel.

    Parameters
    ----------
    layer : Layer
        Any weighted layer.
    values : float64[C]
        Value per input channel; zero for those that are left out.
    """
    blocks = _blocks(layer)
    if layer.groups == 1:
        some = np.flatnonzero(values)
        total: Values = blocks[0][:, some].sum(axis=-1, dtype=np.float64) @ values[some]
        return total
    total = (blocks.sum(axis=-1, dtype=np.float64) * values.reshape(layer.groups, 1, -1)).sum(axis=-1)
    return total.reshape(-1)


def used_blocks(layer: Layer) -> NDArray[np.bool_]:
    """bool[groups, out per group, in per group]: weight blocks with anything but zeros."""
    used: NDArray[np.bool_] = (_blocks(layer) != 0).any(axis=-1)
    return used


def _blocks(layer: Layer) -> NDArray[np.float32]:
    """A view of the weight as float32[groups, out per group, in per group, kernel]."""
    weight = layer.weight
    if layer.kind == "dense":
        return weight.T[None, :, :, None]
    blocks = weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].size)
    return blocks if layer.kind == "conv2d" else blocks.transpose(0, 2, 1, 3)


def input_values(layer: Layer, known: Values) -> Values:
    """float64[C]: values of a layer's input channels as far as they reach every output position alike, else NaN.

    Zero padding (and the border and stride of a transposed convolution) mixes the value with zeros: then only zero
    itself is known.
    """
    axis = len(layer.in_shape) - 1 if layer.kind == "dense" else 1
    if any(extent > 1 for i, extent in enumerate(known.shape) if i != axis):
        return np.full(layer.in_shape[axis], np.nan)
    vector = np.broadcast_to(known.reshape(-1), (layer.in_shape[axis],))
    if layer.kind == "conv2d_transpose" or any(layer.attrs.get("padding", ())):
        return np.where(vector == 0, 0.0, np.nan)
    return vector


def _layer(layer: Layer, known: Values) -> Values:
    vector = input_values(layer, known)
    total = contribution(layer, np.nan_to_num(vector))
    unknown = used_blocks(layer) & np.isnan(vector).reshape(layer.groups, 1, -1)
    total[unknown.any(axis=-1).reshape(-1)] = np.nan
    shape = [1] * len(layer.out_shape)
    shape[-1 if layer.kind == "dense" else 1] = -1
    return total.reshape(shape)


def _forget(node: Node, lookup: Lookup) -> Values:
    return np.full((1,) * len(node.shape), np.nan)


# --- data movement: what moves labels moves values ---


class _Moves(Flow):
    """Labels stand for values here, so nothing is tied."""

    def fold(self, labels: Labels, axes: Iterable[int]) -> Labels:
        return labels


_MOVES = {
    "relax.reshape": channel_moves.reshape,
    "relax.flatten": channel_moves.reshape,
    "relax.nn.batch_flatten": channel_moves.reshape,
    "relax.squeeze": channel_moves.reshape,
    "relax.expand_dims": channel_moves.reshape,
    "relax.permute_dims": channel_moves.permute,
    "relax.nn.pixel_shuffle": channel_moves.pixel_shuffle,
    "relax.broadcast_to": channel_moves.broadcast_to,
    "relax.strided_slice": channel_moves.strided_slice,
    "relax.take": channel_moves.take,
}


def _move(node: Node, known: dict[str, Values], shapes: dict[str, tuple[int, ...]]) -> Values:
    if is_constant(node.args[0]):
        return np.full((1,) * len(node.shape), np.nan)
    source = node.args[0].name
    bits = np.ascontiguousarray(known[source]).view(np.int64)
    moved = _MOVES[node.op](_Moves({}, labels={source: bits}, shapes={source: shapes[source]}), node)
    return np.ascontiguousarray(moved).view(np.float64)


def _concat(node: Node, lookup: Lookup) -> Values:
    axis = int(node.attrs.get("axis") or 0) % len(node.shape)
    parts = [(lookup(item), shape_of(item)[axis]) for item in node.args[0].fields]
    extents = [max(part.shape[i] for part, _ in parts) for i in range(len(node.shape))]
    full = [np.broadcast_to(part, (*extents[:axis], extent, *extents[axis + 1 :])) for part, extent in parts]
    return np.concatenate(full, axis)


def _pad(node: Node, lookup: Lookup) -> Values:
    values, widths = lookup(node.args[0]), node.attrs["pad_width"]
    fill = float(node.attrs["pad_value"]) if node.attrs.get("pad_mode", "constant") == "constant" else None
    for axis in range(values.ndim):
        before, after = int(widths[2 * axis]), int(widths[2 * axis + 1])
        if before == after == 0:
            continue
        if values.shape[axis] == 1:
            values = values if fill is None else np.where(values == fill, values, np.nan)
        elif fill is None or min(before, after) < 0:
            return _forget(node, lookup)
        else:
            spec = [(before, after) if i == axis else (0, 0) for i in range(values.ndim)]
            values = np.pad(values, spec, constant_values=fill)
    return values


# --- arithmetic ---

_UNARY: dict[str, Callable[[Values, dict[str, Any]], Values]] = {
    "relax.nn.relu": lambda x, _: np.maximum(x, 0),
    "relax.nn.relu6": lambda x, _: np.clip(x, 0, 6),
    "relax.nn.leakyrelu": lambda x, attrs: np.where(x < 0, x * float(attrs["alpha"]), x),
    "relax.nn.silu": lambda x, _: x / (1 + np.exp(-x)),
    "relax.sigmoid": lambda x, _: 1 / (1 + np.exp(-x)),
    "relax.tanh": lambda x, _: np.tanh(x),
    "relax.abs": lambda x, _: np.abs(x),
    "relax.negative": lambda x, _: -x,
    "relax.exp": lambda x, _: np.exp(x),
    "relax.sqrt": lambda x, _: np.sqrt(x),
    "relax.square": lambda x, _: x * x,
}
_BINARY: dict[str, Callable[[Values, Values], Values]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.divide": np.divide,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.multiply": lambda a, b: np.where((a == 0) | (b == 0), 0.0, a * b),
}


def _unary(node: Node, lookup: Lookup) -> Values:
    return _UNARY[node.op](lookup(node.args[0]), node.attrs)


def _binary(node: Node, lookup: Lookup) -> Values:
    return _BINARY[node.op](lookup(node.args[0]), lookup(node.args[1]))


def _clip(node: Node, lookup: Lookup) -> Values:
    low, high = (float(arg.value) for arg in node.args[1:3])
    return np.clip(lookup(node.args[0]), low, high)


def _prelu(node: Node, lookup: Lookup) -> Values:
    values, slope = lookup(node.args[0]), lookup(node.args[1])
    if slope.ndim == 1:
        axis = int(node.attrs["axis"]) % values.ndim
        slope = slope.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return np.where(values < 0, values * slope, values)


# --- space ---


def _keep(node: Node, lookup: Lookup) -> Values:
    return lookup(node.args[0])


def _keep_zero(node: Node, lookup: Lookup) -> Values:
    values = lookup(node.args[0])
    return np.where(values == 0, values, np.nan)


def _avg_pool(node: Node, lookup: Lookup) -> Values:
    """Counted padding mixes zeros in at the border."""
    mixed = node.attrs.get("count_include_pad") and (any(node.attrs["padding"]) or node.attrs.get("ceil_mode"))
    return (_keep_zero if mixed else _keep)(node, lookup)


def _resize(node: Node, lookup: Lookup) -> Values:
    """Weights of nearest and linear resize sum to one; cubic ones only nearly."""
    exact = node.attrs["method"] != "cubic" and node.attrs["coordinate_transformation_mode"] != "tf_crop_and_resize"
    return (_keep if exact else _keep_zero)(node, lookup)


def _mean(node: Node, lookup: Lookup) -> Values:
    values = lookup(node.args[0])
    axes = normalize_axes(node.attrs.get("axis"), values.ndim)
    if any(values.shape[axis] > 1 for axis in axes):
        return _forget(node, lookup)
    if node.attrs.get("keepdims"):
        return values
    return values.reshape([extent for axis, extent in enumerate(values.shape) if axis not in axes])


def _instance_norm(node: Node, lookup: Lookup) -> Values:
    """A channel of zeros becomes its offset; other constants lose digits in the division by sqrt(epsilon)."""
    values, offset = lookup(node.args[0]), lookup(node.args[2])
    axis = int(node.attrs["channel_axis"]) % values.ndim
    offset = offset.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return np.where(values == 0, offset, np.nan)


_RULES: dict[str, Callable[[Node, Lookup], Values]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    "relax.clip": _clip,
    "relax.nn.prelu": _prelu,
    "relax.concat": _concat,
    "relax.nn.pad": _pad,
    "relax.nn.max_pool2d": _keep,
    "relax.nn.adaptive_avg_pool2d": _keep,
    "relax.nn.avg_pool2d": _avg_pool,
    "relax.image.resize2d": _resize,
    "relax.mean": _mean,
    "relax.max": _mean,
    "relax.min": _mean,
    "relax.nn.instance_norm": _instance_norm,
}
