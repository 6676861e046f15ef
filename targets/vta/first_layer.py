"""How a layer's input reaches the accelerator. What the host holds, it may pack as the layer likes best.

An input of few channels leaves most lanes of its tiles empty. Lanes can hold neighbouring pixels as well: along an axis
with stride s, tile t holds the `size` pixels from `t * s - padding` on, for a size between s (space to depth) and the
whole kernel (a window, im2col). A larger size needs fewer taps and more lanes:

    7x7, stride 2, 3 channels     size 1 x 1: 49 taps of 1 tile;  2 x 2: 16 taps;  2 x 7: 4 taps of 3 tiles
    3x3, stride 1, 1 channel      size 3 x 3: 1 tap of 1 tile

The sizes with the fewest cycles are taken: one per micro-operation, a few per tile that the host must pack and the
accelerator load. Integers wider than the hardware's are split: `x = high * 2**low_bits + low`, the sums over `high` are
doubled before those over `low` are added.
"""

from __future__ import annotations

from dataclasses import dataclass

from lpsn_tvm.schedules.vta.ops import Plane
from lpsn_tvm.targets.vta.forms import Form, Image, Value
from lpsn_tvm.targets.vta.gemm import Rectangle, Windows
from lpsn_tvm.targets.vta.layout import GatherLayout, Lane, Part, ceil_div
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped
from lpsn_tvm.targets.vta.network import SymbolicTensor
from lpsn_tvm.targets.vta.taps import Side, Window, axis_taps

CYCLES_PER_TILE = 4
"""Of loading one, at half of the bus's rate."""


