"""The SRAM of one operator under one schedule: accumulator slots, vectors, input and weight slots, or why not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.nest import MIN_DISTANCE
from lpsn_tvm.schedules.vta.ops import Gemm, Pool, TileOp, Vector
from lpsn_tvm.schedules.vta.reduction import chunk_blocks, tap_range
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.schedules.vta.tiling import Range, axis_tiles, block_runs, clip_span, extents, spans_cover

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

# Vectors of all blocks stay in the accumulator buffer if they take no more than this part of it.
VECTOR_SHARE = 8
# The same for weights of constant steps.
CONSTANT_SHARE = 16
FEW_POSITIONS = 8


@dataclass(frozen=True)
class Placement:
    """Sizes in tiles.

    Parameters
    ----------
    acc_slot : int
        Accumulators of one output tile, all levels.
    levels : tuple of int
        Offset of each level's rectangle inside the slot.
    inp_slot, inp_slots, wgt_slot, wgt_slots : int
    shared_slot, shared_slots : int
        Weights that all blocks share (identities); they stay.
    vector_slot, vector_slots : int
    constant_inp_slot, constant_inp_slots, constant_wgt_slot, constant_wgt_slots : int
        Of steps whose source is the same everywhere (a bias): small contents, which stay where they can.
    """

    acc_slot: int
    levels: tuple[int, ...]
    inp_slot: int
    inp_slots: int
    wgt_slot: int
    wgt_slots: int
    shared_slot: int
    shared_slots: int
    vector_slot: int
    vector_slots: int
    constant_inp_slot: int
    constant_inp_slots: int
    constant_wgt_slot: int
    constant_wgt_slots: int

    @property
    def inp_tiles(self) -> int:
        """Tiles of INP in use."""
        return self.inp_slot * self.inp_slots + self.constant_inp_slot * self.constant_inp_slots

    @property
    def wgt_tiles(self) -> int:
        """Tiles of WGT in use, without what all blocks share."""
        return self.wgt_slot * self.wgt_slots + self.constant_wgt_slot * self.constant_wgt_slots


@lru_cache(maxsize=512)
def gemm_levels(op: TileOp) -> tuple[tuple[Gemm, int], ...]:
    """The GEMM steps with the level (number of pools before) that they add to."""
    level, found = 0, []
    for step in op.steps:
        if isinstance(step, Pool):
            level += 1
        elif isinstance(step, Gemm):
            found.append((step, level))
    return tuple(found)


def is_shared(step: Gemm) -> bool:
    """Whether all blocks use the same weight tiles."""
    return step.output_stride == 0 and step.input_stride == 0


def is_constant(step: Gemm) -> bool:
    """Whether every tap reads one source tile for all accumulators: constants times weights."""
    is_one_block = step.fan_in == step.source.blocks == 1 and bool(step.taps)
    return is_one_block and all(tap.src_y.step == tap.src_x.step == 0 for tap in step.taps)


def is_dense(op: TileOp) -> bool:
    """Whether weights take longer to load than to use: few positions."""
    return op.batches * op.height * op.width <= FEW_POSITIONS


@lru_cache(maxsize=4096)
def reach(op: TileOp, index: int, axis: int, size: int) -> int:
    """Most source rows (axis 0) or columns (axis 1) that the taps of GEMM step `index` read for one tile."""
    step, level = gemm_levels(op)[index]
    spans = {(tap.dst_y, tap.src_y) if axis == 0 else (tap.dst_x, tap.src_x) for tap in step.taps}
    most = 0
    for ranges in axis_tiles(op, axis, size):
        clipped = [c[1] for c in (clip_span(dst, src, ranges[level]) for dst, src in spans) if c is not None]
        if clipped:
            _, stride, count = spans_cover(clipped)
            most = max(most, count if axis == 0 else (count - 1) * stride + 1)
    return most


@lru_cache(maxsize=4096)
def longest(op: TileOp, axis: int, size: int) -> tuple[int, ...]:
    """Most accumulator rows or columns of a tile, per level."""
    return tuple(max(ranges[level].count for ranges in axis_tiles(op, axis, size)) for level in range(_count(op)))


def _count(op: TileOp) -> int:
    return 1 + sum(isinstance(step, Pool) for step in op.steps)


def placement(op: TileOp, schedule: Schedule, config: VtaConfig) -> Placement:
    """Where everything goes.

    Raises
    ------
    CompileError
        Something does not fit; names the operator, the tiles needed and the tiles available.
    """
    rows, columns = longest(op, 0, schedule.tile_h), longest(op, 1, schedule.tile_w)
    blocks, batches = min(schedule.tile_co, op.blocks), min(schedule.tile_b, op.batches)
    levels, acc_slot = [], 0
    for height, width in zip(rows, columns, strict=True):
        levels.append(acc_slot)
        # A rectangle of one or two tiles is summed in three or four partial sums.
        acc_slot += max(batches * blocks * height * width, MIN_DISTANCE + 1)
    vectors = sum(isinstance(step, Vector) for step in op.steps)
    vector_slots = vectors * -(-op.blocks // blocks)
    if vector_slots * blocks > config.acc_depth // VECTOR_SHARE:
        vector_slots = vectors
    _check(op, "ACC", acc_slot * schedule.threads + vector_slots * blocks, config.acc_depth)
    inp_slot, wgt_slot, shared_slot, shared = _contents(op, schedule, batches, blocks)
    constant = _constants(op, schedule, config, batches, blocks)
    inp_depth = config.inp_depth - constant[0] * constant[1]
    wgt_depth = config.wgt_depth - constant[2] * constant[3] - shared * shared_slot
    _check(op, "INP", inp_slot, inp_depth)
    _check(op, "WGT", max(wgt_slot, 1), wgt_depth)
    return Placement(
        acc_slot,
        tuple(levels),
        inp_slot,
        _limit(inp_depth // inp_slot, schedule.inp_slots, _useful_slots(op, schedule, "spatial")),
        wgt_slot,
        _limit(wgt_depth // max(wgt_slot, 1), schedule.wgt_slots, _useful_slots(op, schedule, "oc")),
        shared_slot,
        shared,
        blocks,
        vector_slots,
        *constant,
    )


def _constants(
    op: TileOp, schedule: Schedule, config: VtaConfig, batches: int, blocks: int
) -> tuple[int, int, int, int]:
    """Size and number of slots for inputs and weights of constant steps; weights of all blocks if that is little."""
    found = [(index, step) for index, (step, _) in enumerate(gemm_levels(op)) if is_constant(step)]
    if not found:
        return 0, 0, 0, 0
    inp = batches * max(
        reach(op, index, 0, schedule.tile_h) * reach(op, index, 1, schedule.tile_w) for index, _ in found
    )
    wgt = blocks * max(tap_range(step.taps).count for _, step in found)
    slots = len(found) * -(-op.blocks // blocks)
    return inp, len(found), wgt, slots if slots * wgt <= config.wgt_depth // CONSTANT_SHARE else len(found)


def _limit(slots: int, limit: int, useful: tuple[int, ...]) -> int:
    """At most `limit` of the slots that fit; without a limit the largest useful number."""
    if limit:
        return min(slots, limit)
    return next((count for count in useful if count <= slots), slots)


def _useful_slots(op: TileOp, schedule: Schedule, axis: Literal["oc", "spatial"]) -> tuple[int, ...]:
    """Numbers of slots worth having, best first, for contents that belong to a tile's position along `axis`.

    Contents that nobody asks for again are a stream: two slots. Where tiles that follow each other share contents,
    those of one tile (of two, if they alternate). Where contents come back only after all others, all or none. More
    slots mean more micro-op sequences, not fewer transfers.
    """
    height, width = extents(op)[-1]
    spatial = -(-op.batches // schedule.tile_b) * -(-height // schedule.tile_h) * -(-width // schedule.tile_w)
    blocks = -(-op.blocks // schedule.tile_co)
    steps = [step for step, _ in gemm_levels(op) if not is_constant(step)]
    per_tile = sum(_chunks_per_tile(step, schedule, op.blocks) for step in steps)
    tiles, others = (blocks, spatial) if axis == "oc" else (spatial, blocks)
    alternates = schedule.threads == 2 and (schedule.order == "oc") == (schedule.thread_axis == "oc")
    if others == 1:
        # Weights of a dense layer come ahead of its inputs.
        return (tiles * per_tile,) if axis == "oc" and is_dense(op) else (2,)
    if schedule.order == axis:
        return (2 * per_tile, 2) if alternates else (per_tile, 2)
    return (tiles * per_tile, per_tile, 2) if alternates else (tiles * per_tile, 2)


def _chunks_per_tile(step: Gemm, schedule: Schedule, blocks: int) -> int:
    outputs, inputs = chunk_blocks(step, schedule)
    return -(-step.fan_in // inputs) * -(-min(schedule.tile_co, blocks) // outputs)


def _contents(op: TileOp, schedule: Schedule, batches: int, blocks: int) -> tuple[int, int, int, int]:
    """Largest input content, weight content, shared weight content; number of the latter."""
    inp_slot = wgt_slot = shared_slot = 0
    shared = set()
    for index, (step, _) in enumerate(gemm_levels(op)):
        area = reach(op, index, 0, schedule.tile_h) * reach(op, index, 1, schedule.tile_w)
        if not area or is_constant(step):
            continue
        taps = tap_range(step.taps).count
        advance = max(advance for _, advance in block_runs(step, Range(0, op.blocks)))
        outputs, inputs = chunk_blocks(step, schedule)
        outputs = min(outputs, blocks)
        inp_slot = max(inp_slot, batches * ((outputs - 1) * advance + inputs) * area)
        if not is_shared(step):
            size = (outputs if step.output_stride else 1) * (inputs if step.input_stride else 1) * taps
            wgt_slot = max(wgt_slot, size)
        else:
            shared_slot = max(shared_slot, taps)
            shared.add((step.weights, step.weight_base, tap_range(step.taps)))
    return max(inp_slot, 1), wgt_slot, shared_slot, len(shared)


def _check(op: TileOp, buffer: str, needed: int, available: int) -> None:
    if needed > available:
        raise CompileError(f"needs {needed} tiles of {buffer}; the accelerator has {available}", where=op.name)


def fits(op: TileOp, schedule: Schedule, config: VtaConfig) -> bool:
    """Whether the operator fits into SRAM under this schedule."""
    try:
        placement(op, schedule, config)
    except CompileError:
        return False
    return True
