"""The default tile of a convolution, chosen by reasoning: enough thread blocks for all multiprocessors, as little
hanging over the edges as possible, and copies that keep up with the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from lpsn_tvm.schedules.cuda.conv2d_dp4a import DOT_SHAPES
from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry, Tile
from lpsn_tvm.schedules.cuda.isa import BLOCK, CudaIsa

SHAPES = (
    (128, 128, 2, 4),
    (256, 64, 4, 2),
    (128, 64, 2, 2),
    (64, 128, 2, 4),
    (128, 32, 4, 1),
    (64, 64, 2, 2),
    (64, 32, 4, 1),
    (32, 64, 2, 2),
    (32, 32, 2, 1),
    (16, 64, 1, 2),
    (16, 32, 1, 1),
)
"""Rows, columns, warps along both."""
KSTEPS = (1, 2, 4)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


LATENCY, BARRIER = 500, 40
"""Cycles until a copy from global memory is there, and that a stage costs beside its work."""
PRODUCTS = {"sm_61": 512, "sm_70": 256, "sm_72": 256, "sm_80": 2048, "sm_90": 2600}
"""8-bit products per cycle and multiprocessor from the data sheets; 1024 on the other parts. mma.sync reaches about
60 % of what sm_90 can do.
"""


def choose_tile(geometry: ConvGeometry, isa: CudaIsa) -> Tile:
    """The tile of least estimated time."""
    return min(candidates(geometry, isa), key=lambda tile: estimate(replace(geometry, tile=tile), isa))


def candidates(geometry: ConvGeometry, isa: CudaIsa) -> Iterator[Tile]:
    """Tiles that fit: threads fetch whole rows, stages fit shared memory, groups share a tile only where they must."""
    units = KSTEP // geometry.chunk
    for rows, columns, warps_m, warps_n in SHAPES if isa.has_mma_s8 else DOT_SHAPES:
        is_mixed = geometry.group is not None and columns > BLOCK and geometry.group[0] % columns != 0
        # Where taps share a k-step, a thread remembers too many pixels for large tiles.
        is_crowded = geometry.in_block < KSTEP and rows * columns > 64 * 128
        if columns > max(BLOCK, geometry.out_blocks * BLOCK) or is_mixed or is_crowded:
            continue
        for ksteps in KSTEPS if isa.has_cp_async else KSTEPS[:2]:
            tile = Tile(rows, columns, warps_m, warps_n, ksteps, stages=4 if isa.has_cp_async else 2)
            if ksteps > geometry.ksteps or (tile.threads // units > rows and geometry.in_block < KSTEP):
                continue
            if tile.stages * replace(geometry, tile=tile).stage_bytes > isa.shared_bytes:
                continue
            for splits in SPLITS if geometry.interleave is None else SPLITS[:1]:
                per_part = -(-geometry.ksteps // (ksteps * splits)) * ksteps
                # Every part has something to do, and not too little.
                if splits == 1 or (per_part >= 4 * ksteps and per_part * (splits - 1) < geometry.ksteps):
                    yield replace(tile, splits=splits)


def estimate(geometry: ConvGeometry, isa: CudaIsa) -> float:
    """Cycles, roughly: rounds of resident thread blocks, each bound by tensor cores, shared memory or latency."""
    g, tile = geometry, geometry.tile
    per_block = _cycles_per_stage(g, isa) * g.iterations
    # Filling the pipeline, addresses, and the epilogue.
    overhead = 1200 + tile.rows * tile.columns / 32
    blocks = g.row_tiles * g.column_tiles * tile.splits
    resident = _resident(g, isa)
    concurrent = min(resident, ceil(blocks / isa.multiprocessors))
    # Blocks that share a multiprocessor share its units but hide each other's latency.
    latency = LATENCY / concurrent / max(1, tile.stages - 1) * g.iterations
    rounds = ceil(blocks / (isa.multiprocessors * concurrent))
    time = rounds * (max(per_block * concurrent, per_block + latency) + overhead)
    if tile.splits > 1:
        out_bytes = g.pixels * g.out_blocks * BLOCK * 4
        time += 3000 + 2 * tile.splits * out_bytes / (isa.multiprocessors * 16)
    return time


def _cycles_per_stage(g: ConvGeometry, isa: CudaIsa) -> float:
    tile = g.tile
    rate = PRODUCTS.get(isa.arch, 1024) * (2 if g.multiplies_nibbles else 1)
    products = tile.rows * tile.columns * KSTEP * tile.ksteps / rate
    fragments = tile.ksteps * KSTEP * (tile.rows * tile.warps_n + tile.columns * tile.warps_m) / 128
    copies = g.stage_bytes / (64 if isa.arch in PRODUCTS else 32)
    return max(products, fragments, copies) + 0.3 * min(products, copies) + BARRIER / 2


def _resident(g: ConvGeometry, isa: CudaIsa) -> int:
    """Thread blocks that fit a multiprocessor."""
    tile = g.tile
    registers = (tile.m_tiles * tile.n_blocks * 16 + tile.m_tiles * 4 + tile.n_blocks * 8 + 50) * tile.threads
    by_memory = isa.shared_bytes_total // (tile.stages * g.stage_bytes + 1024)
    by_registers = isa.max_registers // registers
    return max(1, min(by_memory, by_registers, (1536 if isa.number in (86, 89) else 2048) // tile.threads))
