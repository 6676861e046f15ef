"""Tiles in memory: packed as the hardware reads them, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.layout import (
    GatherLayout,
    Lane,
    TileLayout,
    image_shape,
    pack_integers,
    pack_weights,
    unpack_integers,
    vector_tiles,
)
from lpsn_tvm.targets.vta.serialize import from_record, to_record

FEW = settings(max_examples=40, deadline=None, derandomize=True)


def integers(seed: int, shape: tuple[int, ...], bits: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    return values.astype(np.int8 if bits <= 8 else np.int32)


@st.composite
def layouts(draw: st.DrawFn) -> TileLayout:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    bits = draw(st.sampled_from([2, 4, 8]))
    planes = draw(st.sampled_from([1, 1, 32 // bits, 2]))
    return TileLayout(shape, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([4, 8, 16])), bits, planes)


@FEW
@given(layouts(), st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(layout: TileLayout, seed: int) -> None:
    value = integers(seed, layout.shape, layout.bits * layout.planes)
    if layout.planes > 1:
        value = value.astype(np.int32)
    data = layout.pack(value)
    assert len(data) == layout.size == layout.tiles * layout.tile_bytes
    again = layout.unpack(data)
    assert again.dtype == (np.int8 if layout.planes == 1 else np.int32)
    np.testing.assert_array_equal(again, value)


@FEW
@given(layouts(), st.data())
def test_every_value_lies_where_the_specification_says(layout: TileLayout, data: st.DataObject) -> None:
    """[plane][n][block][y][x][BATCH][BLOCK], little-endian, lowest bits first."""
    n, c, height, width = layout.image
    at = tuple(data.draw(st.integers(0, extent - 1)) for extent in (n, c, height, width))
    value = np.zeros(layout.image, np.int32)
    value[at] = -1
    integer = int.from_bytes(layout.pack(value.reshape(layout.shape)), "little")
    tile = ((at[0] // layout.batch * layout.blocks + at[1] // layout.block) * height + at[2]) * width + at[3]
    lane = tile * layout.batch * layout.block + at[0] % layout.batch * layout.block + at[1] % layout.block
    lanes = layout.plane_tiles * layout.batch * layout.block
    expected = sum(((1 << layout.bits) - 1) << ((p * lanes + lane) * layout.bits) for p in range(layout.planes))
    assert integer == expected


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 33])
def test_integers_round_trip(bits: int, count: int) -> None:
    values = integers(count, (count,), bits)
    np.testing.assert_array_equal(unpack_integers(pack_integers(values, bits), count, bits), values)


def test_low_bits_come_first() -> None:
    assert pack_integers(np.array([1, -2, 7, -8]), 4) == bytes([0xE1, 0x87])


@FEW
@given(st.data())
def test_a_gather_reads_what_its_lanes_say(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 7)) for _ in range(4))
    offset = st.integers(-3, 3)
    lane = st.builds(Lane, st.integers(0, shape[1] - 1), offset, offset, st.sampled_from(["whole", "high", "low"]))
    lanes = tuple(data.draw(st.lists(st.none() | lane, min_size=1, max_size=9)))
    strides = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    layout = GatherLayout(shape, 1, 4, lanes, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), strides, 8, 4)
    value = integers(1, shape, 7)
    result = layout.gather(value)
    for index, chosen in enumerate(lanes):
        for y in range(layout.height):
            for x in range(layout.width):
                expected = _gathered(value, chosen, y * strides[0], x * strides[1])
                np.testing.assert_array_equal(result[:, index, y, x], expected)
    assert len(layout.pack(value)) == layout.size
    assert from_record(to_record(layout)) == layout


def _gathered(value: np.ndarray, lane: Lane | None, y: int, x: int) -> np.ndarray:
    if lane is None:
        return np.zeros(len(value))
    y, x = y + lane.dy, x + lane.dx
    if not (0 <= y < value.shape[2] and 0 <= x < value.shape[3]):
        return np.zeros(len(value))
    pixel = value[:, lane.channel, y, x].astype(int)
    low = (pixel + 8) % 16 - 8
    return {"whole": pixel, "low": low, "high": (pixel - low) // 16}[lane.part]


def test_seven_bit_numbers_fit_two_planes_of_four() -> None:
    lanes = (Lane(0, part="high"), Lane(0, part="low"))
    layout = GatherLayout((1, 1, 1, 128), 1, 16, lanes, 1, 128, bits=4, low_bits=4)
    value = np.arange(-64, 64, dtype=np.int8).reshape(1, 1, 1, 128)
    high, low = layout.gather(value)[0]
    np.testing.assert_array_equal(high.astype(int) * 16 + low, value[0, 0])
    assert (high.min(), high.max()) == (-4, 4)
    assert layout.pack(value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TileLayout((1, 4), 1, 16).pack(np.zeros((4, 1), np.int8)), "shape"),
        (lambda: TileLayout((1, 4), 1, 16, 4).pack(np.full((1, 4), 8, np.int8)), "4 bits"),
        (lambda: TileLayout((1, 4), 1, 16).unpack(b"123"), "3 bytes"),
        (lambda: image_shape((1, 2, 3, 4, 5)), "no tile layout"),
        (lambda: image_shape((0, 2)), "no tile layout"),
        (lambda: pack_weights(np.full((1, 2, 2), 8, np.int8), 4), "4 bits"),
    ],
    ids=["shape", "range", "short", "five", "empty", "weight"],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        call()  # type: ignore[operator]


def test_vectors_are_repeated_for_every_row_of_a_tile() -> None:
    tiles = vector_tiles(np.arange(1, 7, dtype=np.int32), 2, 4)
    assert tiles.tolist() == [[[1, 2, 3, 4]] * 2, [[5, 6, 0, 0]] * 2]
