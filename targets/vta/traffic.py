"""How many tiles a schedule makes the load unit bring: every operand once, and again what the buffers forgot.

A visit is one output tile, a sweep one run over all tiles that read the same operand. What a buffer of D tiles holds
at the end of a sweep or a visit is all that the next one can save, however clever the emitter is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.vta.ops import Gemm, Pool, Span, TileOp
from lpsn_tvm.schedules.vta.placement import is_constant
from lpsn_tvm.schedules.vta.schedule import Schedule

Counts = npt.NDArray[np.int64]
Tile = tuple[int, int]


@dataclass(frozen=True)
class Buffer:
    """Slots of an operand.

    Parameters
    ----------
    slots, size : int
        Number, and tiles of each.
    is_certain : bool
        True: what can be kept at most. False: what is likely kept: contents that are asked for in turn and do not all
        fit lose one slot to the content that is being loaded.
    """

    slots: int
    size: int
    is_certain: bool

    def kept(self, needed: int) -> int:
        """Tiles that survive until the same `needed` tiles are asked for again."""
        room = self.slots * self.size
        return room if self.is_certain or room >= needed else room - self.size

    def swept(self, sweeps: Counts) -> int:
        """Tiles loaded for consecutive sweeps over the same operand, given how many each needs."""
        most = int(sweeps.max())
        return max(int(sweeps.sum()) - (len(sweeps) - 1) * self.kept(most), most)


def cut(extent: int, size: int) -> tuple[Tile, ...]:
    """`[0, extent)` in ranges of `size`, the last one smaller: `cut(5, 2) == ((0, 2), (2, 4), (4, 5))`."""
    return tuple((start, min(start + size, extent)) for start in range(0, extent, size))


def pools_of(op: TileOp) -> tuple[Pool, ...]:
    """The pooling steps of an operator, in order."""
    return tuple(step for step in op.steps if isinstance(step, Pool))


def window(tile: Tile, axis: int, op: TileOp) -> Tile:
    """Accumulator rows (axis 0) or columns (axis 1), first and one past last, that output positions `tile` need."""
    pools = pools_of(op)
    extents = [(op.height, op.width), *((pool.height, pool.width) for pool in pools)]
    for pool, extent in reversed(list(zip(pools, extents, strict=False))):
        kernel, stride, pad = pool.kernel[axis], pool.strides[axis], pool.padding[axis]
        tile = max(tile[0] * stride - pad, 0), min((tile[1] - 1) * stride - pad + kernel, extent[axis])
    return tile


@lru_cache(maxsize=256)
def gemm_floor(op: TileOp) -> int:
    """GEMM micro-operations at least: what no pooling window reads need not be computed."""
    if not pools_of(op):
        return op.micro_operations
    needed = [{i for o in range(out_extent(op, axis)) for i in range(*window((o, o + 1), axis, op))} for axis in (0, 1)]
    total = 0
    for step in op.steps:
        if isinstance(step, Gemm):
            for tap in step.taps:
                rows, columns = (
                    sum(span.start + i * span.step in wanted for i in range(span.count))
                    for span, wanted in zip((tap.dst_y, tap.dst_x), needed, strict=True)
                )
                total += rows * columns * step.fan_in * step.passes
    return total * op.batches * op.blocks


def used(spans: tuple[tuple[Span, Span], ...], tile: Tile) -> int:
    """How many source positions the (dst, src) spans read for the accumulators `tile`."""
    found: set[int] = set()
    for dst, src in spans:
        low = max(0, -(-(tile[0] - dst.start) // dst.step))
        high = min(dst.count, -(-(tile[1] - dst.start) // dst.step))
        found.update(src.start + i * src.step for i in range(low, high))
    return len(found)


@lru_cache(maxsize=4096)
def source_extents(step: Gemm, op: TileOp, axis: int, size: int) -> Counts:
    """Source rows (axis 0) or columns (axis 1) that each tile of `size` output positions reads."""
    taps = (((t.dst_y, t.src_y), (t.dst_x, t.src_x))[axis] for t in step.taps)
    spans = tuple(dict.fromkeys(taps))
    return np.array([used(spans, window(tile, axis, op)) for tile in cut(out_extent(op, axis), size)], np.int64)


def out_extent(op: TileOp, axis: int) -> int:
    """Rows or columns of the rectangle after all pooling."""
    pools = pools_of(op)
    return (pools[-1].height, pools[-1].width)[axis] if pools else (op.height, op.width)[axis]


def _pairs(tiles: tuple[Tile, ...], paired: bool) -> list[tuple[Tile, ...]]:
    """Tiles that alternate between two accumulator slots may share what they read, as one bigger tile would."""
    step = 2 if paired else 1
    return [tiles[i : i + step] for i in range(0, len(tiles), step)]


def _input_blocks(step: Gemm, tiles: tuple[Tile, ...]) -> int:
    """Distinct input blocks that these output blocks read."""
    found = {step.first_input[o] for low, high in tiles for o in range(low, high)}
    return len({first + k for first in found for k in range(step.fan_in)})


def alternates(schedule: Schedule) -> bool:
    """Whether pairs of tiles across the inner loop's axis follow each other."""
    return schedule.threads == 2 and (schedule.order == "oc") == (schedule.thread_axis == "oc")


