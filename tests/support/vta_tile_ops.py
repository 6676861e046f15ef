"""Random tile operators, and running them through builder and simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lpsn_tvm.schedules.vta.emit import emit
from lpsn_tvm.schedules.vta.evaluate import evaluate
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Pool, Scalar, Span, Step, Store, Tap, TileOp, Vector
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.program import LinkedProgram, link
from lpsn_tvm.targets.vta.simulator import SimulationResult, simulate

Array = np.ndarray[Any, Any]


@st.composite
def any_schedule(draw: st.DrawFn, op: TileOp) -> Schedule:
    """Any schedule, whether a candidate or not, and whether it fits or not."""
    return Schedule(
        tile_b=draw(st.integers(1, op.batches)),
        tile_co=draw(st.integers(1, op.blocks)),
        tile_h=draw(st.integers(1, op.height)),
        tile_w=draw(st.integers(1, op.width)),
        tile_ci=draw(st.integers(1, 5)),
        threads=draw(st.integers(1, 2)),
        thread_axis=draw(st.sampled_from(("oc", "h"))),
        order=draw(st.sampled_from(("oc", "spatial"))),
        inner=draw(st.sampled_from(("ci", "co", "x"))),
        inp_slots=draw(st.integers(0, 3)),
        wgt_slots=draw(st.integers(0, 3)),
    )


def taps_of(
    source: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> tuple[tuple[int, int], tuple[Tap, ...]]:
    """(height, width) and taps of a convolution."""
    out = tuple((source[a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // strides[a] + 1 for a in range(2))

    def spans(axis: int, k: int) -> tuple[Span, Span] | None:
        offset = k * dilation[axis] - padding[axis]
        inside = [i for i in range(out[axis]) if 0 <= i * strides[axis] + offset < source[axis]]
        if not inside:
            return None
        return (
            Span(inside[0], 1, len(inside)),
            Span(inside[0] * strides[axis] + offset, strides[axis], len(inside)),
        )

    taps = []
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            y, x = spans(0, r), spans(1, s)
            if y and x:
                taps.append(Tap(y[0], x[0], y[1], x[1], r * kernel[1] + s))
    return (out[0], out[1]), tuple(taps)


def transposed_taps(
    source: tuple[int, int], kernel: int, stride: int, padding: int
) -> tuple[tuple[int, int], tuple[Tap, ...]]:
    """(height, width) and taps of a transposed convolution."""
    out = tuple((size - 1) * stride - 2 * padding + kernel for size in source)

    def spans(axis: int, k: int) -> tuple[Span, Span] | None:
        inside = [i for i in range(source[axis]) if 0 <= i * stride + k - padding < out[axis]]
        if not inside:
            return None
        return Span(inside[0] * stride + k - padding, stride, len(inside)), Span(inside[0], 1, len(inside))

    taps = []
    for r in range(kernel):
        for s in range(kernel):
            y, x = spans(0, r), spans(1, s)
            if y and x:
                taps.append(Tap(y[0], x[0], y[1], x[1], r * kernel + s))
    return (out[0], out[1]), tuple(taps)


def identity_taps(height: int, width: int) -> tuple[Tap, ...]:
    y, x = Span(0, 1, height), Span(0, 1, width)
    return (Tap(y, x, y, x, 0),)


def conv_op(
    *,
    batches: int = 1,
    inputs: int = 1,
    outputs: int = 1,
    size: tuple[int, int] = (6, 6),
    kernel: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    transposed: bool = False,
    first_input: tuple[int, ...] | None = None,
    fan_in: int | None = None,
    passes: int = 1,
    middle: tuple[Step, ...] = (Scalar("shr", 4), Scalar("max", 0), Scalar("min", 127)),
    residual: bool = False,
    planes: bool = False,
) -> TileOp:
    """A convolution with the regions "x", "w", "b", "s", "r", "i" and "y"."""
    if transposed:
        (height, width), taps = transposed_taps(size, kernel[0], strides[0], padding[0])
    else:
        (height, width), taps = taps_of(size, kernel, strides, padding, dilation)
    fan_in = inputs if fan_in is None else fan_in
    count = kernel[0] * (kernel[0] if transposed else kernel[1])
    source = Plane.dense("x", 0, batches, inputs, *size)
    steps: list[Step] = [
        Gemm(source, taps, "w", 0, fan_in * count, count, fan_in, first_input or (0,) * outputs, passes)
    ]
    if residual:
        identity = identity_taps(height, width)
        plane = Plane.dense("r", 0, batches, outputs, height, width)
        steps += [Scalar("shr", 2), Gemm(plane, identity, "i", 0, 0, 0, 1, tuple(range(outputs)), 3)]
    steps += middle
    for step in middle:
        if isinstance(step, Pool):
            height, width = step.height, step.width
    out = Plane.dense("y", 0, batches, outputs, height, width)
    steps.append(Store(out))
    if planes:
        steps += [Scalar("shr", 8), Store(Plane.dense("y", out.tiles, batches, outputs, height, width))]
    return TileOp(
        "op", batches, outputs, *_rectangle(size, kernel, strides, padding, dilation, transposed), tuple(steps)
    )


def _rectangle(size: Any, kernel: Any, strides: Any, padding: Any, dilation: Any, transposed: bool) -> tuple[int, int]:
    if transposed:
        return transposed_taps(size, kernel[0], strides[0], padding[0])[0]
    return taps_of(size, kernel, strides, padding, dilation)[0]


def memory_of(op: TileOp, config: VtaConfig, seed: int = 0) -> dict[str, Array]:
    """Random tiles of every region the operator uses."""
    rng = np.random.default_rng(seed)
    low = 1 << (config.inp_bits - 1)
    memory: dict[str, Array] = {}

    def data(region: str, plane: Plane) -> None:
        tiles = plane.base + plane.tiles
        if region not in memory or len(memory[region]) < tiles:
            memory[region] = rng.integers(-low, low, (tiles, config.batch, config.block_in)).astype(np.int8)

    for step in op.steps:
        if isinstance(step, Gemm):
            data(step.source.region, step.source)
            if step.output_stride == 0:
                memory[step.weights] = np.eye(config.block_out, config.block_in, dtype=np.int8)[None]
            else:
                tiles = op.blocks * step.output_stride
                wide = 1 << (config.wgt_bits - 1)
                shape = (tiles, config.block_out, config.block_in)
                memory[step.weights] = rng.integers(-wide, wide, shape).astype(np.int8)
        elif isinstance(step, Vector):
            bounds = (0, 8) if step.kind == "shr" else (-1000, 1000)
            shape = (step.base + op.blocks, config.batch, config.block_out)
            memory[step.region] = rng.integers(*bounds, shape).astype(np.int32)
        elif isinstance(step, Store):
            tiles = step.plane.base + step.plane.tiles
            memory[step.plane.region] = np.zeros((tiles, config.batch, config.block_out), np.int8)
    return memory


def pack(values: Array, bits: int) -> bytes:
    """Little-endian, low bits first."""
    if bits >= 8:
        return values.tobytes()
    flat = values.reshape(-1, 2).astype(np.uint8) & 15
    return (flat[:, 0] | flat[:, 1] << 4).astype(np.uint8).tobytes()


def program_of(
    ops: Sequence[TileOp], schedules: Sequence[Schedule], config: VtaConfig, memory: dict[str, Array]
) -> LinkedProgram:
    """One program of these operators; what one of them stores has no contents before."""
    builder = ProgramBuilder(config)
    written = {step.plane.region for op in ops for step in op.steps if isinstance(step, Store)}
    for name, values in memory.items():
        bits = config.wgt_bits if name[0] in "wi" else 32 if values.dtype == np.int32 else config.inp_bits
        data = pack(values, bits)
        if name in written:
            builder.region(name, len(data), access="rw")
        else:
            builder.region(name, len(data), data=data)
    for op, schedule in zip(ops, schedules, strict=True):
        emit(builder, op, schedule)
    return link(builder.finish())


def check_all(
    ops: Sequence[TileOp],
    schedules: Sequence[Schedule],
    config: VtaConfig,
    *,
    seed: int = 0,
    interleavings: int = 2,
) -> SimulationResult:
    """The emitted program against the meaning of the operators, bit for bit, under several interleavings."""
    memory: dict[str, Array] = {}
    for op in ops:
        memory = memory_of(op, config, seed) | memory
    linked = program_of(ops, schedules, config, memory)
    for op in ops:
        evaluate(op, memory, config)
    expected = pack(memory["y"], config.out_bits)
    result = simulate(linked, model="pynq")
    assert result.memory["y"] == expected
    for interleaving in range(interleavings):
        assert simulate(linked, model=None, interleaving=interleaving).memory["y"] == expected
    return result


def check(
    op: TileOp, schedule: Schedule, config: VtaConfig, *, seed: int = 0, interleavings: int = 2
) -> SimulationResult:
    """One operator alone."""
    return check_all([op], [schedule], config, seed=seed, interleavings=interleavings)
