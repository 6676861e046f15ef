"""Operators that only move values: most are another form or another part of the same tiles and cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lpsn_tvm.schedules.vta.ops import Plane, Store
from lpsn_tvm.targets.vta.forms import Array, Form, Value
from lpsn_tvm.targets.vta.gemm import Rectangle, Windows, channel_gemms, operator
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.layout import image_shape
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped
from lpsn_tvm.targets.vta.taps import Window


def lower_resize_nearest(context: Context, node: Node) -> None:
    """Every pixel to a rectangle of copies: a transposed convolution with a kernel of ones."""
    source = context.value(node.variable(0))
    factors = [
        _factor(node.attrs[name], extent) for name, extent in zip(("rows", "columns"), source.image[2:], strict=True)
    ]
    windows = tuple(Window(factor, factor, is_transposed=True) for factor in factors)
    _move(context, node, source, (windows[0], windows[1]), np.ones(tuple(factors), np.int64))


def _factor(positions: Sequence[int], extent: int) -> int:
    factor, rest = divmod(len(positions), extent)
    if rest or [int(p) for p in positions] != [i // factor for i in range(len(positions))]:
        raise Unmapped(f"it resizes {extent} positions to {len(positions)}, not by a whole factor")
    return factor


def lower_pad(context: Context, node: Node) -> None:
    """Zeros around: accumulators that nothing is added to."""
    if node.attrs["mode"] != "constant" or int(node.attrs["value"]) != 0:
        raise Unmapped("it pads with something else than zeros")
    source = context.value(node.variable(0))
    top, left = (int(pad) for pad in node.attrs["pad_width"][:2])
    _move(context, node, source, (Window(padding=top), Window(padding=left)), np.ones((1, 1), np.int64))


def _move(context: Context, node: Node, source: Value, windows: Windows, kernel: Array) -> None:
    """Copy through the accumulators."""
    low, high = min(0, source.low), max(0, source.high)
    result = Rectangle.plain(image_shape(node.shape), context.block)
    ones = np.ones(source.image[1], np.int64)
    steps = channel_gemms(context, node.name, source, result, windows, ones, kernel)
    target = context.new_tensor(node, low, high)
    context.emit(operator(node.name, context, result, [*steps, Store(target.plane)]))


def lower_strided_slice(context: Context, node: Node) -> None:
    """Channels: fewer lanes in use. Rows and columns: a part of the plane; a step along x needs a copy."""
    source = context.value(node.variable(0))
    n, c, height, width = source.image
    axes = {2: (0, 1), 3: (0, 1, 3), 4: (0, 1, 2, 3)}[len(context.shapes[node.variable(0)])]
    cuts = {axis: (0, extent, 1) for axis, extent in enumerate((n, c, height, width))}
    names = ("axes", "begin", "end", "strides")
    for axis, *cut in zip(*(node.attrs[name] for name in names), strict=True):
        begin, end, step = (int(part) for part in cut)
        cuts[axes[int(axis)]] = (begin, end, step)
    if cuts[0] != (0, n, 1):
        raise Unmapped("it cuts the batch axis")
    if any(step < 1 for _, _, step in cuts.values()):
        raise Unmapped("it reverses an axis")
    part = _channels_cut(source, range(*cuts[1]), context.block)
    rows, columns = range(*cuts[2]), range(*cuts[3])
    if rows == range(height) and columns == range(width):
        context.define_view(node, replace(part, name=node.name))
    elif columns.step == 1 and part.form.is_one_pixel:
        plane = replace(
            part.plane,
            base=part.plane.base + rows.start * part.plane.row_stride + columns.start,
            height=len(rows),
            width=len(columns),
            row_stride=part.plane.row_stride * rows.step,
        )
        image = (n, part.image[1], len(rows), len(columns))
        context.define_view(node, replace(part, name=node.name, image=image, plane=plane))
    else:
        windows = (Window(1, rows.step, -rows.start), Window(1, columns.step, -columns.start))
        _move(context, node, part, windows, np.ones((1, 1), np.int64))


def _channels_cut(source: Value, channels: range, block: int) -> Value:
    """Only `channels`, renumbered; blocks without any of them are left out."""
    form = source.form
    number = {channel: index for index, channel in enumerate(channels)}
    kept = [number.get(channel, -1) for channel in form.channels]
    used = [lane // block for lane, channel in enumerate(kept) if channel >= 0]
    first, last = min(used), max(used) + 1
    lanes = slice(first * block, last * block)
    plane = replace(source.plane, base=source.plane.base + first * source.plane.block_stride, blocks=last - first)
    cut = replace(form, channels=tuple(kept[lanes]), dy=form.dy[lanes], dx=form.dx[lanes])
    return replace(source, image=(source.image[0], len(channels), *source.image[2:]), plane=plane, form=cut)


def lower_depth_to_space(context: Context, node: Node) -> None:
    """A channel becomes a pixel offset."""
    source, b = context.value(node.variable(0)), int(node.attrs["block_size"])
    channels = source.image[1] // (b * b)
    old = source.form.channel_array
    if node.attrs["mode"] == "DCR":
        offset, new = np.divmod(old, channels)
    else:
        new, offset = np.divmod(old, b * b)
    used = old >= 0
    form = Form(
        tuple(int(c) for c in np.where(used, new, -1)),
        tuple(int(d) for d in np.where(used, np.asarray(source.form.dy) * b + offset // b, 0)),
        tuple(int(d) for d in np.where(used, np.asarray(source.form.dx) * b + offset % b, 0)),
        (source.form.steps[0] * b, source.form.steps[1] * b),
        source.form.is_zero_outside,
    )
    context.define_view(node, replace(source, name=node.name, image=image_shape(node.shape), form=form))


def lower_reshape(context: Context, node: Node) -> None:
    """Extents of 1 come and go; [N, C, H, W] becomes [N, C * H * W] as channels in the order of the tiles."""
    source = context.value(node.variable(0))
    if not 2 <= len(node.shape) <= 4:
        raise Unmapped(f"a tensor of shape {node.shape} has no tile layout")
    image = image_shape(node.shape)
    if image == source.image:
        context.define_view(node, replace(source, name=node.name))
    elif image[0] == source.image[0] and image[2:] == (1, 1):
        context.define_view(node, _flattened(replace(source, name=node.name), context.block))
    elif image[:2] == source.image[:2] and source.is_plain:
        p = source.plane
        plane = replace(p, height=image[2], width=image[3], row_stride=image[3])
        context.define_view(node, replace(source, name=node.name, image=image, plane=plane))
    else:
        raise Unmapped("it mixes channels and pixels")


def _flattened(source: Value, block: int) -> Value:
    """One pixel whose channels are all elements, in the order of the tiles."""
    p, form = source.plane, source.form
    n, c, height, width = source.image
    if p.row_stride != p.width or p.block_stride != p.height * p.width:
        raise Unmapped("it flattens a part of a tensor")
    ty, tx = np.meshgrid(np.arange(p.height), np.arange(p.width), indexing="ij")
    lanes = [np.asarray(part).reshape(p.blocks, 1, block) for part in (form.channels, form.dy, form.dx)]
    y = (ty.reshape(1, -1, 1)) * form.steps[0] + lanes[1]
    x = (tx.reshape(1, -1, 1)) * form.steps[1] + lanes[2]
    is_used = (lanes[0] >= 0) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    element = np.where(is_used, (lanes[0] * height + y) * width + x, -1)
    tiles = p.blocks * p.height * p.width
    plane = Plane(p.region, p.base, p.batches, tiles, 1, 1, p.batch_stride, 1, 1)
    flat = Form.plain(element.reshape(-1).tolist(), block)
    return replace(source, image=(n, c * height * width, 1, 1), plane=plane, form=flat)


def lower_transpose(context: Context, node: Node) -> None:
    """Only where extents of 1 change places."""
    shape = context.shapes[node.variable(0)]
    moved = [axis for axis in node.attrs["axes"] if shape[int(axis)] > 1]
    if moved != sorted(moved):
        raise Unmapped("it permutes axes")
    lower_reshape(context, node)
