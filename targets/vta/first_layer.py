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

from dataclasses import dataclass, replace

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

    def moved(self, pixels: int) -> _Packing:
        """For results that begin to sum this many pixels further right."""
        return (
            self
            if self.columns.step == 1
            else replace(self, columns=replace(self.columns, first=self.columns.first + pixels))
        )

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
    context: Context, name: str, variable: str, groups: int, windows: Windows, results: tuple[Rectangle, ...]
) -> list[tuple[list[Value], int]]:
    """The parts of `variable` that layer `name` sums over: a value per rectangle of its accumulators (they are alike
    but for the pixels they begin with), and the number of doublings that follow each part.

    Raises
    ------
    Unmapped
        No tile layout, or integers too wide even for two parts.
    """
    if variable not in context.host_made or variable not in context.ranges:
        return [([context.value(variable)] * len(results), 0)]
    packing = _best(context.image(variable), groups, windows, results[0], context.block)
    packings = [packing.moved(windows[1].stride * (_first(result) - _first(results[0]))) for result in results]
    if context.fits(variable):
        if packing.is_plain:
            return [([context.value(variable)] * len(results), 0)]
        return [(_packed(context, name, variable, packings, ("whole",)), 0)]
    unit = 1 << context.config.inp_bits
    low, high = context.ranges[variable]
    if low < -(unit * unit // 2) or high >= (unit // 2) * unit - unit // 2:
        raise Unmapped(f"its input holds {low}..{high}, too much for two parts of {context.config.inp_bits} bits")
    values = _packed(context, name, variable, packings, ("high", "low"))
    return [(values[: len(results)], context.config.inp_bits), (values[len(results) :], 0)]


def _best(image: Image, groups: int, windows: Windows, result: Rectangle, block: int) -> _Packing:
    """The packing of fewest cycles; grouped and transposed layers read plain tiles."""
    may_pack = groups == 1 and not windows[0].is_transposed and image[1] < block
    candidates = []
    for axis, window in enumerate(windows):
        pixels = image[2 + axis]
        choices = [_Axis(1, 0, 1, pixels, 0)]
        if may_pack and window.dilation == 1:
            choices += _window_axes(window, result, axis)
        candidates.append([_counted(choice, window, pixels, result, axis) for choice in choices])
    packings = [_Packing(y, x, image[1]) for y in candidates[0] for x in candidates[1]]
    output_blocks = result.form.lanes // block
    return min(packings, key=lambda packing: packing.cycles(block, output_blocks))


def _window_axes(window: Window, result: Rectangle, index: int) -> list[_Axis]:
    """Tile t holds `size` pixels from those that result tile t begins with; enough tiles for the last position."""
    offsets, tiles = result.form.offsets[index], result.tiles[index]
    step = window.stride * result.form.steps[index]
    extent = window.kernel + window.stride * (offsets[-1] - offsets[0])
    first = window.stride * offsets[0] - window.padding
    return [_Axis(step, first, size, tiles + ceil_div(extent - size, step), 0) for size in range(step, extent + 1)]


def _counted(axis: _Axis, window: Window, pixels: int, result: Rectangle, index: int) -> _Axis:
    """With the number of positions that all taps visit along the axis."""
    source = Side(pixels, axis.tiles, axis.step, axis.offsets, is_zero_outside=True)
    target = Side(result.image[2 + index], result.tiles[index], result.form.steps[index], result.form.offsets[index])
    taps = axis_taps(window, source, target)
    positions = 1 << 40 if taps is None else sum(tap.dst.count for tap in taps)
    return _Axis(axis.step, axis.first, axis.size, axis.tiles, positions)


def _packed(
    context: Context, name: str, variable: str, packings: list[_Packing], parts: tuple[Part, ...]
) -> list[Value]:
    """One packed tensor; blocks of each part, within them of each rectangle, are a value of their own."""
    config, block = context.config, context.block
    distinct, packing = list(dict.fromkeys(packings)), packings[0]
    blocks = ceil_div(len(packing.lanes), block)
    filled: list[Lane | None] = []
    for part in parts:
        for moved in distinct:
            filled += [Lane(*lane, part) for lane in moved.lanes]
            filled += [None] * (-len(filled) % block)
    steps = (packing.rows.step, packing.columns.step)
    low_bits = config.inp_bits if len(parts) > 1 else 0
    layout = GatherLayout(
        context.shapes[variable],
        config.batch,
        block,
        tuple(filled),
        packing.rows.tiles,
        packing.columns.tiles,
        steps,
        config.inp_bits,
        low_bits,
    )
    region = context.unused_name(f"{variable}.{name}")
    context.tensors[region] = SymbolicTensor(variable, layout)
    whole = Plane.dense(region, 0, layout.batches, layout.blocks, layout.height, layout.width)
    image, (low, high) = context.image(variable), context.ranges[variable]
    values = []
    for part_index in range(len(parts)):
        for moved in packings:
            index = part_index * len(distinct) + distinct.index(moved)
            plane = replace(whole, base=index * blocks * whole.block_stride, blocks=blocks)
            values.append(Value(variable, image, plane, Form.gathered(moved.lanes, steps, block), low, high))
    return values


def _first(result: Rectangle) -> int:
    """Offset along x of the first pixel of a tile of the result."""
    return result.form.offsets[1][0]
