"""The space of schedules: a first choice for an operator, and all candidates for search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Literal

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.nest import MIN_DISTANCE
from lpsn_tvm.schedules.vta.ops import Gemm, TileOp
from lpsn_tvm.schedules.vta.placement import (
    FEW_POSITIONS,
    Placement,
    fits,
    gemm_levels,
    is_constant,
    is_shared,
    longest,
    placement,
    reach,
)
from lpsn_tvm.schedules.vta.reduction import tap_range
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.schedules.vta.tiling import extents

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

# Rough costs for the first choice: cycles of an instruction, of a load of micro-ops beside them, of an accumulator in
# the elementwise steps; bytes per cycle of the memory port.
INSTRUCTION, LIST_LOAD, ELEMENTWISE, BUS_BYTES = 15, 200, 6, 4
ORDERS: tuple[Literal["oc", "spatial"], ...] = ("oc", "spatial")
INNERS: tuple[Literal["ci", "co", "x"], ...] = ("x", "co", "ci")


def sizes(length: int, most: int = 8) -> list[int]:
    """Tile sizes that cut `length` into few pieces of nearly equal size: length, length / 2, ..., powers of two."""
    found = {-(-length // pieces) for pieces in range(1, most + 1)}
    size = 1
    while size < length:
        found.add(size)
        size *= 2
    return sorted(found, reverse=True)


def chunk_extent(op: TileOp) -> int:
    """Most input blocks of a chunk; where the outputs of the largest step read different inputs, a chunk counts
    outputs.
    """
    steps = [step for step in op.steps if isinstance(step, Gemm)]
    largest = max(steps, key=lambda step: step.fan_in * sum(tap.dst_y.count * tap.dst_x.count for tap in step.taps))
    if len(set(largest.first_input)) > 1:
        return max(op.blocks, *(step.fan_in for step in steps))
    return max(step.fan_in for step in steps)


def _tiles(op: TileOp, config: VtaConfig, most: int) -> Iterator[Schedule]:
    """Tiles with accumulators that fit, large ones first; axes in 1, 2, ..., `most` or a power of two of pieces."""
    height, width = extents(op)[-1]
    for tile_w, tile_h, tile_co in product(sizes(width, most // 2), sizes(height, most), sizes(op.blocks, most)):
        rows, lines = longest(op, 0, tile_h), longest(op, 1, tile_w)
        area = sum(h * w for h, w in zip(rows, lines, strict=True))
        # Samples share the weights of a dense layer.
        for tile_b in {op.batches, 1} if height * width <= FEW_POSITIONS else {1}:
            if area * tile_co * tile_b <= config.acc_depth:
                for tile_ci in sizes(chunk_extent(op), most // 2):
                    yield Schedule(tile_b, tile_co, tile_h, tile_w, tile_ci)


def candidates(op: TileOp, config: VtaConfig) -> Iterator[Schedule]:
    """All schedules worth trying; every one fits."""
    for tile, threads, order in product(_tiles(op, config, 8), (2, 1), ORDERS):
        base = replace(tile, threads=threads, order=order)
        if fits(op, base, config):
            yield from (replace(base, inner=inner) for inner in INNERS)


def default_schedule(op: TileOp, config: VtaConfig) -> Schedule:
    """A schedule that fits, chosen by a rough estimate, without simulation.

    Raises
    ------
    CompileError
        None fits: not even one row of one block with one input block; names needed and available tiles.
    """
    # A tile much smaller than the buffer is only chosen where nothing else fits.
    enough = min(config.acc_depth // 8, op.batches * op.blocks * op.height * op.width // 4)
    for least in (enough, 0):
        found = [(_cost(op, schedule, config), schedule) for schedule in _first_choices(op, config, least)]
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    placement(op, Schedule(threads=1), config)
    raise CompileError("no schedule fits", where=op.name)


def _first_choices(op: TileOp, config: VtaConfig, least: int) -> Iterator[Schedule]:
    """Schedules that fit, with at least so many accumulators in a tile."""
    for tile, threads, order in product(_tiles(op, config, 4), (2, 1), ORDERS):
        if tile.tile_co * longest(op, 0, tile.tile_h)[0] * longest(op, 1, tile.tile_w)[0] >= least:
            inner: Literal["x", "co"] = "x" if tile.tile_co >= MIN_DISTANCE else "co"
            schedule = replace(tile, threads=threads, order=order, inner=inner)
            if fits(op, schedule, config):
                yield schedule


def _cost(op: TileOp, schedule: Schedule, config: VtaConfig) -> float:
    """Cycles, roughly: what computes and what moves at the same time, and what nothing can hide."""
    place = placement(op, schedule, config)
    height, width = extents(op)[-1]
    spatial = -(-op.batches // schedule.tile_b) * -(-height // schedule.tile_h) * -(-width // schedule.tile_w)
    blocks = -(-op.blocks // schedule.tile_co)
    rows, columns = longest(op, 0, schedule.tile_h)[0], longest(op, 1, schedule.tile_w)[0]
    accumulators = op.batches * op.blocks * op.height * op.width
    # Pooling windows overlap: their accumulators are computed by several tiles.
    again = max(1.0, schedule.tile_b * spatial * rows * columns / (op.batches * op.height * op.width))
    chunks = sum(-(-step.fan_in // schedule.tile_ci) for step, _ in gemm_levels(op))
    compute = again * (op.micro_operations + accumulators) + ELEMENTWISE * op.batches * op.blocks * height * width
    compute += spatial * blocks * (3 * chunks + 8) * INSTRUCTION
    compute += _lists(op, schedule, place, spatial * blocks * chunks, config)
    inp, wgt = _traffic(op, schedule, place, spatial, blocks)
    moved_inp = inp * config.inp_tile_bytes / BUS_BYTES
    moved_wgt = wgt * config.wgt_tile_bytes / BUS_BYTES
    out = op.batches * op.blocks * height * width * config.out_tile_bytes / BUS_BYTES
    # One slot is loaded while nobody reads it; one accumulator slot is stored while nobody adds to it.
    alone = (moved_inp if place.inp_slots == 1 else 0) + (moved_wgt if place.wgt_slots == 1 else 0)
    alone += out if schedule.threads == 1 else 0
    start = (place.inp_slot * config.inp_tile_bytes + place.wgt_slot * config.wgt_tile_bytes) / BUS_BYTES
    return max(compute, moved_inp + moved_wgt + out) + alone + start / max(1, min(schedule.tile_ci, 4))


def _lists(op: TileOp, schedule: Schedule, place: Placement, chunks: int, config: VtaConfig) -> float:
    """Cycles of loading micro-ops: every combination of slots has its own sequences."""
    step, _ = gemm_levels(op)[0]
    inputs, outputs = min(schedule.tile_ci, step.fan_in), min(schedule.tile_co, op.blocks)
    if schedule.inner == "x":
        length = len(step.taps) * inputs * outputs
    else:
        length = len(step.taps) * min(schedule.tile_w, op.width) * inputs
    different = min(chunks, max(place.inp_slots, place.wgt_slots) * schedule.threads)
    return length * different if length * different <= config.uop_depth else chunks * (length + LIST_LOAD)


def _traffic(op: TileOp, schedule: Schedule, place: Placement, spatial: int, blocks: int) -> tuple[float, float]:
    """Input and weight tiles that are loaded: once where they stay, else for every tile that needs them."""
    inp = wgt = 0.0
    for index, (step, _) in enumerate(gemm_levels(op)):
        if is_constant(step):
            continue
        area = reach(op, index, 0, schedule.tile_h) * reach(op, index, 1, schedule.tile_w)
        dense = len(set(step.first_input)) == 1
        chunks = -(-step.fan_in // schedule.tile_ci)
        stays = place.inp_slots >= chunks * (1 if schedule.order == "spatial" else spatial)
        inp += (
            schedule.tile_b
            * spatial
            * area
            * (step.fan_in * (1 if stays else blocks) if dense else op.blocks * step.fan_in)
        )
        stays = place.wgt_slots >= chunks * (1 if schedule.order == "oc" else blocks)
        if not is_shared(step):
            wgt += op.blocks * step.fan_in * tap_range(step.taps).count * (1 if stays else spatial)
    return inp, wgt
