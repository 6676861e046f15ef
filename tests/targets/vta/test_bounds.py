"""Bounds are bounds: no simulated program undercuts them; the estimate ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vta_tile_ops import any_schedule, conv_op

from lpsn_tvm.schedules.vta.emit import Schedule, default_schedule, fits
from lpsn_tvm.schedules.vta.ops import Plane, Pool, Scalar, Store, TileOp, Vector
from lpsn_tvm.targets.vta.bounds import estimate, lower_bound, rates_of, work_of
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.cycle_model import MODELS
from lpsn_tvm.targets.vta.search import time_schedule
from lpsn_tvm.targets.vta.search_key import canonical
from lpsn_tvm.targets.vta.traffic import Buffer, cut, used

CONFIGS = ("pynq", "pynq-4x8", "pynq-i4")
EPILOGUES = (
    (Scalar("shr", 8), Scalar("max", 0), Scalar("min", 127)),
    (Vector("add", "b", 0), Vector("shr", "s", 0), Scalar("max", 0), Scalar("min", 127)),
    (Scalar("add", 5), Scalar("shr", 15), Scalar("shr", 3)),
    (),
)


@st.composite
def operators(draw: st.DrawFn) -> TileOp:
    """Dense, depthwise and residual layers, some of them pooled."""
    inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    first, fan_in = None, None
    if draw(st.booleans()) and draw(st.booleans()):
        inputs, first, fan_in = outputs, tuple(range(outputs)), 1
    size = draw(st.integers(3, 15)), draw(st.integers(3, 15))
    kernel = draw(st.sampled_from(((1, 1), (3, 3), (3, 1))))
    middle = draw(st.sampled_from(EPILOGUES))
    stride = draw(st.integers(1, 2))
    op: TileOp = conv_op(
        batches=draw(st.integers(1, 2)), inputs=inputs, outputs=outputs, size=size, kernel=kernel,
        strides=(stride, stride), padding=(kernel[0] // 2, kernel[1] // 2), first_input=first, fan_in=fan_in,
        residual=draw(st.booleans()), middle=middle,
    )  # fmt: skip
    if op.height >= 4 and op.width >= 4 and draw(st.booleans()):
        pool = Pool((2, 2), (2, 2), (0, 0), op.height // 2, op.width // 2)
        out = Store(Plane.dense("y", 0, op.batches, op.blocks, pool.height, pool.width))
        op = replace(op, steps=(*op.steps[:-1], pool, out))
    return op


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(CONFIGS), model=st.sampled_from(sorted(MODELS)))
def test_no_program_undercuts_its_bound(data: st.DataObject, name: str, model: str) -> None:
    config, op = PRESETS[name], canonical(data.draw(operators()))
    schedule = data.draw(any_schedule(op))
    assume(fits(op, schedule, config))
    work, rates = work_of(op, schedule, config), rates_of(MODELS[model], config)
    result = time_schedule(op, schedule, config, model)
    counters = result.counters
    assert work.inp * config.inp_tile_bytes <= counters["inp_bytes_read"]
    assert work.wgt * config.wgt_tile_bytes <= counters["wgt_bytes_read"]
    assert work.gemm <= counters["gemm_uops"]
    assert work.immediate + work.tensor <= counters["alu_uops"]
    assert work.out * config.out_tile_bytes <= counters["out_bytes_written"]
    assert lower_bound(work, rates, config) <= result.cycles


@pytest.mark.parametrize("model", sorted(MODELS))
def test_the_bound_of_a_busy_array_is_tight(model: str) -> None:
    config, op = PRESETS["pynq"], canonical(conv_op(inputs=8, outputs=8, size=(28, 28)))
    schedule = default_schedule(op, config)
    bound = lower_bound(work_of(op, schedule, config), rates_of(MODELS[model], config), config)
    cycles = time_schedule(op, schedule, config, model).cycles
    assert 0.92 * cycles <= bound <= cycles


def test_the_estimate_ranks_schedules_of_a_layer() -> None:
    config, rates = PRESETS["pynq"], rates_of(MODELS["pynq"], PRESETS["pynq"])
    op = canonical(conv_op(inputs=4, outputs=8, size=(14, 14)))
    grid = [
        Schedule(tile_co=co, tile_h=h, tile_w=14, tile_ci=ci, inner="x", threads=threads)
        for co in (1, 4, 8) for h in (1, 4, 7) for ci in (1, 4) for threads in (1, 2)
    ]  # fmt: skip
    grid = [schedule for schedule in grid if fits(op, schedule, config)]
    guessed = [estimate(work_of(op, schedule, config), rates, config) for schedule in grid]
    simulated = [time_schedule(op, schedule, config).cycles for schedule in grid]
    promising = np.argsort(guessed)[: len(grid) // 3]
    assert min(simulated[i] for i in promising) <= 1.01 * min(simulated)
    assert np.mean([simulated[i] for i in promising]) < 0.95 * np.mean(simulated)


def test_used_positions_are_counted_once() -> None:
    """3 taps of a convolution with padding 1 over 8 rows: output rows 2..4 read input rows 1..5."""
    op = conv_op(size=(8, 8))
    spans = tuple({(tap.dst_y, tap.src_y) for tap in op.steps[0].taps})
    assert used(spans, (2, 5)) == 5
    assert used(spans, (0, 3)) == 4
    assert used(spans, (0, 8)) == 8


@pytest.mark.parametrize(
    ("slots", "is_certain", "loaded"), [(4, True, 12), (4, False, 12), (3, True, 18), (3, False, 24), (1, False, 36)]
)
def test_what_a_buffer_keeps_is_not_loaded_again(slots: int, is_certain: bool, loaded: int) -> None:
    """Three sweeps over 12 tiles in contents of 3: four slots hold them all."""
    assert Buffer(slots, 3, is_certain).swept(np.full(3, 12)) == loaded


def test_cut_covers_the_extent() -> None:
    assert cut(5, 2) == ((0, 2), (2, 4), (4, 5))
