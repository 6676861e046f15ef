"""Emitted programs against the meaning of the operator, bit for bit, in the strict simulator."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vta_tile_ops import any_schedule, check, check_all, conv_op

from lpsn_tvm.errors import CompileError, VtaProgramError
from lpsn_tvm.schedules.vta.emit import candidates, default_schedule, emit, fits
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Pool, Scalar, Span, Step, Store, Tap, TileOp, Vector
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig

CONFIGS = ("pynq", "pynq-0.0.2", "pynq-4x8", "pynq-i4", "pynq-i8w4")
REQUANTIZE = (Vector("add", "b", 0), Vector("shr", "s", 0), Scalar("max", 0), Scalar("min", 127))
ELEMENTWISE: tuple[Step, ...] = (
    Scalar("shr", 3),
    Scalar("shr", 15),
    Scalar("max", -5),
    Scalar("min", 100),
    Scalar("add", -321),
    Scalar("double"),
    *REQUANTIZE[:2],
)


@st.composite
def operators(draw: st.DrawFn) -> TileOp:
    """Convolutions of every kind, with and without residual, planes and pooling."""
    small = st.integers(1, 4)
    transposed = draw(st.sampled_from((False, False, False, True)))
    kernel = (draw(small), draw(small))
    strides = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    if transposed:
        kernel, strides = (kernel[0], kernel[0]), (strides[0], strides[0])
    padding = (
        (draw(st.integers(0, kernel[0] - 1)),) * 2 if transposed else tuple(draw(st.integers(0, k - 1)) for k in kernel)
    )
    dilation = (1, 1) if transposed else (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    sizes = []
    for axis in range(2):
        least = 1 + 2 * padding[axis] if transposed else max(1, dilation[axis] * (kernel[axis] - 1) + 1 - padding[axis])
        sizes.append(draw(st.integers(least, least + 8)))
    inputs, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    fan_in, first = inputs, (0,) * outputs
    kind = draw(st.sampled_from(("dense", "dense", "depthwise", "selection")))
    if kind == "depthwise":
        inputs, fan_in, first = outputs, 1, tuple(range(outputs))
    elif kind == "selection":
        fan_in = draw(st.integers(1, inputs))
        first = tuple(draw(st.integers(0, inputs - fan_in)) for _ in range(outputs))
    op = conv_op(
        batches=draw(st.integers(1, 3)), inputs=inputs, outputs=outputs, size=(sizes[0], sizes[1]), kernel=kernel,
        strides=strides, padding=(padding[0], padding[1]), dilation=dilation, transposed=transposed,
        first_input=first, fan_in=fan_in, passes=draw(st.integers(1, 2)), residual=draw(st.booleans()),
        planes=draw(st.booleans()), middle=tuple(draw(st.lists(st.sampled_from(ELEMENTWISE), max_size=4))),
    )  # fmt: skip
    return pooled(op, draw) if draw(st.booleans()) else op


def pooled(op: TileOp, draw: st.DrawFn) -> TileOp:
    """A `Pool` among the last steps; sometimes what it reads is stored, too."""
    kernel, strides = (tuple(draw(st.integers(1, 3)) for _ in range(2)) for _ in range(2))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    sizes = (op.height, op.width)
    out = [(sizes[a] + 2 * padding[a] - kernel[a]) // strides[a] + 1 for a in range(2)]
    assume(all(out[a] > 0 and (out[a] - 1) * strides[a] - padding[a] < sizes[a] for a in range(2)))
    pool = Pool((kernel[0], kernel[1]), (strides[0], strides[1]), (padding[0], padding[1]), out[0], out[1])
    steps = [step for step in op.steps if not isinstance(step, Store)]
    last = max(index for index, step in enumerate(steps) if isinstance(step, Gemm))
    base = 0
    middle: list[Step] = []
    if draw(st.booleans()):
        middle.append(Store(Plane.dense("y", 0, op.batches, op.blocks, op.height, op.width)))
        base = op.batches * op.blocks * op.height * op.width
    at = draw(st.integers(last + 1, len(steps)))
    steps[at:at] = [*middle, pool]
    return replace(op, steps=(*steps, Store(Plane.dense("y", base, op.batches, op.blocks, *out))))


@st.composite
def schedules(draw: st.DrawFn, op: TileOp, config: VtaConfig) -> Schedule:
    """Any schedule that fits, not only candidates."""
    schedule = draw(any_schedule(op))
    assume(fits(op, schedule, config))
    return schedule


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(CONFIGS))
def test_any_operator_under_any_schedule(data: st.DataObject, name: str) -> None:
    config = PRESETS[name]
    op = data.draw(operators())
    check(op, data.draw(schedules(op, config)), config)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(data=st.data(), name=st.sampled_from(CONFIGS))
def test_any_operator_under_any_schedule_at_length(data: st.DataObject, name: str) -> None:
    config = PRESETS[name]
    op = data.draw(operators())
    check(op, data.draw(schedules(op, config)), config, interleavings=10)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(op=operators(), name=st.sampled_from(CONFIGS))
def test_default_schedule_of_any_operator(op: TileOp, name: str) -> None:
    config = PRESETS[name]
    check(op, default_schedule(op, config), config)


def test_all_candidates_of_one_layer() -> None:
    """Every candidate of a small layer with a residual and pooling computes the same bytes, without a broken rule."""
    config = PRESETS["pynq"]
    op = conv_op(
        inputs=2, outputs=4, size=(6, 5), residual=True, middle=(*REQUANTIZE, Pool((2, 2), (2, 2), (0, 0), 3, 2))
    )
    seen = list(candidates(op, config))
    assert len(seen) == len(set(seen)) > 100
    for schedule in seen[:: max(1, len(seen) // 150)]:
        check(op, schedule, config, interleavings=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_ten_interleavings_of_a_streamed_layer(name: str) -> None:
    """Slots that are used again and again, both accumulator slots, two output tiles in flight."""
    op = conv_op(batches=2, inputs=4, outputs=4, size=(10, 9), middle=REQUANTIZE)
    schedule = Schedule(tile_co=2, tile_h=4, tile_w=5, tile_ci=1, threads=2, inp_slots=2, wgt_slots=2)
    check(op, schedule, PRESETS[name], interleavings=10)


@pytest.mark.parametrize("inner", ["ci", "co", "x"])
def test_long_sequences_are_split(inner: Literal["ci", "co", "x"]) -> None:
    """49 taps over 70 columns, and 25 taps for 7 x 9 pairs of blocks, are more micro-ops than the buffer has."""
    config = PRESETS["pynq"]
    wide = conv_op(inputs=1, outputs=1, size=(7, 70), kernel=(7, 7), padding=(3, 3), middle=REQUANTIZE)
    check(wide, Schedule(tile_co=1, tile_h=4, tile_w=70, inner=inner), config)
    deep = conv_op(inputs=4, outputs=10, size=(5, 5), kernel=(5, 5), padding=(2, 2), middle=REQUANTIZE)
    check(deep, Schedule(tile_co=10, tile_h=5, tile_w=5, tile_ci=4, inner=inner), config)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (8, 1), (3, 2), (70, 1), (2, 3)])
def test_dense_heads_of_few_accumulators(inputs: int, outputs: int) -> None:
    """One or two accumulator tiles: partial sums, added by the ALU."""
    config = PRESETS["pynq"]
    op = conv_op(
        inputs=inputs, outputs=outputs, size=(1, 1), kernel=(1, 1), padding=(0, 0), middle=REQUANTIZE, planes=True
    )
    for tile_ci, inner in itertools.product((1, 3, inputs), ("ci", "co", "x")):
        check(op, Schedule(tile_co=outputs, tile_ci=tile_ci, inner=inner), config)  # type: ignore[arg-type]


def test_taps_skip_the_padding_and_nothing_is_loaded_twice() -> None:
    """14x14, 3x3, padding 1: 40 * 40 positions instead of 42 * 42; inputs and weights come once."""
    config = PRESETS["pynq"]
    op = conv_op(inputs=4, outputs=4, size=(14, 14), middle=REQUANTIZE)
    result = check(op, Schedule(tile_co=4, tile_h=14, tile_w=14, tile_ci=2, inner="x"), config)
    assert result.counters["gemm_uops"] == 4 * 4 * 40 * 40 == op.micro_operations
    assert result.counters["reset_uops"] == 4 * 14 * 14
    assert result.counters["inp_bytes_read"] == 4 * 14 * 14 * config.inp_tile_bytes
    assert result.counters["wgt_bytes_read"] == 4 * 4 * 9 * config.wgt_tile_bytes


def test_weights_stay_while_rows_pass() -> None:
    config = PRESETS["pynq"]
    op = conv_op(inputs=2, outputs=2, size=(12, 12), middle=REQUANTIZE)
    result = check(op, Schedule(tile_co=2, tile_h=2, tile_w=12, tile_ci=1), config)
    assert result.counters["wgt_bytes_read"] == 2 * 2 * 9 * config.wgt_tile_bytes
    assert result.counters["acc_bytes_read"] == 2 * 2 * config.acc_tile_bytes  # bias and shifts once


def test_rows_that_no_tap_needs_are_not_loaded() -> None:
    """A 1x1 kernel of stride 2 reads every second row."""
    config = PRESETS["pynq"]
    op = conv_op(inputs=1, outputs=1, size=(16, 16), kernel=(1, 1), strides=(2, 2), padding=(0, 0))
    result = check(op, Schedule(tile_h=8, tile_w=8), config)
    assert result.counters["inp_bytes_read"] == 8 * 15 * config.inp_tile_bytes


def test_elementwise_steps_come_after_pooling() -> None:
    """Requantizing a pooled rectangle costs a quarter."""
    config = PRESETS["pynq"]
    pool = Pool((2, 2), (2, 2), (0, 0), 4, 4)
    op = conv_op(inputs=1, outputs=1, size=(8, 8), middle=(*REQUANTIZE, pool))
    result = check(op, Schedule(tile_h=4, tile_w=4), config)
    requantize, rows, columns = 4 * 16, 4 * 8, 2 * 16
    assert result.counters["alu_uops"] == requantize + rows + columns


def test_what_does_not_fit_is_named() -> None:
    config = PRESETS["pynq"]
    op = conv_op(inputs=1, outputs=1, size=(3, 5000), kernel=(1, 1), padding=(0, 0))
    with pytest.raises(CompileError, match=r"op: needs 20000 tiles of ACC; the accelerator has 2048"):
        emit(ProgramBuilder(config), op, Schedule(tile_h=2, tile_w=5000))
    wide = conv_op(inputs=1, outputs=1, size=(40, 4000), kernel=(1, 3), dilation=(1, 1990), padding=(0, 0))
    with pytest.raises(CompileError, match="tiles of INP; the accelerator has 2048"):
        default_schedule(wide, config)
    assert not fits(wide, Schedule(), config)


def test_coarse_or_fine_the_default_schedule_fits() -> None:
    config = PRESETS["pynq"]
    for size, inputs, outputs in (((7, 7), 32, 32), ((224, 224), 1, 4), ((1, 1), 512, 63), ((130, 130), 2, 8)):
        op = conv_op(inputs=inputs, outputs=outputs, size=size)
        assert fits(op, default_schedule(op, config), config)


def test_schedules_are_json() -> None:
    schedule = Schedule(tile_co=3, inner="x", thread_axis="oc")
    assert Schedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(CompileError, match="unknown keys"):
        Schedule.from_json({"tile_z": 1})
    for bad in ({"tile_h": 0}, {"threads": 3}, {"inner": "y"}, {"inp_slots": -1}):
        with pytest.raises(CompileError, match="schedule"):
            Schedule(**bad)  # type: ignore[arg-type]


def test_a_wrong_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: the check must notice weights in the wrong place."""
    from lpsn_tvm.schedules.vta.slots import SlotPool

    original = SlotPool.place

    def wrong(self: SlotPool, key: Any) -> tuple[int, bool]:
        base, missing = original(self, key)
        return base, missing and self._time != 3

    monkeypatch.setattr(SlotPool, "place", wrong)
    op = conv_op(inputs=4, outputs=1, size=(4, 4), middle=REQUANTIZE)
    schedule, config = Schedule(tile_h=4, tile_w=4, wgt_slots=2), PRESETS["pynq"]
    with pytest.raises((AssertionError, VtaProgramError)):
        check(op, schedule, config)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(CONFIGS))
