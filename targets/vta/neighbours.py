"""Small moves in the space of schedules: one property changes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.ops import Gemm, TileOp
from lpsn_tvm.schedules.vta.placement import placement
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.vta.traffic import out_extent, spatial_tiles

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

WIDTH_PIECES = (1, 2, 4)
SLOTS = (0, 2, 3, 4, 6)
ORDERS: tuple[Literal["oc", "spatial"], ...] = ("oc", "spatial")
INNERS: tuple[Literal["x", "co"], ...] = ("x", "co")
_HINTS = get_type_hints(Schedule)
CHOICES = {name: get_args(hint) for name, hint in _HINTS.items() if get_args(hint)}
"""The properties that are names, each with its values."""


@lru_cache(maxsize=256)
def useful_sizes(extent: int) -> tuple[int, ...]:
    """Sizes that cut `extent` into 1, 2, 3, ... nearly equal pieces: `useful_sizes(7) == (1, 2, 3, 4, 7)`."""
    return tuple(sorted({-(-extent // pieces) for pieces in range(1, extent + 1)}))


def extents_of(op: TileOp) -> dict[str, int]:
    """Largest value of every tile size."""
    fan_in = max(step.fan_in for step in op.steps if isinstance(step, Gemm))
    depthwise = any(isinstance(step, Gemm) and len(set(step.first_input)) > 1 for step in op.steps)
    return {
        "tile_b": op.batches,
        "tile_co": op.blocks,
        "tile_h": out_extent(op, 0),
        "tile_w": out_extent(op, 1),
        # Where output blocks read different inputs, a chunk counts output blocks.
        "tile_ci": max(fan_in, op.blocks) if depthwise else fan_in,
    }


def normalized(schedule: Schedule, op: TileOp) -> Schedule:
    """The same program, written one way: sizes within the operator, choices without effect at their default."""
    schedule = changed(schedule, {name: min(getattr(schedule, name), most) for name, most in extents_of(op).items()})
    if schedule.tile_co == op.blocks or spatial_tiles(op, schedule) == 1:
        return replace(schedule, order="oc", thread_axis="h")
    if schedule.threads == 1:
        return replace(schedule, thread_axis="h" if schedule.order == "oc" else "oc")
    return schedule


def changed(schedule: Schedule, values: Mapping[str, Any]) -> Schedule:
    """The schedule with other values of some properties."""
    return replace(schedule, **values)


def seeds(op: TileOp, config: VtaConfig) -> Iterator[Schedule]:
    """Where search begins: tiles of whole, half or quarter rows that fill a good part of the accumulators; all fit."""
    extents = extents_of(op)
    widths = sorted({-(-extents["tile_w"] // pieces) for pieces in WIDTH_PIECES}, reverse=True)
    for tile_w, tile_co, tile_h in product(widths, *(useful_sizes(extents[name]) for name in ("tile_co", "tile_h"))):
        whole = tile_co == extents["tile_co"] and tile_h == extents["tile_h"] and tile_w == extents["tile_w"]
        for tile_ci in useful_sizes(extents["tile_ci"]):
            for threads in (2, 1):
                tile = Schedule(tile_co=tile_co, tile_h=tile_h, tile_w=tile_w, tile_ci=tile_ci, threads=threads)
                room = accumulators(op, tile, config)
                if room is not None and (whole or room >= config.acc_depth // 6):
                    yield from (replace(tile, order=order, inner=inner) for order in ORDERS for inner in INNERS)
                    break


def accumulators(op: TileOp, schedule: Schedule, config: VtaConfig) -> int | None:
    """Accumulators of an output tile, pooled ones included; None where the schedule does not fit."""
    try:
        return placement(op, schedule, config).acc_slot
    except CompileError:
        return None


def neighbours(schedule: Schedule, op: TileOp) -> Iterator[Schedule]:
    """Schedules one move away; they need not fit."""
    for name, extent in extents_of(op).items():
        for size in _near(getattr(schedule, name), extent):
            yield changed(schedule, {name: size})
    for name, values in CHOICES.items():
        for value in values:
            if value != getattr(schedule, name):
                yield changed(schedule, {name: value})
    yield replace(schedule, threads=3 - schedule.threads)
    for name in ("inp_slots", "wgt_slots"):
        for slots in SLOTS:
            if slots != getattr(schedule, name):
                yield changed(schedule, {name: slots})
    # Rows against blocks: the accumulator buffer is shared by both.
    for rows, blocks in ((1, -1), (-1, 1)):
        tile_h = _step(schedule.tile_h, out_extent(op, 0), rows)
        tile_co = _step(schedule.tile_co, op.blocks, blocks)
        if tile_h is not None and tile_co is not None:
            yield replace(schedule, tile_h=tile_h, tile_co=tile_co)


def _near(size: int, extent: int) -> tuple[int, ...]:
    """The next useful sizes around `size`, and the whole extent."""
    sizes = [_step(size, extent, -1), _step(size, extent, 1), extent]
    return tuple(dict.fromkeys(s for s in sizes if s is not None and s != size))


def _step(size: int, extent: int, direction: int) -> int | None:
    """The useful size after (direction 1) or before (-1) `size`."""
    sizes = useful_sizes(extent)
    beyond = [s for s in sizes if (s > size if direction > 0 else s < size)]
    return None if not beyond else beyond[0] if direction > 0 else beyond[-1]
