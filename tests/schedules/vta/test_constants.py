"""Steps on constant sources: small slots of their own, loaded once, under any schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vta_tile_ops import check, conv_op

from lpsn_tvm.schedules.vta.emit import candidates, default_schedule
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Pool, Scalar, Span, Store, Tap, TileOp
from lpsn_tvm.schedules.vta.placement import gemm_levels, is_constant, placement
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.vta.bounds import lower_bound, rates_of, work_of
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.cycle_model import cycle_model
from lpsn_tvm.targets.vta.search import time_schedule

CONFIGS = ("pynq", "pynq-4x8", "pynq-i4")


def with_bias(op: TileOp, size: tuple[int, int], at: int = 1) -> TileOp:
    """`op` and, as step `at`, one constant tile per batch times one weight tile per block."""
    dst = [Span(0, 1, extent) for extent in size]
    src = [Span(0, 0, extent) for extent in size]
    plane = Plane.dense("c", 0, op.batches, 1, 1, 1)
    bias = Gemm(plane, (Tap(dst[0], dst[1], src[0], src[1], 0),), "wb", 0, 1, 1, 1, (0,) * op.blocks)
    return replace(op, steps=(*op.steps[:at], bias, *op.steps[at:]))


@pytest.mark.parametrize("preset", CONFIGS)
def test_every_candidate_is_exact(preset: str) -> None:
    config = PRESETS[preset]
    op = with_bias(conv_op(batches=2, inputs=2, outputs=3, size=(5, 6), residual=True), (5, 6))
    for schedule in list(candidates(op, config))[:: 97 if preset == "pynq" else 211]:
        check(op, schedule, config, interleavings=1)


@pytest.mark.parametrize("preset", CONFIGS)
def test_behind_a_pooling(preset: str) -> None:
    op = conv_op(inputs=2, outputs=3, size=(8, 8), middle=(Scalar("shr", 4),))
    steps = (op.steps[0], Pool((3, 3), (2, 2), (1, 1), 4, 4), *op.steps[1:-1], Store(Plane.dense("y", 0, 1, 3, 4, 4)))
    pooled = with_bias(replace(op, steps=steps), (4, 4), at=2)
    check(pooled, default_schedule(pooled, PRESETS[preset]), PRESETS[preset])
    check(pooled, Schedule(tile_co=2, tile_h=2, tile_w=3), PRESETS[preset])


def test_constants_are_loaded_once_and_bounds_hold() -> None:
    config, model = PRESETS["pynq"], cycle_model("pynq")
    plain = conv_op(inputs=4, outputs=8, size=(12, 12))
    op = with_bias(plain, (12, 12))
    for order in ("oc", "spatial"):
        schedule = Schedule(tile_co=4, tile_h=4, tile_w=12, tile_ci=2, order=order)
        before, after = (time_schedule(each, schedule, config, model) for each in (plain, op))
        name = "inp_bytes_read"
        assert after.counters[name] == before.counters[name] + config.inp_tile_bytes
        name = "wgt_bytes_read"
        assert after.counters[name] == before.counters[name] + 8 * config.wgt_tile_bytes
        assert lower_bound(work_of(op, schedule, config), rates_of(model, config), config) <= after.cycles


def test_slots_of_constants_lie_beside_the_others() -> None:
    config, schedule = PRESETS["pynq"], Schedule(tile_co=4, tile_h=4, tile_w=12, tile_ci=2)
    plain = conv_op(inputs=4, outputs=8, size=(12, 12))
    place, alone = (placement(op, schedule, config) for op in (with_bias(plain, (12, 12)), plain))
    assert (place.inp_slot, place.wgt_slot) == (alone.inp_slot, alone.wgt_slot)
    assert (place.constant_inp_slot, place.constant_inp_slots) == (1, 1)
    assert (place.constant_wgt_slot, place.constant_wgt_slots) == (4, 2)
    assert place.inp_tiles <= config.inp_depth
    assert place.wgt_tiles <= config.wgt_depth


def test_what_is_constant() -> None:
    op = with_bias(conv_op(inputs=1, outputs=1, size=(1, 1), kernel=(1, 1), padding=(0, 0)), (1, 1))
    assert [is_constant(step) for step, _ in gemm_levels(op)] == [False, True]
