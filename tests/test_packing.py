"""Sub-byte packing loses nothing and takes the bits it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpsn_tvm.packing import bits_needed, common_shift, pack, unpack


@given(bits=st.integers(1, 8), size=st.integers(0, 70), signed=st.booleans(), seed=st.integers(0, 99))
def test_round_trip(bits: int, size: int, signed: bool, seed: int) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    array = np.random.default_rng(seed).integers(low, high, size).astype(np.int8 if signed else np.uint8)
    width = bits_needed(array)
    data = pack(array, width)
    assert width <= bits or size == 0
    assert len(data) == -(-size * width // 8)
    assert np.array_equal(unpack(data, array.shape, str(array.dtype), width), array)


@pytest.mark.parametrize(
    ("values", "bits"),
    [([-8, 7], 4), ([-9], 5), ([0], 1), ([-1], 1), ([-128], 8), ([127], 8), ([1], 2), ([-2, 1], 2)],
    ids=str,
)
def test_signed_width(values: list[int], bits: int) -> None:
    assert bits_needed(np.array(values, np.int8)) == bits


@pytest.mark.parametrize(
    ("values", "shift"), [([-16, 8], 3), ([0], 0), ([-128], 7), ([3, 4], 0), ([64, -64, 0], 6)], ids=str
)
def test_common_shift(values: list[int], shift: int) -> None:
    array = np.array(values, np.int8)
    assert common_shift(array) == shift
    assert np.array_equal((array >> shift) << shift, array)


def test_lowest_bits_come_first() -> None:
    assert pack(np.array([1, 2, 3, 0], np.uint8), 2) == bytes([0b00_11_10_01])
