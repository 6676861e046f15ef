"""Columns as a loop: the same micro-operations as the specification, in an order the pipeline allows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.schedules.vta.nest import Axis, GemmShape, expand, keeps_apart
from lpsn_tvm.schedules.vta.nest_columns import column_bodies
from lpsn_tvm.schedules.vta.ops import Span, Tap


def conv_taps(height: int, width: int, kernel: int, stride: int, padding: int) -> tuple[Tap, ...]:
    """Taps of a convolution over an input of `height` x `width`."""

    def spans(extent: int, tap: int) -> tuple[Span, Span] | None:
        out = (extent + 2 * padding - kernel) // stride + 1
        inside = [i for i in range(out) if 0 <= i * stride + tap - padding < extent]
        if not inside:
            return None
        return Span(inside[0], 1, len(inside)), Span(inside[0] * stride + tap - padding, stride, len(inside))

    taps = []
    for r in range(kernel):
        for s in range(kernel):
            y, x = spans(height, r), spans(width, s)
            if y is not None and x is not None:
                taps.append(Tap(y[0], x[0], y[1], x[1], r * kernel + s))
    return tuple(taps)


def wanted(shape: GemmShape) -> Counter[tuple[int, ...]]:
    """Every (dst, src, wgt) that the shape means."""
    found: Counter[tuple[int, ...]] = Counter()
    blocks = [
        tuple(np.add.reduce(steps))
        for steps in (
            (n, o, k) for n in shape.batches.offsets() for o in shape.outputs.offsets() for k in shape.inputs.offsets()
        )
    ]
    for tap in shape.taps:
        for i in range(tap.dst_y.count):
            for j in range(tap.dst_x.count):
                dst = (tap.dst_y.start + i * tap.dst_y.step) * shape.row_dst + tap.dst_x.start + j * tap.dst_x.step
                src = (tap.src_y.start + i * tap.src_y.step) * shape.row_src + tap.src_x.start + j * tap.src_x.step
                found.update((dst + d, src + s, tap.weight + w) for d, s, w in blocks)
    return found


def shape_of(
    taps: tuple[Tap, ...], size: tuple[int, int], out: int, *, outputs: int, inputs: int, batches: int
) -> GemmShape:
    area, source, kernel = out * 40, size[0] * size[1], 1 + max(tap.weight for tap in taps)
    return GemmShape(
        taps,
        40,
        size[1],
        Axis("n", batches, outputs * area, inputs * source, 0),
        Axis("co", outputs, area, 0, inputs * kernel),
        Axis("ci", inputs, 0, source, kernel),
        "co",
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([(1, 0), (3, 1), (3, 0), (5, 2)]), st.integers(1, 3),
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 2),
)  # fmt: skip
def test_it_computes_what_the_taps_mean(
    height: int, width: int, kernel: tuple[int, int], stride: int, outputs: int, inputs: int, batches: int
) -> None:
    taps = conv_taps(height, width, kernel[0], stride, kernel[1])
    if height + 2 * kernel[1] < kernel[0] or width + 2 * kernel[1] < kernel[0]:
        return
    out = (height + 2 * kernel[1] - kernel[0]) // stride + 1
    shape = shape_of(taps, (height, width), out, outputs=outputs, inputs=inputs, batches=batches)
    bodies = column_bodies(shape)
    if outputs * batches < 3:
        assert not bodies
        return
    assert all(keeps_apart(body) for body in bodies)
    assert all(len(body.loops) <= 2 for body in bodies)
    assert Counter(map(tuple, expand(list(bodies)).tolist())) == wanted(shape)


@pytest.mark.parametrize(("inputs", "longest"), [(1, 4), (2, 8)])
def test_sequences_do_not_grow_with_the_width(inputs: int, longest: int) -> None:
    taps = conv_taps(6, 30, 3, 1, 1)
    bodies = column_bodies(shape_of(taps, (6, 30), 6, outputs=4, inputs=inputs, batches=1))
    assert max(len(body.uops) for body in bodies) == longest
    assert len(bodies) == 9


def test_transposed_taps_are_phases() -> None:
    """Stride 2: each phase of rows and columns is a class of its own with its own taps."""
    taps = tuple(
        Tap(Span(r, 2, 4), Span(s, 2, 4), Span(0, 1, 4), Span(0, 1, 4), 2 * r + s) for r in range(2) for s in range(2)
    )
    shape = shape_of(taps, (4, 4), 8, outputs=3, inputs=1, batches=1)
    bodies = column_bodies(shape)
    assert len(bodies) == 4
    assert all(keeps_apart(body) for body in bodies)
    assert Counter(map(tuple, expand(list(bodies)).tolist())) == wanted(shape)
