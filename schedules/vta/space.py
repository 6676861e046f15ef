"""The space of schedules: a first choice for an operator, and all candidates for search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.ops import Gemm, TileOp
from lpsn_tvm.schedules.vta.placement import fits, placement
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.schedules.vta.tiling import extents

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig


def sizes(length: int, most: int = 8) -> list[int]:
    """Tile sizes that cut `length` into few pieces of nearly equal size: length, length / 2, ..., powers of two."""
    found = {-(-length // pieces) for pieces in range(1, most + 1)}
    size = 1
    while size < length:
        found.add(size)
        size *= 2
    return sorted(found, reverse=True)


def fan_in(op: TileOp) -> int:
    """Most input blocks of an output block."""
    return max(step.fan_in for step in op.steps if isinstance(step, Gemm))


def _shapes(op: TileOp) -> Iterator[tuple[int, int, int, int]]:
    """(tile_co, tile_h, tile_w, tile_ci), large tiles first."""
    height, width = extents(op)[-1]
    for tile_w in sizes(width, 4):
        for tile_h in sizes(height):
            for tile_co in sizes(op.blocks):
                for tile_ci in sizes(fan_in(op)):
                    yield tile_co, tile_h, tile_w, tile_ci


def candidates(op: TileOp, config: VtaConfig) -> Iterator[Schedule]:
    """All schedules worth trying; every one fits."""
    inners: tuple[Literal["ci", "co", "x"], ...] = ("x", "co", "ci")
    orders: tuple[Literal["oc", "spatial"], ...] = ("oc", "spatial")
    for tile_co, tile_h, tile_w, tile_ci in _shapes(op):
        for threads in (2, 1):
            base = Schedule(tile_co=tile_co, tile_h=tile_h, tile_w=tile_w, tile_ci=tile_ci, threads=threads)
            if not fits(op, base, config):
                continue
            for order in orders:
                for inner in inners:
                    for slots in (0, 2):
                        fields = base.to_json() | {"order": order, "inner": inner, "inp_slots": slots}
                        yield Schedule.from_json(fields)


def default_schedule(op: TileOp, config: VtaConfig) -> Schedule:
    """A schedule that fits, chosen without search: large tiles, double buffering where it costs little.

    Raises
    ------
    CompileError
        None fits: not even one row of one block with one input block; names needed and available tiles.
    """
    best: tuple[float, Schedule] | None = None
    for tile_co, tile_h, tile_w, tile_ci in _shapes(op):
        for threads in (2, 1):
            schedule = Schedule(tile_co=tile_co, tile_h=tile_h, tile_w=tile_w, tile_ci=tile_ci, threads=threads)
            if not fits(op, schedule, config):
                continue
            score = _score(op, schedule, config)
            if best is None or score > best[0]:
                best = score, schedule
    if best is None:
        placement(op, Schedule(threads=1), config)
        raise CompileError("no schedule fits", where=op.name)
    return best[1]


def _score(op: TileOp, schedule: Schedule, config: VtaConfig) -> float:
    """Larger is better: accumulators per tile, with room for two chunks of inputs and weights."""
    place = placement(op, schedule, config)
    tile = schedule.tile_co * schedule.tile_h * schedule.tile_w
    buffered = (place.inp_slots > 1) + (place.wgt_slots > 1) + (schedule.threads > 1)
    return float(tile * 2**buffered) / (1 + schedule.tile_ci)
