"""Packed weights against the documented fragment layout, element by element."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from lpsn_tvm.schedules.cuda.geometry import ConvGeometry, Tile, first_block, reduction
from lpsn_tvm.schedules.cuda.weights import nibble_shift, pack_weight

GEOMETRY = ConvGeometry(
    batch=1, in_blocks=2, in_block=32, in_size=(4, 4), out_size=(4, 4), in_dtype="uint8", out_dtype="uint8",
    out_blocks=2, kernel=(1, 2), strides=(1, 1), dilation=(1, 1), pads=(0, 0, 0, 1), reduce_blocks=2, group=None,
    has_residual=False, weight_bits=8, tile=Tile(32, 64, 1, 1, 2, 2),
)  # fmt: skip


def _expected(weight: np.ndarray, block: int, kstep: int, lane: int, register: int, byte: int) -> int:
    """Weight that PTX's fragment tables put into a byte of a register."""
    tile, half = divmod(register, 2)
    k, column = 16 * half + lane % 4 * 4 + byte, lane // 4
    channel = block * 32 + column // 2 * 8 + 2 * tile + column % 2
    c, tap = divmod(kstep, 2)
    return int(weight[channel, c * 32 + k, 0, tap])


@pytest.mark.parametrize("bits", [8, 4])
def test_fragments(bits: int) -> None:
    limit = 1 << bits - 1
    weight = np.random.default_rng(0).integers(-limit, limit, (64, 64, 1, 2)).astype(np.int8)
    packed = pack_weight(weight, replace(GEOMETRY, weight_bits=bits)).view(np.uint8)
    assert packed.shape == (2, 4, 1024 * bits // 8)
    for block in range(2):
        for kstep in range(4):
            for lane in (0, 1, 5, 18, 31):
                for register in range(8):
                    for byte in range(4):
                        if bits == 8:
                            at = register // 4 * 512 + lane * 16 + register % 4 * 4 + byte
                            value = int(packed[block, kstep, at].astype(np.int8))
                        else:
                            nibble = int(packed[block, kstep, lane * 16 + register // 2 * 4 + byte])
                            value = (nibble >> 4 * (register % 2)) & 15
                            value -= 16 * (value > 7)
                        assert value == _expected(weight, block, kstep, lane, register, byte)


def test_fragments_of_nibbles() -> None:
    """Registers as of bytes, for two k-steps at once: nibble 2b is byte b of the first, nibble 2b + 1 of the second.
    The inputs, packed in registers the same way, meet the right weights whatever the order is called.
    """
    weight = np.random.default_rng(0).integers(-8, 8, (64, 64, 1, 2)).astype(np.int8)
    geometry = replace(GEOMETRY, weight_bits=4, in_bits=4)
    assert geometry.multiplies_nibbles
    packed = pack_weight(weight, geometry)
    assert packed.shape == (2, 4, 512)
    pairs = packed.reshape(2, 2, 1024)
    for block, kstep, lane, register, byte in product(range(2), range(4), (0, 1, 5, 18, 31), range(8), range(4)):
        at = register // 4 * 512 + lane * 16 + register % 4 * 4 + byte
        value = int(pairs[block, kstep // 2, at]) >> 4 * (kstep % 2) & 15
        assert value - 16 * (value > 7) == _expected(weight, block, kstep, lane, register, byte)


def test_groups_read_their_blocks_only() -> None:
    blocks, group = reduction(128, 4, 32, 4, 32)
    assert (blocks, group) == (1, (32, 32))
    geometry = replace(GEOMETRY, in_blocks=4, out_blocks=4, reduce_blocks=1, group=group, tile=Tile(32, 32, 1, 1))
    assert [first_block(geometry, tile) for tile in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "shift"),
    [([-8, 7], 0), ([-128, 112], 4), ([2, 6], 1), ([0, 0], 0), ([8, 1], None), ([-128, 127], None)],
)
def test_four_bits_times_a_power_of_two(values: list[int], shift: int | None) -> None:
    weight = np.array(values, np.int8).reshape(1, 2, 1, 1)
    assert nibble_shift(weight) == shift


def test_sums_of_nibbles_must_fit() -> None:
    """Products are 16 times too large until the end."""
    assert nibble_shift(np.full((1, 65000, 1, 1), -8, np.int8)) == 3
    assert nibble_shift(np.tile(np.array([-8, 7], np.int8), 36000).reshape(1, -1, 1, 1)) is None