def test_operators_of_one_program(data: st.DataObject, name: str) -> None:
    """Slots, micro-ops and stored tensors of three operators, each of which reads what the previous one stored."""
    config = PRESETS[name]
    first = conv_op(inputs=1, outputs=2, size=(8, 8), middle=REQUANTIZE)
    second = conv_op(inputs=2, outputs=3, size=(8, 8), kernel=(8, 8), padding=(0, 0), middle=REQUANTIZE)
    third = conv_op(inputs=3, outputs=2, size=(1, 1), kernel=(1, 1), padding=(0, 0), middle=REQUANTIZE)
    ops = [chained(first, "x", "m", "w0"), chained(second, "m", "n", "w1"), chained(third, "n", "y", "w2")]
    check_all(ops, [data.draw(schedules(op, config)) for op in ops], config)


def chained(op: TileOp, source: str, target: str, weights: str) -> TileOp:
    """The operator with other regions."""
    steps: list[Step] = []
    for step in op.steps:
        if isinstance(step, Gemm):
            step = replace(step, source=replace(step.source, region=source), weights=weights)
        elif isinstance(step, Store):
            step = replace(step, plane=replace(step.plane, region=target))
        elif isinstance(step, Vector):
            step = replace(step, region=step.region + weights)
        steps.append(step)
    return replace(op, steps=tuple(steps))


@pytest.mark.parametrize("inner", ["ci", "co", "x"])
def test_one_input_tile_for_all_positions(inner: Literal["ci", "co", "x"]) -> None:
    """A source span of step 0: a constant tile times a weight tile per block is a bias at one micro-op per position."""
    config = PRESETS["pynq"]
    op = conv_op(inputs=2, outputs=4, size=(6, 7), middle=(Scalar("shr", 5),))
    tap = Tap(Span(0, 1, 6), Span(0, 1, 7), Span(0, 0, 6), Span(0, 0, 7), 0)
    bias = Gemm(Plane.dense("c", 0, 1, 1, 1, 1), (tap,), "wb", 0, 1, 1, 1, (0,) * 4)
    op = replace(op, steps=(op.steps[0], bias, *op.steps[1:]))
    result = check(op, Schedule(tile_co=4, tile_h=4, tile_w=7, tile_ci=2, inner=inner), config)
    assert result.counters["gemm_uops"] == op.micro_operations
