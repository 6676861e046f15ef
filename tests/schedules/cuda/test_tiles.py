"""The choice of tiles: always one that fits, and sensible at the extremes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry, Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.cuda.tiles import candidates, choose_tile, fits


def _geometry(batch: int, channels: int, size: int, out_channels: int, kernel: int, block: int = 32) -> ConvGeometry:
    return ConvGeometry(
        batch=batch, in_blocks=-(-channels // block), in_block=block, in_size=(size, size), out_size=(size, size),
        in_dtype="uint8", out_dtype="uint8", out_blocks=-(-out_channels // 32), kernel=(kernel, kernel), strides=(1, 1),
        dilation=(1, 1), pads=(kernel // 2,) * 4, reduce_blocks=-(-channels // block), group=None, has_residual=False,
        weight_bits=8, tile=Tile(16, 32, 1, 1),
    )  # fmt: skip


LAYERS = {
    "colours": _geometry(1, 3, 224, 64, 7, 4),
    "wide": _geometry(64, 256, 28, 256, 3),
    "deep and small": _geometry(1, 512, 7, 512, 3),
    "one block": _geometry(1, 8, 4, 8, 1, 8),
    "dense": _geometry(8, 2048, 1, 1000, 1),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LAYERS)
def test_candidates_fit(name: str, arch: str) -> None:
    isa = ARCHITECTURES[arch]
    tiles = list(candidates(LAYERS[name], isa))
    assert tiles
    assert choose_tile(LAYERS[name], isa) in tiles
    for tile in tiles:
        g = replace(LAYERS[name], tile=tile)
        assert tile.stages * g.stage_bytes <= isa.shared_bytes
        assert tile.m_tiles > 0
        assert tile.n_blocks > 0
        assert tile.rows % (tile.warps_m * 16) == 0
        # Threads fetch whole pixels, the same number each.
        units = KSTEP // g.chunk
        assert tile.rows % min(tile.rows, tile.threads // units) == 0
        assert g.packed_ksteps >= g.ksteps
        assert (tile.splits - 1) * g.iterations * tile.ksteps < g.ksteps


def test_little_work_is_shared_by_many_blocks() -> None:
    isa = ARCHITECTURES["sm_90"]
    small = replace(LAYERS["deep and small"], tile=choose_tile(LAYERS["deep and small"], isa))
    blocks = small.row_tiles * small.column_tiles * small.tile.splits
    assert blocks >= 64
    # Where there are not two blocks per multiprocessor, several warps share each one's k-steps.
    assert blocks * small.tile.threads // 32 >= isa.multiprocessors


def test_few_pixels_are_not_padded_to_large_tiles() -> None:
    for arch in ("sm_80", "sm_86", "sm_90"):
        tile = choose_tile(LAYERS["dense"], ARCHITECTURES[arch])
        assert tile.rows == 16


def test_large_tiles_have_large_warps() -> None:
    """Shared memory serves 128 bytes per cycle: warps of 64 x 64 read the fewest per product."""
    for arch in ("sm_80", "sm_90"):
        tile = choose_tile(LAYERS["wide"], ARCHITECTURES[arch])
        assert tile.m_tiles * tile.n_blocks == 8


def test_much_work_takes_large_tiles() -> None:
    tile = choose_tile(LAYERS["wide"], ARCHITECTURES["sm_80"])
    assert tile.rows * tile.columns >= 128 * 64
    assert tile.splits == 1


def test_parts_stay_within_indices_of_32_bits() -> None:
    isa, tile = ARCHITECTURES["sm_80"], Tile(64, 64, 2, 2, 2, 3, splits=4)
    assert fits(_geometry(64, 256, 28, 256, 3), tile, isa)
    # Four times 2**29 outputs.
    assert not fits(_geometry(512, 256, 64, 256, 3), tile, isa)
    assert fits(_geometry(512, 256, 64, 256, 3), replace(tile, splits=3), isa)
