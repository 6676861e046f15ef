"""What a schedule costs before it is emitted: a lower bound on its cycles that pruning may rely on, and an estimate
that ranks.

The bound is the largest of what each resource must do at least, whatever the order of instructions:

* compute unit: micro-operations of GEMM, of the ALU steps, the overhead of the fewest instructions, after the first
  chunk of input and weights has arrived and before the last rows are stored;
* memory port: every operand once, and again as often as the order of tiles makes the buffers forget it. A buffer of D
  tiles saves at most D tiles per sweep over the same data, however clever the emitter is;
* store unit: words of the result and the handshake of every burst.

The estimate adds what is likely but not certain: resets, micro-operation lists, more instructions, stalls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.vta.nest import MIN_DISTANCE
from lpsn_tvm.schedules.vta.ops import Gemm, Pool, Scalar, Span, Store, TileOp, Vector
from lpsn_tvm.schedules.vta.placement import placement

if TYPE_CHECKING:
    from lpsn_tvm.schedules.vta.schedule import Schedule
    from lpsn_tvm.targets.vta.config import VtaConfig
    from lpsn_tvm.targets.vta.cycle_model import CycleModel

Counts = npt.NDArray[np.int64]
Tile = tuple[int, int]


@dataclass(frozen=True)
class Rates:
    """What a cycle model charges, as far as bounds need it.

    Parameters
    ----------
    bus_bytes : float
        Bytes per cycle of the memory port.
    alu_immediate, alu_tensor : int
        Cycles per micro-operation of the ALU.
    overhead : int
        Cycles of an instruction of the compute unit beside its micro-operations, at least.
    burst : int
        Cycles of a store burst beside its words, at least.
    latency : int
        Cycles from the request of a read to its first word.
    """

    bus_bytes: float
    alu_immediate: int
    alu_tensor: int
    overhead: int
    burst: int
    latency: int


def rates_of(model: CycleModel, config: VtaConfig) -> Rates:
    """The rates of a cycle model on a configuration's bus."""
    return Rates(
        bus_bytes=(1 << config.log_bus_width) / 8 / model.word_cycles,
        alu_immediate=model.alu_immediate,
        alu_tensor=model.alu_tensor,
        overhead=model.compute_overhead,
        burst=model.store_command + model.store_response,
        latency=model.read_latency,
    )


@dataclass(frozen=True)
class Work:
    """What a schedule makes the units do; all of it at least, `resets`, `lists` and `instructions` about.

    Parameters
    ----------
    gemm, immediate, tensor : int
        Micro-operations by kind.
    inp, wgt, out : int
        Tiles that cross the memory port.
    bursts : int
        Rows of all stores.
    first_inp, first_wgt : int
        Tiles that must have arrived before the first GEMM.
    last_out : int
        Tiles of the last store.
    tiles, resets, list_loads, lists, instructions : int
        Output tiles, reset micro-operations, loads of micro-operations, how many they bring, GEMM and ALU instructions.
    """

    gemm: int
    immediate: int
    tensor: int
    inp: int
    wgt: int
    out: int
    bursts: int
    first_inp: int
    first_wgt: int
    last_out: int
    tiles: int
    resets: int
    list_loads: int
    lists: int
    instructions: int


def cut(extent: int, size: int) -> tuple[Tile, ...]:
    """`[0, extent)` in ranges of `size`, the last one smaller: `cut(5, 2) == ((0, 2), (2, 4), (4, 5))`."""
    return tuple((start, min(start + size, extent)) for start in range(0, extent, size))


def pool_of(op: TileOp) -> Pool | None:
    """The pooling step of an operator, if it has one."""
    return next((step for step in op.steps if isinstance(step, Pool)), None)


def window(tile: Tile, axis: int, op: TileOp) -> Tile:
    """Accumulator rows (axis 0) or columns (axis 1) that the output positions `tile` need."""
    pool = pool_of(op)
    if pool is None:
        return tile
    extent = (op.height, op.width)[axis]
    kernel, stride, pad = pool.kernel[axis], pool.strides[axis], pool.padding[axis]
    return max(tile[0] * stride - pad, 0), min((tile[1] - 1) * stride - pad + kernel, extent)


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
    """Rows or columns that the operator stores."""
    pool = pool_of(op)
    extents = (op.height, op.width) if pool is None else (pool.height, pool.width)
    return extents[axis]


