"""Remove channels physically: one rebuild that slices every weight, bias and per-channel constant.

Before -> After, for a group with the units `keep`:

1. weights of its producers lose output channels, of its consumers input channels, of its followers both; biases and
   per-channel constants follow the value that they are added to;
2. `groups` of a depthwise layer (or of a grouped layer whose whole groups leave) becomes the number of groups left;
3. targets of reshape and broadcast_to, bounds of strided_slice, indices of take and channel padding become what is left
   of them;
4. every other operator takes its new shapes from its operands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from lpsn_tvm.errors import PruneError
from lpsn_tvm.graph import (
    Layer,
    constant,
    constant_value,
    op_name,
    rebuild,
    shape_of,
)
from lpsn_tvm.passes.channel_groups import Mask, check_mask, collect_groups, resolve_classes
from lpsn_tvm.passes.channel_labels import Flow, Labels, compress
from lpsn_tvm.passes.channel_moves import slice_bounds

Params = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def remove_channels(mod: tvm.IRModule, masks: Mapping[str, Mask], params: Params | None = None) -> tvm.IRModule:
    """A canonical module without the units whose mask is False.

    Parameters
    ----------
    mod : IRModule
        Canonical form.
    masks : mapping of str to bool[size]
        Group name (of `find_channel_groups(mod)`) -> units to keep. Groups that are not named stay whole.
    params : mapping of str to (float32 weight, float32[C] bias), optional
        New weights of layers, each either in the layer's old full layout (then sliced here) or already in its reduced
        layout.

    Raises
    ------
    PruneError
        Unknown or frozen group, mask of the wrong length, a group that would vanish, parameters that fit neither
        layout.
    """
    flow, classes = resolve_classes(mod)
    keep = _kept_classes(flow, classes, masks)
    plan = _Plan(flow, keep, dict(params or {}))
    unknown = sorted(set(plan.params) - set(plan.layers))
    if unknown:
        raise PruneError(f"no such layer; layers are {sorted(plan.layers)}", where=unknown[0])
    return rebuild(mod, plan.rewrite)


def _kept_classes(flow: Flow, classes: Labels, masks: Mapping[str, Mask]) -> Mask:
    """Label -> whether it stays."""
    groups = collect_groups(flow, classes)
    sides = {name: vector for name, vector in flow.producers} | {name: written for name, _, written in flow.followers}
    keep = np.ones(int(classes.max()) + 1 if len(classes) else 0, bool)
    for name, mask in masks.items():
        group = groups[name]
        check_mask(group, mask)
        lead = group.producers[0] if group.producers else None
        layer, index = (lead.layer, lead.index) if lead else (group.followers[0].layer, group.followers[0].written)
        keep[classes[sides[layer][index[~mask, 0]]]] = False
    return keep[classes]


class _Plan:
    """What the rebuild needs to know about every binding."""

    def __init__(self, flow: Flow, keep: Mask, params: dict[str, Any]) -> None:
        self.flow = flow
        self.keep = keep
        self.params = params
        self.by_acc = flow.layers
        self.layers = {layer.name: layer for layer in flow.layers.values()}

    def left(self, labels: Labels) -> tuple[int, Mask] | None:
        """(axis, mask) of an array with these labels; None if nothing leaves it."""
        mask = compress(self.keep[labels])
        if mask.size == 1:
            return None
        return int(np.argmax(mask.shape)), mask.reshape(-1)

    def shape(self, name: str) -> tuple[int, ...]:
        """What is left of a variable's shape."""
        shape = list(self.flow.shapes[name])
        left = self.left(self.flow.labels[name])
        if left is not None:
            shape[left[0]] = int(left[1].sum())
        return tuple(shape)

    def rewrite(self, builder: relax.BlockBuilder, var: Any, value: Any, lookup: Any) -> Any:
        """The callback of `lpsn_tvm.graph.rebuild`."""
        name, op = var.name, op_name(value)
        if name in self.by_acc:
            return self._layer(var, value, lookup)
        layer = self.layers.get(name)
        if layer is not None and layer.name in self.params:
            return self._bias(value, lookup, layer)
        if op in ("relax.reshape", "relax.broadcast_to"):
            return relax.Call(value.op, [lookup(value.args[0]), relax.ShapeExpr(list(self.shape(name)))], value.attrs)
        if op == "relax.strided_slice":
            return self._slice(value, lookup)
        if op == "relax.take":
            return self._take(var, value, lookup)
        if op == "relax.nn.pad":
            return self._pad(var, value, lookup)
        if any((name, index) in self.flow.constants for index in range(len(_operands(value)))):
            return self._constants(name, value, lookup)
        return None

    def _constants(self, name: str, value: Any, lookup: Any) -> Any:
        args = []
        for index, arg in enumerate(_operands(value)):
            left = self.left(self.flow.constants[name, index]) if (name, index) in self.flow.constants else None
            args.append(
                constant(np.compress(left[1], constant_value(arg), left[0])) if left is not None else lookup(arg)
            )
        if op_name(value) == "relax.concat":
            args = [relax.Tuple(args)]
        return relax.Call(value.op, args, value.attrs, list(value.ty_args))

    def _layer(self, var: Any, value: Any, lookup: Any) -> Any:
        layer = self.by_acc[var.name]
        axes = {axis: self.keep[labels] for axis, labels in self.flow.axes.get((var.name, 1), {}).items()}
        weight = layer.weight if layer.name not in self.params else np.asarray(self.params[layer.name][0])
        reduced = tuple(
            int(axes[axis].sum()) if axis in axes else extent for axis, extent in enumerate(layer.weight.shape)
        )
        if weight.shape == layer.weight.shape:
            for axis, mask in axes.items():
                if not mask.all():
                    weight = np.compress(mask, weight, axis)
        elif weight.shape != reduced:
            raise PruneError(
                f"the new weight is {weight.shape}; allowed are {layer.weight.shape} (full) and {reduced} (reduced)",
                where=layer.name,
            )
        data, new_weight = lookup(value.args[0]), constant(weight.astype(np.float32, copy=False))
        if layer.kind == "dense":
            return relax.Call(value.op, [data, new_weight], value.attrs)
        options: dict[str, Any] = {key: list(layer.attrs[key]) for key in ("strides", "padding", "dilation")}
        options["groups"] = self._groups(layer, axes)
        if layer.kind == "conv2d":
            return relax.op.nn.conv2d(data, new_weight, **options)
        return relax.op.nn.conv2d_transpose(
            data, new_weight, output_padding=list(layer.attrs["output_padding"]), **options
        )

    def _groups(self, layer: Layer, axes: dict[int, Mask]) -> int:
        """Groups left: all of them unless the units are whole groups (then only axis 0 of the weight is sliced)."""
        if layer.groups == 1 or 1 in axes or 0 not in axes:
            return layer.groups
        return int(axes[0].sum()) * layer.groups // len(axes[0])

    def _bias(self, value: Any, lookup: Any, layer: Layer) -> Any:
        bias = np.asarray(self.params[layer.name][1], np.float32).reshape(-1)
        left = self.left(self.flow.labels[layer.name])
        full = layer.bias.size
        reduced = full if left is None else int(left[1].sum())
        if bias.size == full and left is not None:
            bias = bias[left[1]]
        elif bias.size != reduced:
            raise PruneError(
                f"the new bias has {bias.size} values; allowed are {full} (full) and {reduced} (reduced)",
                where=layer.name,
            )
        rank = len(shape_of(value.args[1]))
        return relax.op.add(
            lookup(value.args[0]), constant(bias.reshape([-1 if rank == 1 or axis == 1 else 1 for axis in range(rank)]))
        )

    def _slice(self, value: Any, lookup: Any) -> Any:
        source = value.args[0].name
        left = self.left(self.flow.labels[source])
        if left is None:
            return None
        axes, begins, ends = ([int(item) for item in value.args[i].fields] for i in (1, 2, 3))
        for place, (axis, begin, end, _) in enumerate(slice_bounds(value.args, self.flow.shapes[source])):
            if axis == left[0]:
                # Only stride 1 reaches a channel axis that loses something (others are frozen).
                before = np.concatenate([[0], np.cumsum(left[1])])
                begins[place], ends[place] = int(before[begin]), int(before[end])
        strides = [int(item) for item in value.args[4].fields] if len(value.args) > 4 else None
        return relax.op.strided_slice(lookup(value.args[0]), axes, begins, ends, strides)

    def _take(self, var: Any, value: Any, lookup: Any) -> Any:
        left, kept = self.left(self.flow.labels[value.args[0].name]), self.left(self.flow.labels[var.name])
        axis = int(value.attrs.axis) % len(self.flow.shapes[var.name])
        if left is None or left[0] != axis:
            return None
        indices = constant_value(value.args[1])
        if kept is not None:
            indices = indices[kept[1]]
        renumbered = (np.cumsum(left[1]) - 1)[indices].astype(indices.dtype)
        return relax.Call(value.op, [lookup(value.args[0]), constant(renumbered)], value.attrs)

    def _pad(self, var: Any, value: Any, lookup: Any) -> Any:
        left = self.left(self.flow.labels[var.name])
        if left is None:
            return None
        axis, mask = left
        widths = [int(width) for width in value.attrs.pad_width]
        before, after = widths[2 * axis], widths[2 * axis + 1]
        widths[2 * axis], widths[2 * axis + 1] = int(mask[:before].sum()), int(mask[len(mask) - after :].sum())
        return relax.op.nn.pad(lookup(value.args[0]), widths, value.attrs.pad_mode, float(value.attrs.pad_value))


def _operands(value: Any) -> list[Any]:
    if op_name(value) == "relax.concat":
        return list(value.args[0].fields)
    return list(value.args)
