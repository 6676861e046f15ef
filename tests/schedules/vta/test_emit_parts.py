"""The parts of the emitter: transfers, slots, loop nests, ranges, moved pooling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_tile_ops import conv_op

from lpsn_tvm.schedules.vta.nest import Body, flat_bodies, keeps_apart
from lpsn_tvm.schedules.vta.ops import Pool, Scalar, Span, Store, Tap, Vector
from lpsn_tvm.schedules.vta.pooling import affine_runs, pool_early, windows
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.schedules.vta.slots import SlotPool, Transfer, transfers
from lpsn_tvm.schedules.vta.tiling import Range, clip_taps, local_taps, tiles, window


def test_contiguous_axes_are_one_row() -> None:
    assert list(transfers(5, [(4, 196), (14, 14)], 14)) == [Transfer(0, 5, 1, 784, 784)]


def test_a_gap_makes_rows_and_two_gaps_make_transfers() -> None:
    assert list(transfers(0, [(3, 100)], 10)) == [Transfer(0, 0, 3, 10, 100)]
    assert list(transfers(0, [(2, 1000), (3, 100)], 10)) == [Transfer(0, 0, 3, 10, 100), Transfer(30, 1000, 3, 10, 100)]


def test_strides_beyond_the_field_become_transfers() -> None:
    assert list(transfers(0, [(2, 70000)], 10)) == [Transfer(0, 0, 1, 10, 10), Transfer(10, 70000, 1, 10, 10)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 4), min_size=3, max_size=3), gaps=st.lists(st.integers(0, 3), min_size=3, max_size=3)
)
def test_transfers_bring_every_tile_in_order(counts: list[int], gaps: list[int]) -> None:
    run, axes, reach = 3, [], 3
    for count, gap in zip(counts, gaps, strict=True):
        axes.insert(0, (count, reach + gap))
        reach = (reach + gap) * count
    expected = np.arange(run)
    for count, stride in reversed(axes):
        expected = (np.arange(count)[:, None] * stride + expected[None]).reshape(-1)
    found = {}
    for move in transfers(7, axes, run):
        for row in range(move.rows):
            for column in range(move.columns):
                found[move.sram + row * move.columns + column] = move.dram + row * move.stride + column
    assert [found[i] for i in range(len(expected))] == list(7 + expected)


def test_contents_stay_while_they_are_needed() -> None:
    """Three slots: "a" is used again soonest, "b" never; "d" takes the place of "b"."""
    sequence = ["a", "b", "c", "d", "a", "c"]
    pool = SlotPool(100, 10, 3, sequence)
    assert [pool.place(key) for key in sequence] == [
        (100, True),
        (110, True),
        (120, True),
        (110, True),
        (100, False),
        (120, False),
    ]


def test_a_stream_alternates_between_two_slots() -> None:
    pool = SlotPool(0, 4, 2, "abcdef")
    assert [pool.place(key)[0] for key in "abcdef"] == [0, 4, 0, 4, 0, 4]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(dst=st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_flat_order_keeps_accumulators_apart(dst: list[int]) -> None:
    """Every micro-operation once, and none meets its accumulator too early."""
    operations = np.array([[d, i, i] for i, d in enumerate(dst)], np.int64)
    bodies = flat_bodies(operations)
    assert all(keeps_apart(body) for body in bodies)
    assert sorted(row[1] for body in bodies for row in body.uops) == list(range(len(dst)))


def test_recurrence_through_a_loop_is_noticed() -> None:
    two = np.array([[0, 0, 0], [1, 0, 0]], np.int64)
    assert keeps_apart(Body(two, ()))
    assert not keeps_apart(Body(two, ((2, 0, 1, 1),)))
    assert keeps_apart(Body(two, ((2, 0, 1, 1), (2, 2, 0, 0))))


def test_clipped_taps_and_their_window() -> None:
    """Rows 4..7 of a convolution of stride 2, padding 1: tap 0 reads rows 7, 9, 11, 13, tap 2 rows 9 ... 15."""
    taps = tuple(
        Tap(Span(first, 1, 16 - first), Span(0, 1, 1), Span(first * 2 + k - 1, 2, 16 - first), Span(0, 1, 1), k)
        for k, first in ((0, 1), (1, 0), (2, 0))
    )
    clipped = clip_taps(taps, Range(4, 8), Range(0, 1))
    assert [tap.src_y for tap in clipped] == [Span(7, 2, 4), Span(8, 2, 4), Span(9, 2, 4)]
    seen = window(clipped)
    assert (seen.row, seen.row_step, seen.rows) == (7, 1, 9)
    assert [tap.src_y.start for tap in local_taps(clipped, seen)] == [0, 1, 2]
    outer = window((clipped[0], clipped[2]))
    assert (outer.row, outer.row_step, outer.rows) == (7, 2, 5)


@pytest.mark.parametrize(("order", "axis"), [("oc", "oc"), ("oc", "h"), ("spatial", "oc"), ("spatial", "h")])
def test_tiles_cover_the_output_once_and_alternate(order: str, axis: str) -> None:
    op = conv_op(outputs=5, size=(7, 6))
    schedule = Schedule(tile_co=2, tile_h=3, tile_w=4, threads=2, order=order, thread_axis=axis)  # type: ignore[arg-type]
    seen = np.zeros((5, 7, 6), int)
    slots = []
    for tile, slot in tiles(op, schedule):
        rows, columns = tile.rows[-1], tile.columns[-1]
        seen[tile.o.start : tile.o.stop, rows.start : rows.stop, columns.start : columns.stop] += 1
        slots.append(slot)
    assert (seen == 1).all()
    assert slots == [i % 2 for i in range(len(slots))]


def test_pooling_moves_before_elementwise_steps_only() -> None:
    """A store in front of it stays in front."""
    pool = Pool((2, 2), (2, 2), (0, 0), 3, 3)
    op = conv_op(middle=(Vector("add", "b", 0), Scalar("max", 0), pool))
    gemm, *rest = pool_early(op).steps
    assert rest == [pool, Vector("add", "b", 0), Scalar("max", 0), op.steps[-1]]
    stored = op.__class__("op", 1, 1, 6, 6, (gemm, Scalar("max", 0), Store(op.steps[-1].plane), pool, op.steps[-1]))  # type: ignore[union-attr]
    assert pool_early(stored) == stored


def test_windows_at_the_border_are_shorter() -> None:
    found = windows(Range(0, 3), Range(0, 6), 3, 2, 1)
    assert found.first == (0, 1, 3)
    assert found.offsets == (((0, 1, 2), (1, 2, 4)), ((1, 2), (3, 5)))
    assert affine_runs((0, 1, 2), found.first) == [(0, 2, 1, 1), (2, 1, 0, 0)]
