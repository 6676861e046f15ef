"""Converters of data movement: reshape family, transpose, concat, split, slice, gather, pad, depth-to-space.

Source: the ONNX operator specifications of the operators named in `CONVERTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.frontend.node import Expr, Node

op = relax.op


def reshape_to(node: Node, shape: Sequence[Any]) -> Expr:
    """Bind a reshape of the first operand."""
    return node.emit(op.reshape(node.inputs[0], tuple(int(extent) for extent in shape)))


def reshape(node: Node) -> Expr:
    """Reshape: 0 copies the extent (unless allowzero), -1 is what is left."""
    target, shape = node.integers("shape", 1), node.shape()
    if target is None:
        raise node.unsupported("no target shape")
    if not node.attrs.get("allowzero", 0):
        target = tuple(shape[index] if extent == 0 else extent for index, extent in enumerate(target))
    known = int(np.prod([extent for extent in target if extent != -1], dtype=np.int64))
    return reshape_to(
        node, [int(np.prod(shape, dtype=np.int64)) // known if extent == -1 else extent for extent in target]
    )


def flatten(node: Node) -> Expr:
    """Flatten -> reshape to two dimensions."""
    shape = node.shape()
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return reshape_to(node, (np.prod(shape[:axis], dtype=np.int64), np.prod(shape[axis:], dtype=np.int64)))


def squeeze(node: Node) -> Expr:
    """Squeeze -> reshape."""
    shape = node.shape()
    axes = node.integers("axes", 1)
    dropped = (
        {axis % len(shape) for axis in axes}
        if axes is not None
        else {i for i, extent in enumerate(shape) if extent == 1}
    )
    if any(shape[axis] != 1 for axis in dropped):
        raise node.unsupported(f"axes {sorted(dropped)} of shape {shape} are not all 1")
    return reshape_to(node, [extent for index, extent in enumerate(shape) if index not in dropped])


def unsqueeze(node: Node) -> Expr:
    """Unsqueeze -> reshape."""
    axes = node.integers("axes", 1) or ()
    rank = len(node.shape()) + len(axes)
    places = {axis % rank for axis in axes}
    rest = iter(node.shape())
    return reshape_to(node, [1 if index in places else next(rest) for index in range(rank)])


def transpose(node: Node) -> Expr:
    """Transpose -> permute_dims, axes always given."""
    rank = len(node.shape())
    return node.emit(
        op.permute_dims(node.inputs[0], [int(axis) for axis in node.attrs.get("perm", range(rank - 1, -1, -1))])
    )


def concat(node: Node) -> Expr:
    """Concat -> concat."""
    if len(node.inputs) == 1:
        return node.inputs[0]
    return node.emit(op.concat(list(node.inputs), int(node.attrs["axis"]) % len(node.shape())))


def strided_slice(
    data: Expr, axes: Sequence[int], begin: Sequence[int], end: Sequence[int], strides: Sequence[int]
) -> Expr:
    """A slice call with resolved bounds; `end` is -(extent + 1) where a negative stride runs through element 0."""
    return op.strided_slice(data, list(axes), list(begin), list(end), list(strides))


def split(node: Node) -> list[Expr]:
    """Split -> one strided_slice per output, named `<node>.<number of the output>`."""
    shape = node.shape()
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    sizes = node.integers("split", 1)
    if sizes is None:
        parts = int(node.attrs.get("num_outputs", node.output_count))
        chunk = -(-shape[axis] // parts)
        sizes = tuple(min(chunk, shape[axis] - index * chunk) for index in range(parts))
    edges = np.cumsum((0, *sizes)).tolist()
    return [
        node.emit(strided_slice(node.inputs[0], [axis], [begin], [end], [1]), str(index))
        for index, (begin, end) in enumerate(pairwise(edges))
    ]


def slice_(node: Node) -> Expr:
    """Slice -> strided_slice with bounds resolved as Python resolves them."""
    shape = node.shape()
    starts, ends = node.integers("starts", 1), node.integers("ends", 2)
    assert starts is not None and ends is not None
    axes = node.integers("axes", 3) or tuple(range(len(starts)))
    steps = node.integers("steps", 4) or (1,) * len(starts)
    axes = tuple(axis % len(shape) for axis in axes)
    begin, end = [], []
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        first, last, _ = slice(start, stop, step).indices(shape[axis])
        begin.append(first)
        end.append(last if last >= 0 else -(shape[axis] + 1))
    return node.emit(strided_slice(node.inputs[0], axes, begin, end, steps))


def gather(node: Node) -> Expr:
    """Gather with constant indices: an index -> slice and reshape, a run -> slice, else take."""
    shape = node.shape()
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    indices = node.constant(1, "the indices")
    if graph.is_constant(node.inputs[0]) or indices is None:
        raise node.unsupported("gather from a constant by computed indices (an embedding)")
    flat = [int(index) % shape[axis] for index in indices.reshape(-1)]
    if flat == list(range(flat[0], flat[0] + len(flat))):
        result = strided_slice(node.inputs[0], [axis], [flat[0]], [flat[-1] + 1], [1])
    else:
        result = op.take(node.inputs[0], graph.constant(np.asarray(flat, np.int64)), axis, mode="clip")
    if indices.ndim == 1:
        return node.emit(result)
    return node.emit(op.reshape(result, (*shape[:axis], *indices.shape, *shape[axis + 1 :])))


def pad(node: Node) -> Expr:
    """Pad -> nn.pad; "edge" is called "replicate" there; negative widths (crops) become a slice behind."""
    shape, rank = node.shape(), len(node.shape())
    widths = node.integers("pads", 1)
    assert widths is not None
    axes = node.integers("axes", 3) or tuple(range(len(widths) // 2))
    before, after = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        before[axis % rank], after[axis % rank] = widths[position], widths[position + len(axes)]
    mode = node.attrs.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge"):
        raise node.unsupported(f"mode {mode!r}; supported are constant, reflect and edge")
    fill = node.constant(2, "the value")
    value = float(node.attrs.get("value", 0.0)) if fill is None or not fill.size else float(fill.reshape(()))
    grown = [max(width, 0) for pair in zip(before, after, strict=True) for width in pair]
    data = node.inputs[0]
    if any(grown):
        data = op.nn.pad(data, grown, "replicate" if mode == "edge" else mode, value)
    cropped = [axis for axis in range(rank) if before[axis] < 0 or after[axis] < 0]
    if cropped:
        begin = [max(-before[axis], 0) for axis in cropped]
        end = [shape[axis] + max(before[axis], 0) + after[axis] for axis in cropped]
        if any(after[axis] > 0 for axis in cropped):
            end = [shape[a] + max(before[a], 0) + max(after[a], 0) + min(after[a], 0) for a in cropped]
        data = strided_slice(data, cropped, begin, end, [1] * len(cropped))
    return node.emit(data) if isinstance(data, relax.Call) else data


def depth_to_space(node: Node) -> Expr:
    """DepthToSpace: CRD -> nn.pixel_shuffle; DCR -> reshape, permute_dims, reshape."""
    n, c, h, w = node.shape()
    block = int(node.attrs["blocksize"])
    if node.attrs.get("mode", "DCR") == "CRD":
        return node.emit(op.nn.pixel_shuffle(node.inputs[0], block))
    wide = op.reshape(node.inputs[0], (n, block, block, c // block**2, h, w))
    return node.emit(op.reshape(op.permute_dims(wide, [0, 3, 4, 1, 5, 2]), (n, c // block**2, h * block, w * block)))


def space_to_depth(node: Node) -> Expr:
    """SpaceToDepth -> reshape, permute_dims, reshape."""
    n, c, h, w = node.shape()
    block = int(node.attrs["blocksize"])
    tall = op.reshape(node.inputs[0], (n, c, h // block, block, w // block, block))
    return node.emit(op.reshape(op.permute_dims(tall, [0, 3, 5, 1, 2, 4]), (n, c * block**2, h // block, w // block)))


def expand(node: Node) -> Expr:
    """Expand -> broadcast_to."""
    target = node.constant(1, "the shape")
    assert target is not None
    shape = tuple(int(extent) for extent in np.broadcast_shapes(node.shape(), tuple(target.reshape(-1).tolist())))
    return node.inputs[0] if shape == node.shape() else node.emit(op.broadcast_to(node.inputs[0], shape))


def tile(node: Node) -> Expr:
    """Tile -> concat of copies, axis by axis."""
    repeats = node.constant(1, "the repeats")
    assert repeats is not None
    data: Any = node.inputs[0]
    steps = [(axis, int(count)) for axis, count in enumerate(repeats.reshape(-1)) if count != 1]
    for position, (axis, count) in enumerate(steps):
        data = node.emit(op.concat([data] * count, axis), None if position == len(steps) - 1 else "")
    return data


CONVERTERS: dict[str, Callable[[Node], Any]] = {
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "Pad": pad,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Expand": expand,
    "Tile": tile,
}
