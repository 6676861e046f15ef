"""Operators that only move values: most are another form or another part of the same tiles and cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lpsn_tvm.schedules.vta.ops import Plane, Span, Store, Tap
from lpsn_tvm.targets.vta.forms import Array, Form, Value
from lpsn_tvm.targets.vta.gemm import IDENTITY, Rectangle, Windows, channel_gemms, operator, plain_copy, shared_diagonal
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.layout import image_shape
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped
from lpsn_tvm.targets.vta.offset_padding import padding_steps
from lpsn_tvm.targets.vta.taps import Window

MOST_RUNS = 64
"""Taps of a copy; beyond this many the host is the better place."""


def lower_resize_nearest(context: Context, node: Node) -> None:
    """By whole factors every pixel to a rectangle of copies, a transposed convolution with a kernel of ones; by others
    run by run.
    """
    source = context.value(node.variable(0))
    if any(_factor(node.attrs[n], e) is None for n, e in zip(("rows", "columns"), source.image[2:], strict=True)):
        _gather(context, node, source, node.attrs["rows"], node.attrs["columns"])
        return
    factors = [
        len(node.attrs[name]) // extent for name, extent in zip(("rows", "columns"), source.image[2:], strict=True)
    ]
    windows = tuple(Window(factor, factor, is_transposed=True) for factor in factors)
    _move(context, node, source, (windows[0], windows[1]), np.ones(tuple(factors), np.int64))


def _factor(positions: Sequence[int], extent: int) -> int | None:
    """The whole factor that `positions` enlarge an extent by, if they do."""
    factor, rest = divmod(len(positions), extent)
    is_whole = not rest and [int(p) for p in positions] == [i // factor for i in range(len(positions))]
    return factor if is_whole else None


def lower_pad(context: Context, node: Node) -> None:
    """Zeros around: accumulators that nothing is added to; other numbers: a constant is. Reflected or repeated borders:
    runs of copies.
    """
    source = context.value(node.variable(0))
    top, left, bottom, right = (int(pad) for pad in node.attrs["pad_width"])
    mode = str(node.attrs["mode"])
    if mode != "constant":
        rows = np.pad(np.arange(source.image[2]), (top, bottom), mode=mode)  # type: ignore[call-overload]
        columns = np.pad(np.arange(source.image[3]), (left, right), mode=mode)  # type: ignore[call-overload]
        _gather(context, node, source, rows.tolist(), columns.tolist())
        return
    windows = (Window(padding=top), Window(padding=left))
    _move(context, node, source, windows, np.ones((1, 1), np.int64), int(node.attrs["value"]))


def _gather(context: Context, node: Node, source: Value, rows: Sequence[int], columns: Sequence[int]) -> None:
    """Result pixel (i, j) is source pixel (rows[i], columns[j]): a tap per pair of runs."""
    runs = [_position_runs(positions) for positions in (rows, columns)]
    if len(runs[0]) * len(runs[1]) > MOST_RUNS:
        raise Unmapped(f"its pixels come from {len(runs[0]) * len(runs[1])} places")
    source = source if source.form.is_one_pixel else plain_copy(context, source)
    result = Rectangle(image_shape(node.shape), source.form, (len(rows), len(columns)))
    whole = shared_diagonal(context, source, Rectangle.of(source), IDENTITY, 1)
    taps = tuple(Tap(y[0], x[0], y[1], x[1], 0) for y in runs[0] for x in runs[1])
    target = context.new_tensor(node, source.low, source.high)
    if target.form != source.form:
        raise Unmapped("its channels lie with gaps")
    context.emit(operator(node.name, context, result, [replace(whole, taps=taps), Store(target.plane)]))


def _position_runs(positions: Sequence[int]) -> list[tuple[Span, Span]]:
    """(result, source) of consecutive positions that read consecutive ones."""
    runs: list[tuple[Span, Span]] = []
    for index, position in enumerate(int(p) for p in positions):
        if runs and runs[-1][1].start + runs[-1][1].count == position:
            count = runs[-1][0].count + 1
            runs[-1] = replace(runs[-1][0], count=count), replace(runs[-1][1], count=count)
        else:
            runs.append((Span(index, 1, 1), Span(position, 1, 1)))
    return runs


def _move(context: Context, node: Node, source: Value, windows: Windows, kernel: Array, padding: int = 0) -> None:
    """Copy through the accumulators."""
    low, high = min(0, padding, source.low), max(0, padding, source.high)
    result = Rectangle.plain(image_shape(node.shape), context.block)
    ones = np.ones(source.image[1], np.int64)
    steps = channel_gemms(context, node.name, source, result, windows, ones, kernel)
    if padding:
        weight = np.broadcast_to(kernel, (len(ones), 1, *kernel.shape))
        steps += padding_steps(context, node.name, weight, windows, source.image[2:], result, padding)
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
    if _shuffled(context, node, source):
        return
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


def _shuffled(context: Context, node: Node, source: Value) -> bool:
    """Channel shuffle: [N, C, ...] -> [N, a, b, ...] -> [N, b, a, ...] -> [N, C, ...] renumbers channels."""
    n, c = source.image[:2]
    permuted = context.graph.only_consumer(node.name)
    merged = None if permuted is None else context.graph.only_consumer(permuted.name)
    if permuted is None or merged is None or (permuted.op, merged.op) != ("lpsn.transpose", "lpsn.reshape"):
        return False
    axes, original = list(permuted.attrs["axes"]), context.shapes[node.variable(0)]
    if merged.shape != original or len(original) < 3 or axes != [0, 2, 1, *range(3, len(node.shape))]:
        return False
    if node.shape[0] != n or node.shape[1] * node.shape[2] != c:
        return False
    a, b = node.shape[1:3]
    channels = tuple((old % b) * a + old // b if old >= 0 else -1 for old in source.form.channels)
    context.define(merged, replace(source, name=merged.name, form=replace(source.form, channels=channels)))
    context.fused |= {permuted.name, merged.name}
    return True


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
