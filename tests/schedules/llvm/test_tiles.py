"""Register tiles fit the registers and do not waste much of the map."""

import pytest

from lpsn_tvm.schedules.llvm.isa import AVX2, AVX512_VNNI
from lpsn_tvm.schedules.llvm.tiles import choose_tile


@pytest.mark.parametrize("isa", [AVX512_VNNI, AVX2], ids=lambda isa: isa.name)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (7, 7), (13, 13), (1, 49), (56, 56), (1, 3136), (53, 59)])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 16, 63])
def test_tile_fits(isa, size, blocks):
    tile = choose_tile(isa, *size, blocks)
    per_block = 64 // isa.vector_bytes
    assert blocks % tile.blocks == 0
    assert tile.rows <= size[0] and tile.columns <= size[1]
    assert tile.pixels * tile.blocks * per_block < isa.registers


@pytest.mark.parametrize("width", [7, 11, 13, 14, 17, 23, 28, 53, 56, 112])
def test_overlap_is_small_on_odd_widths(width):
    tile = choose_tile(AVX512_VNNI, width, width, 4)
    computed = -(-width // tile.columns) * tile.columns * -(-width // tile.rows) * tile.rows
    assert computed / width**2 < 1.2
