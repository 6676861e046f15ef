"""Runs of tiles along one axis against the relation of pixels, written out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.targets.vta.taps import AxisTap, Side, Window, axis_taps


def pairs(window: Window, source: Side, result: Side) -> list[tuple[int, int, int]]:
    """(result pixel, kernel position, source pixel) of everything that is summed."""
    found = []
    for out in range(result.pixels):
        for r in range(window.kernel):
            if window.is_transposed:
                inside, rest = divmod(out + window.padding - r * window.dilation, window.stride)
            else:
                inside, rest = out * window.stride - window.padding + r * window.dilation, 0
            if rest == 0 and 0 <= inside < source.pixels:
                found.append((out, r, inside))
    return sorted(found)


def visited(taps: tuple[AxisTap, ...], source: Side, result: Side) -> list[tuple[int, int, int]]:
    """The same of the runs; lanes outside the image hold zeros or are nobody's."""
    found = []
    for tap in taps:
        assert tap.dst.count == tap.src.count > 0
        for i in range(tap.dst.count):
            dst, src = tap.dst.start + i * tap.dst.step, tap.src.start + i * tap.src.step
            assert 0 <= dst < result.tiles and 0 <= src < source.tiles
            for (e, d), r in tap.positions:
                out, inside = dst * result.step + e, src * source.step + d
                if out < result.pixels and 0 <= inside < source.pixels:
                    found.append((out, r, inside))
                elif out < result.pixels:
                    assert source.is_zero_outside
    return sorted(found)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_every_product_once(data: st.DataObject) -> None:
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    window = Window(integer(1, 5), integer(1, 3), integer(0, 3), integer(1, 2), data.draw(st.booleans()))
    in_step, out_step = integer(1, 3), integer(1, 2)
    source = Side(0, 0, in_step, tuple(range(in_step)))
    tiles = integer(1, 6)
    source = Side(tiles * in_step, tiles, in_step, tuple(range(in_step)))
    out_tiles = integer(1, 6)
    result = Side(out_tiles * out_step, out_tiles, out_step, tuple(range(out_step)))
    taps = axis_taps(window, source, result)
    assert taps is not None
    assert visited(taps, source, result) == pairs(window, source, result)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_overlapping_windows_that_the_host_packs(data: st.DataObject) -> None:
    """Tile t holds `size` pixels from t * stride - padding on: every product once, from few tiles."""
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    stride, padding = integer(1, 3), integer(0, 3)
    kernel = integer(stride, 7)
    size, outputs = integer(stride, kernel), integer(1, 6)
    pixels = max(1, (outputs - 1) * stride + kernel - 2 * padding)
    tiles = outputs + -(-(kernel - size) // stride)
    source = Side(pixels, tiles, stride, tuple(range(-padding, size - padding)), is_zero_outside=True)
    window, result = Window(kernel, stride, padding), Side(outputs, outputs)
    taps = axis_taps(window, source, result)
    assert taps is not None
    assert visited(taps, source, result) == pairs(window, source, result)
    assert len(taps) <= -(-(kernel - size) // stride) + 1


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_any_form_gives_all_or_nothing(data: st.DataObject) -> None:
    """Missing pixels, missing tiles, overlaps, lanes that point outside: every product once, or None."""
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    window = Window(integer(1, 4), integer(1, 2), integer(0, 2), 1, data.draw(st.booleans()))
    offsets = tuple(sorted(data.draw(st.sets(st.integers(-2, 3), min_size=1, max_size=5))))
    source = Side(integer(1, 6), integer(1, 6), integer(1, 2), offsets, data.draw(st.booleans()))
    result = Side(integer(1, 4), 4)
    taps = axis_taps(window, source, result)
    assert taps is None or visited(taps, source, result) == pairs(window, source, result)


def test_a_form_without_the_pixels_gives_nothing() -> None:
    """Every second pixel is missing."""
    assert axis_taps(Window(3, 1, 1), Side(8, 4, 2, (0,)), Side(8, 8)) is None


def test_packed_by_the_stride() -> None:
    """The worked example: kernel 3, stride 2, packed by 2."""
    own, following = axis_taps(Window(3, 2), Side(8, 4, 2, (0, 1)), Side(3, 3)) or ()
    assert dict(own.positions) == {(0, 0): 0, (0, 1): 1}
    assert dict(following.positions) == {(0, 0): 2}
    assert (following.dst.start, following.src.start, following.dst.count) == (0, 1, 3)