@lru_cache(maxsize=512)
def alu_work(op: TileOp, config: VtaConfig) -> tuple[int, int, int]:
    """(immediate, tensor) micro-operations and instructions per output tile that the steps need at least.

    A bias may become part of the reduction and an addition of an immediate part of a bias: they count nothing.
    """
    before, after = op.height * op.width, out_extent(op, 0) * out_extent(op, 1)
    positions, immediate, tensor, instructions = before, 0, 0, 0
    for step in op.steps:
        if isinstance(step, Scalar) and step.kind in ("min", "max", "shr"):
            immediate, instructions = immediate + positions, instructions + 1
        elif isinstance(step, Vector) and step.kind == "shr":
            tensor, instructions = tensor + positions, instructions + 1
        elif isinstance(step, Pool):
            positions = after
    blocks = op.batches * op.blocks
    return immediate * blocks, tensor * blocks, instructions


def work_of(op: TileOp, schedule: Schedule, config: VtaConfig) -> Work:
    """Count what `schedule` makes the units do."""
    oc_tiles = cut(op.blocks, schedule.tile_co)
    rows, columns = cut(out_extent(op, 0), schedule.tile_h), cut(out_extent(op, 1), schedule.tile_w)
    spatial = len(rows) * len(columns) * -(-op.batches // schedule.tile_b)
    gemms = [step for step in op.steps if isinstance(step, Gemm)]
    place = placement(op, schedule, config)
    immediate, tensor, alu_instructions = alu_work(op, config)
    stores = sum(isinstance(step, Store) for step in op.steps)
    tiles = spatial * len(oc_tiles)
    if len(columns) > 1:
        bursts = op.batches * op.blocks * out_extent(op, 0) * len(columns)
    else:  # whole rows follow each other in DRAM, and where a tile is a whole plane, so do the planes
        bursts = op.batches * op.blocks * len(rows) if len(rows) > 1 else tiles
    first = gemms[0]
    first_rows, first_columns = (
        int(source_extents(first, op, axis, size)[0]) for axis, size in ((0, schedule.tile_h), (1, schedule.tile_w))
    )
    chunk = min(schedule.tile_ci, first.fan_in)
    lists = [_lists(step, op, schedule, config, tiles) for step in gemms]
    return Work(
        gemm=op.micro_operations,
        immediate=immediate,
        tensor=tensor,
        inp=sum(_input_tiles(step, op, schedule, place.inp_slots * place.inp_slot) for step in gemms),
        wgt=sum(_weight_tiles(step, op, schedule, place.wgt_slots * place.wgt_slot, spatial) for step in gemms),
        out=stores * op.batches * op.blocks * out_extent(op, 0) * out_extent(op, 1),
        bursts=stores * bursts,
        first_inp=chunk * first_rows * first_columns,
        first_wgt=chunk * len(first.taps),
        last_out=(oc_tiles[-1][1] - oc_tiles[-1][0]) * (rows[-1][1] - rows[-1][0]) * (columns[-1][1] - columns[-1][0]),
        tiles=tiles,
        resets=op.batches * op.blocks * op.height * op.width,
        list_loads=sum(loads for _, loads, _ in lists),
        lists=sum(length for _, _, length in lists),
        instructions=tiles * alu_instructions + sum(count for count, _, _ in lists),
    )


def lower_bound(work: Work, rates: Rates, config: VtaConfig) -> int:
    """Cycles that no program of this schedule can undercut."""
    chunk = _cycles(work.first_inp * config.inp_tile_bytes + work.first_wgt * config.wgt_tile_bytes, rates)
    last = _cycles(work.last_out * config.out_tile_bytes, rates)
    compute = work.gemm + work.immediate * rates.alu_immediate + work.tensor * rates.alu_tensor
    store = _cycles(work.out * config.out_tile_bytes, rates) + work.bursts * rates.burst
    return max(chunk + compute + work.tiles * rates.overhead + last, _port(work, rates, config), store)


def estimate(work: Work, rates: Rates, config: VtaConfig) -> float:
    """Cycles that are likely: what ranks schedules before they are simulated."""
    compute = work.gemm + work.immediate * rates.alu_immediate + work.tensor * rates.alu_tensor + work.resets
    compute += (work.instructions + work.tiles) * (rates.overhead + 2)
    lists = _cycles(work.lists * config.uop_tile_bytes, rates) + work.list_loads * (rates.latency + 6)
    chunk = _cycles(work.first_inp * config.inp_tile_bytes + work.first_wgt * config.wgt_tile_bytes, rates)
    last = _cycles(work.last_out * config.out_tile_bytes, rates) + (work.immediate + work.tensor) / work.tiles
    port = _port(work, rates, config) + _cycles(work.lists * config.uop_tile_bytes, rates)
    # A port or an array that is busy all the time still meets the other's gaps now and then.
    busy, other = max(compute + lists, port), min(compute + lists, port)
    return chunk + busy + 0.02 * other + last + 4 * rates.latency


def _cycles(size: int, rates: Rates) -> int:
    return int(size / rates.bus_bytes)


def _port(work: Work, rates: Rates, config: VtaConfig) -> int:
    size = work.inp * config.inp_tile_bytes + work.wgt * config.wgt_tile_bytes + work.out * config.out_tile_bytes
    return _cycles(size, rates)


def _pairs(tiles: tuple[Tile, ...], paired: bool) -> list[tuple[Tile, ...]]:
    """Tiles that alternate between two accumulator slots share what they read, as one bigger tile would."""
    step = 2 if paired else 1
    return [tiles[i : i + step] for i in range(0, len(tiles), step)]


def _input_blocks(step: Gemm, tiles: tuple[Tile, ...]) -> int:
    """Distinct input blocks that these output blocks read."""
    found = {step.first_input[o] for low, high in tiles for o in range(low, high)}
    return len({first + k for first in found for k in range(step.fan_in)})


def _input_tiles(step: Gemm, op: TileOp, schedule: Schedule, kept: int) -> int:
    """INP tiles loaded: every sweep over the output blocks re-reads what the buffer cannot have kept."""
    rows = source_extents(step, op, 0, schedule.tile_h)
    columns = source_extents(step, op, 1, schedule.tile_w)
    oc_paired = schedule.threads == 2 and schedule.thread_axis == "oc" and schedule.order == "oc"
    sweeps = [_input_blocks(step, pair) for pair in _pairs(cut(op.blocks, schedule.tile_co), oc_paired)]
    most, total, saved = max(sweeps), sum(sweeps), (len(sweeps) - 1) * kept
    if schedule.order == "oc":
        plane = op.batches * int(rows.sum()) * int(columns.sum())
        return max(plane * total - saved, plane * most)
    if schedule.threads == 2 and schedule.thread_axis == "h":
        rows = np.add.reduceat(rows, np.arange(0, len(rows), 2))
    count = 0
    for low, high in cut(op.batches, schedule.tile_b):
        area = (high - low) * np.multiply.outer(rows, columns)
        count += int(np.maximum(area * total - saved, area * most).sum())
    return count


def _weight_tiles(step: Gemm, op: TileOp, schedule: Schedule, kept: int, spatial: int) -> int:
    """WGT tiles loaded: every sweep over the rectangle re-reads what the buffer cannot have kept."""
    taps = len({tap.weight for tap in step.taps}) * (step.fan_in if step.input_stride else 1)
    if not step.output_stride:
        return taps
    if schedule.order == "oc":
        paired = schedule.threads == 2 and schedule.thread_axis == "oc"
        groups = [sum(high - low for low, high in g) * taps for g in _pairs(cut(op.blocks, schedule.tile_co), paired)]
        sweeps = spatial
    else:
        groups = [op.blocks * taps]
        rows = -(-out_extent(op, 0) // schedule.tile_h)
        sweeps = spatial // rows * -(-rows // 2) if schedule.threads == 2 and schedule.thread_axis == "h" else spatial
    return sum(max(group, sweeps * group - (sweeps - 1) * kept) for group in groups)


def _nest(step: Gemm, op: TileOp, schedule: Schedule) -> tuple[int, int]:
    """(instructions, micro-operations in their lists) per chunk of a tile in the middle, about."""
    inputs, outputs = min(schedule.tile_ci, step.fan_in), min(schedule.tile_co, op.blocks)
    width = min(schedule.tile_w, op.width)
    columns = {tap.dst_x for tap in step.taps}
    rows = len({tap.dst_y for tap in step.taps})
    if schedule.inner == "x" and outputs * schedule.tile_b >= MIN_DISTANCE:
        starts = {(max(span.start, 0), min(span.start + span.count, width)) for span in columns}
        return len(starts) if width == op.width else 1, len(step.taps) * inputs * outputs
    length = rows * sum(min(width, span.count) for span in columns)
    unrolled = outputs if schedule.inner == "ci" else inputs
    return unrolled, length * unrolled


def _lists(step: Gemm, op: TileOp, schedule: Schedule, config: VtaConfig, tiles: int) -> tuple[int, int, int]:
    """(GEMM instructions, loads of lists, micro-operations loaded), about: once where all lists fit the buffer."""
    instructions, length = _nest(step, op, schedule)
    chunks = -(-step.fan_in // schedule.tile_ci) if len(set(step.first_input)) == 1 else schedule.tile_co
    different = min(chunks * schedule.threads, chunks * tiles)
    loaded = different if different * length <= config.uop_depth else chunks * tiles
    return instructions * chunks * tiles * step.passes, loaded * instructions, loaded * length