@dataclass(frozen=True)
class _Axis:
    """How one axis is packed: the pixels of a tile, and what that makes of the layer's taps."""

    step: int
    first: int
    size: int
    tiles: int
    positions: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of the pixels in a tile."""
        return tuple(range(self.first, self.first + self.size))


@dataclass(frozen=True)
class _Packing:
    rows: _Axis
    columns: _Axis
    channels: int

    @property
    def lanes(self) -> list[tuple[int, int, int]]:
        """(channel, dy, dx), channels innermost."""
        return [(c, dy, dx) for dy in self.rows.offsets for dx in self.columns.offsets for c in range(self.channels)]

    @property
    def is_plain(self) -> bool:
        """One pixel per tile, none outside the image."""
        return all((axis.step, axis.first, axis.size) == (1, 0, 1) for axis in (self.rows, self.columns))

    def cycles(self, block: int, output_blocks: int) -> int:
        """What it costs per image."""
        blocks = ceil_div(self.channels * self.rows.size * self.columns.size, block)
        micro_operations = blocks * self.rows.positions * self.columns.positions * output_blocks
        return micro_operations + CYCLES_PER_TILE * blocks * self.rows.tiles * self.columns.tiles


def sources_of(
    context: Context, name: str, variable: str, groups: int, windows: Windows, result: Rectangle
) -> list[tuple[Value, int]]:
    """The parts of `variable` that layer `name` sums over, each with the number of doublings that follow it.

    Raises
    ------
    Unmapped
        No tile layout, or integers too wide even for two parts.
    """
    if variable not in context.host_made or variable not in context.ranges:
        return [(context.value(variable), 0)]
    image = context.image(variable)
    packing = _best(image, groups, windows, result, context.block)
    if context.fits(variable):
        return [(context.value(variable) if packing.is_plain else _packed(context, name, variable, packing), 0)]
    unit = 1 << context.config.inp_bits
    low, high = context.ranges[variable]
    if low < -(unit * unit // 2) or high >= (unit // 2) * unit - unit // 2:
        raise Unmapped(f"its input holds {low}..{high}, too much for two parts of {context.config.inp_bits} bits")
    return _split(context, name, variable, packing)


def _best(image: Image, groups: int, windows: Windows, result: Rectangle, block: int) -> _Packing:
    """The packing of fewest cycles; grouped and transposed layers read plain tiles."""
    may_pack = groups == 1 and not windows[0].is_transposed and image[1] < block
    candidates = []
    for axis, window in enumerate(windows):
        pixels = image[2 + axis]
        plain = _Axis(1, 0, 1, pixels, 0)
        sizes = range(window.stride, window.kernel + 1) if may_pack and window.dilation == 1 else ()
        packed = [_window_axis(window, result.tiles[axis], size) for size in sizes]
        candidates.append([_counted(choice, window, pixels, result, axis) for choice in (plain, *packed)])
    choices = [_Packing(y, x, image[1]) for y in candidates[0] for x in candidates[1]]
    output_blocks = result.form.lanes // block
    return min(choices, key=lambda packing: packing.cycles(block, output_blocks))


def _window_axis(window: Window, outputs: int, size: int) -> _Axis:
    """Tile t holds `size` pixels from `t * stride - padding` on; enough tiles for the last kernel position."""
    tiles = outputs + ceil_div(window.kernel - size, window.stride)
    return _Axis(window.stride, -window.padding, size, tiles, 0)


def _counted(axis: _Axis, window: Window, pixels: int, result: Rectangle, index: int) -> _Axis:
    """With the number of positions that all taps visit along the axis."""
    source = Side(pixels, axis.tiles, axis.step, axis.offsets, is_zero_outside=True)
    target = Side(result.image[2 + index], result.tiles[index], result.form.steps[index], result.form.offsets[index])
    taps = axis_taps(window, source, target)
    positions = 1 << 40 if taps is None else sum(tap.dst.count for tap in taps)
    return _Axis(axis.step, axis.first, axis.size, axis.tiles, positions)


def _packed(context: Context, name: str, variable: str, packing: _Packing) -> Value:
    layout = _layout(context, variable, packing, [*packing.lanes], ("whole",))
    return _parts(context, name, variable, packing, layout, 1)[0]


def _split(context: Context, name: str, variable: str, packing: _Packing) -> list[tuple[Value, int]]:
    """High parts in the first blocks, low parts in the blocks behind them."""
    layout = _layout(context, variable, packing, [*packing.lanes], ("high", "low"))
    high, low = _parts(context, name, variable, packing, layout, 2)
    return [(high, layout.low_bits), (low, 0)]


def _layout(
    context: Context, variable: str, packing: _Packing, lanes: list[tuple[int, int, int]], parts: tuple[Part, ...]
) -> GatherLayout:
    block, config = context.block, context.config
    empty = [None] * (ceil_div(len(lanes), block) * block - len(lanes))
    filled: list[Lane | None] = []
    for part in parts:
        filled += [Lane(*lane, part) for lane in lanes]
        filled += empty
    return GatherLayout(
        context.shapes[variable],
        config.batch,
        block,
        tuple(filled),
        packing.rows.tiles,
        packing.columns.tiles,
        (packing.rows.step, packing.columns.step),
        config.inp_bits,
        config.inp_bits if len(parts) > 1 else 0,
    )


def _parts(
    context: Context, name: str, variable: str, packing: _Packing, layout: GatherLayout, count: int
) -> list[Value]:
    """The packed tensor, one value per part."""
    region = context.unused_name(f"{variable}.{name}")
    context.tensors[region] = SymbolicTensor(variable, layout)
    form = Form.gathered(packing.lanes, layout.strides, context.block)
    blocks = layout.blocks // count
    whole = Plane.dense(region, 0, layout.batches, layout.blocks, layout.height, layout.width)
    planes = [
        Plane(
            region,
            p * blocks * whole.block_stride,
            whole.batches,
            blocks,
            whole.height,
            whole.width,
            whole.batch_stride,
            whole.block_stride,
            whole.row_stride,
        )
        for p in range(count)
    ]
    return [Value(variable, context.image(variable), plane, form, *context.ranges[variable]) for plane in planes]