def spatial_tiles(op: TileOp, schedule: Schedule) -> int:
    """Tiles of one output block."""
    rows, columns = -(-out_extent(op, 0) // schedule.tile_h), -(-out_extent(op, 1) // schedule.tile_w)
    return rows * columns * -(-op.batches // schedule.tile_b)


def input_tiles(step: Gemm, op: TileOp, schedule: Schedule, buffer: Buffer) -> int:
    """INP tiles loaded."""
    if is_constant(step):
        return 1
    rows = source_extents(step, op, 0, schedule.tile_h)
    columns = source_extents(step, op, 1, schedule.tile_w)
    batches = np.array([high - low for low, high in cut(op.batches, schedule.tile_b)], np.int64)
    areas = np.multiply.outer(np.multiply.outer(batches, rows), columns).reshape(-1)
    oc_tiles = cut(op.blocks, schedule.tile_co)
    blocks = np.array([_input_blocks(step, (tile,)) for tile in oc_tiles], np.int64)
    if schedule.order == "spatial":
        pairs = np.arange(0, len(areas), 2) if alternates(schedule) else np.arange(len(areas))
        return sum(buffer.swept(area * blocks) for area in np.add.reduceat(areas, pairs))
    groups = _pairs(oc_tiles, alternates(schedule))
    sweeps = buffer.swept(int(areas.sum()) * np.array([_input_blocks(step, group) for group in groups], np.int64))
    if not alternates(schedule):
        return sweeps
    visits = np.multiply.outer(areas, blocks)
    return max(sweeps, int(np.maximum(visits - buffer.kept(int(visits.max())), 0).sum()))


def weight_tiles(step: Gemm, op: TileOp, schedule: Schedule, buffer: Buffer) -> int:
    """WGT tiles loaded."""
    taps = len({tap.weight for tap in step.taps}) * (step.fan_in if step.input_stride else 1)
    if not step.output_stride or is_constant(step):
        return taps * (op.blocks if step.output_stride else 1)
    spatial, oc_tiles = spatial_tiles(op, schedule), cut(op.blocks, schedule.tile_co)
    if schedule.order == "oc":
        groups = [sum(high - low for low, high in g) * taps for g in _pairs(oc_tiles, alternates(schedule))]
        return sum(buffer.swept(np.full(spatial, group)) for group in groups)
    sweeps = -(-spatial // 2) if alternates(schedule) else spatial
    by_sweep = buffer.swept(np.full(sweeps, op.blocks * taps))
    if not alternates(schedule):
        return by_sweep
    visits = [(high - low) * taps for low, high in oc_tiles]
    return max(by_sweep, spatial * sum(max(visit - buffer.kept(visit), 0) for visit in visits))
