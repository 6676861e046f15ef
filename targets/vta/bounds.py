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

from lpsn_tvm.schedules.vta.nest import MIN_DISTANCE
from lpsn_tvm.schedules.vta.ops import Gemm, Scalar, Store, TileOp, Vector
from lpsn_tvm.schedules.vta.placement import placement
from lpsn_tvm.targets.vta.traffic import (
    Buffer,
    cut,
    gemm_floor,
    input_tiles,
    out_extent,
    source_extents,
    spatial_tiles,
    weight_tiles,
)

if TYPE_CHECKING:
    from lpsn_tvm.schedules.vta.schedule import Schedule
    from lpsn_tvm.targets.vta.config import VtaConfig
    from lpsn_tvm.targets.vta.cycle_model import CycleModel


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
    """What a schedule makes the units do; at least, but for the last line.

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
    tiles, spatial : int
        Output tiles, and how many of them per range of output blocks.
    inp_slots, wgt_slots : int
        Slots of the buffers.
    likely_inp, likely_wgt, chunk, resets, list_loads, lists, instructions : int
        Tiles loaded, bytes of a chunk of input and weights, reset micro-operations, loads of micro-operations, how many
        they bring, GEMM and ALU instructions: about.
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
    spatial: int
    inp_slots: int
    wgt_slots: int
    likely_inp: int
    likely_wgt: int
    chunk: int
    resets: int
    list_loads: int
    lists: int
    instructions: int


@lru_cache(maxsize=512)
def alu_work(op: TileOp) -> tuple[int, int, int]:
    """(immediate, tensor) micro-operations and instructions per output tile that the steps need at least.

    A bias may become part of the reduction and an addition of an immediate part of a bias: they count nothing. Steps
    before a pooling may move behind it, where there are fewer positions.
    """
    positions = min(op.height * op.width, out_extent(op, 0) * out_extent(op, 1)) * op.batches * op.blocks
    immediate = sum(isinstance(step, Scalar) and step.kind in ("min", "max", "shr") for step in op.steps)
    tensor = sum(isinstance(step, Vector) and step.kind == "shr" for step in op.steps)
    return immediate * positions, tensor * positions, immediate + tensor


def work_of(op: TileOp, schedule: Schedule, config: VtaConfig) -> Work:
    """Count what `schedule` makes the units do."""
    rows, columns = cut(out_extent(op, 0), schedule.tile_h), cut(out_extent(op, 1), schedule.tile_w)
    oc_tiles, spatial = cut(op.blocks, schedule.tile_co), spatial_tiles(op, schedule)
    gemms = [step for step in op.steps if isinstance(step, Gemm)]
    place, tiles = placement(op, schedule, config), spatial * len(oc_tiles)
    immediate, tensor, alu_instructions = alu_work(op)
    stores = [step for step in op.steps if isinstance(step, Store)]
    first = gemms[0]
    window = [int(source_extents(first, op, a, size)[0]) for a, size in ((0, schedule.tile_h), (1, schedule.tile_w))]
    lists = [_lists(step, op, schedule, config, tiles) for step in gemms]
    inp, wgt = (
        [
            sum(count(step, op, schedule, Buffer(slots, size, is_certain)) for step in gemms)
            for is_certain in (True, False)
        ]
        for count, slots, size in (
            (input_tiles, place.inp_slots, place.inp_slot),
            (weight_tiles, place.wgt_slots, place.wgt_slot),
        )
    )
    return Work(
        gemm=gemm_floor(op),
        immediate=immediate,
        tensor=tensor,
        inp=inp[0],
        wgt=wgt[0],
        out=sum(step.plane.tiles for step in stores),
        bursts=len(stores) * _bursts(op, len(rows), len(columns), tiles),
        first_inp=window[0] * window[1],
        first_wgt=len(first.taps),
        last_out=(oc_tiles[-1][1] - oc_tiles[-1][0]) * (rows[-1][1] - rows[-1][0]) * (columns[-1][1] - columns[-1][0]),
        tiles=tiles,
        spatial=spatial,
        inp_slots=place.inp_slots,
        wgt_slots=place.wgt_slots,
        likely_inp=inp[1],
        likely_wgt=wgt[1],
        chunk=place.inp_slot * config.inp_tile_bytes + place.wgt_slot * config.wgt_tile_bytes,
        resets=op.batches * op.blocks * op.height * op.width,
        list_loads=sum(loads for _, loads, _ in lists),
        lists=sum(length for _, _, length in lists),
        instructions=tiles * alu_instructions + sum(count for count, _, _ in lists),
    )


def _bursts(op: TileOp, rows: int, columns: int, tiles: int) -> int:
    """Rows of the stores: whole rows follow each other in DRAM, and where a tile is a whole plane, so do planes."""
    if columns > 1:
        return op.batches * op.blocks * out_extent(op, 0) * columns
    return op.batches * op.blocks * rows if rows > 1 else tiles


def lower_bound(work: Work, rates: Rates, config: VtaConfig) -> int:
    """Cycles that no program of this schedule can undercut."""
    first = _cycles(work.first_inp * config.inp_tile_bytes + work.first_wgt * config.wgt_tile_bytes, rates)
    last = _cycles(config.out_tile_bytes, rates)
    compute = work.gemm + work.immediate * rates.alu_immediate + work.tensor * rates.alu_tensor
    read = work.inp * config.inp_tile_bytes + work.wgt * config.wgt_tile_bytes
    store = _cycles(work.out * config.out_tile_bytes, rates) + work.bursts * rates.burst
    return max(first + compute + work.tiles * rates.overhead + last, _cycles(read, rates), store)


def estimate(work: Work, rates: Rates, config: VtaConfig) -> float:
    """Cycles that are likely: what ranks schedules before they are simulated."""
    lists = _cycles(work.lists * config.uop_tile_bytes, rates)
    compute = work.gemm + work.immediate * rates.alu_immediate + work.tensor * rates.alu_tensor + work.resets
    compute += (work.instructions + work.tiles) * (rates.overhead + 1) + lists + work.list_loads * (rates.latency + 6)
    inp, wgt = (
        _cycles(count * size, rates)
        for count, size in ((work.likely_inp, config.inp_tile_bytes), (work.likely_wgt, config.wgt_tile_bytes))
    )
    out = _cycles(work.out * config.out_tile_bytes, rates)
    # Weights that stay arrive during the first of the tiles that share them, input with every tile.
    new = work.tiles // work.spatial
    per_tile, steady = compute / work.tiles, (inp + out + lists) / work.tiles
    uneven = new * max(per_tile, steady + wgt / new) + (work.tiles - new) * max(per_tile, steady)
    even = max(float(compute), inp + wgt + out + lists)
    # A single slot is loaded while nobody reads it.
    alone = (inp if work.inp_slots == 1 else 0) + (wgt if work.wgt_slots == 1 else 0)
    last = _cycles(work.last_out * config.out_tile_bytes, rates)
    return (even + uneven) / 2 + alone + _cycles(work.chunk, rates) + last + 4 * rates.latency


def _cycles(size: int, rates: Rates) -> int:
    return int(size / rates.bus_bytes)


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
