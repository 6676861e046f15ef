"""Tiles of a convolution: which there are, and the default, chosen by reasoning over what a block does per stage and
how blocks fill the multiprocessors. Numbers of instructions are read from machine code; nothing here is measured.

Blocks that follow each other share a tile of pixels and go through the channels: what runs at once reads few pixels and
all weights, which level 2 caches hold, so that no other order of blocks is offered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod

from lpsn_tvm.schedules.cuda.conv2d_dp4a import DOT_SHAPES
from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry, Tile
from lpsn_tvm.schedules.cuda.isa import BLOCK, WARP, CudaIsa

SHAPES = (
    (256, 128, 4, 2),
    (128, 256, 2, 4),
    (128, 128, 2, 2),
    (128, 128, 2, 4),
    (256, 64, 4, 1),
    (256, 64, 4, 2),
    (64, 256, 1, 4),
    (128, 64, 2, 1),
    (128, 64, 2, 2),
    (64, 128, 1, 2),
    (64, 128, 2, 4),
    (256, 32, 4, 1),
    (128, 32, 2, 1),
    (128, 32, 4, 1),
    (64, 64, 2, 1),
    (64, 64, 2, 2),
    (32, 128, 1, 4),
    (64, 32, 2, 1),
    (64, 32, 4, 1),
    (32, 64, 1, 2),
    (32, 64, 2, 2),
    (16, 128, 1, 4),
    (32, 32, 2, 1),
    (16, 64, 1, 2),
    (32, 32, 1, 1),
    (16, 32, 1, 1),
)
"""Rows, columns, warps along both."""
KSTEPS = (1, 2, 4, 8)
STAGES = (4, 3, 6)
"""The first of equals is taken."""
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
SLICES = (1, 2, 4)
MOST_SLICED = 64 * 64
"""Rows x columns of the largest tile whose stages are shared by slices."""
MOST_REGISTERS = 250


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor does per cycle, from data sheets.

    Parameters
    ----------
    products : int
        8-bit products of `mma.sync` (or of dp4a).
    copies : int
        Bytes from level 2 caches.
    memory : float
        Bytes from device memory, when all multiprocessors ask for them.
    launch : int
        Cycles that one more kernel costs inside a CUDA graph.
    """

    products: int = 1024
    copies: int = 32
    memory: float = 5.0
    launch: int = 4000


RATES = {
    "sm_61": Rates(512, 32, 6.0),
    "sm_70": Rates(256, 32, 8.0),
    "sm_72": Rates(256, 32, 12.0),
    "sm_80": Rates(2048, 64, 10.0),
    # mma.sync reaches about 62 % of the data sheet's 4096.
    "sm_90": Rates(2540, 64, 15.0),
    "sm_100": Rates(2540, 64, 25.0),
}
LATENCY, BARRIER, FILL = 800, 60, 1500
"""Cycles until a copy from global memory is there, that a stage waits for its slowest warp, and until a block has its
first stage.
"""


@cache
def choose_tile(geometry: ConvGeometry, isa: CudaIsa) -> Tile:
    """The tile of least estimated time; networks repeat their layers."""
    return min(candidates(geometry, isa), key=lambda tile: estimate(replace(geometry, tile=tile), isa))


def shapes(geometry: ConvGeometry, isa: CudaIsa) -> list[tuple[int, int, int, int]]:
    """Shapes with no more columns than the layer needs; groups share a tile only where they must."""
    found = []
    for shape in SHAPES if isa.has_mma_s8 else DOT_SHAPES:
        columns = shape[1]
        is_mixed = geometry.group is not None and columns > BLOCK and geometry.group[0] % columns != 0
        if columns <= max(BLOCK, geometry.out_blocks * BLOCK) and not is_mixed:
            found.append(shape)
    return found


def candidates(geometry: ConvGeometry, isa: CudaIsa) -> Iterator[Tile]:
    """Tiles among which the default is chosen."""
    for shape in shapes(geometry, isa):
        for ksteps in KSTEPS if isa.has_cp_async else KSTEPS[:2]:
            for stages in STAGES if isa.has_cp_async else (2,):
                for slices in SLICES if isa.has_cp_async else SLICES[:1]:
                    tile = Tile(*shape, ksteps, stages, 1, slices)
                    if not fits(geometry, tile, isa):
                        continue
                    yield tile
                    g = replace(geometry, tile=tile)
                    blocks = g.row_tiles * g.column_tiles
                    # Parts cost a launch: only where there are not enough blocks.
                    for splits in SPLITS[1:] if blocks < isa.multiprocessors else ():
                        if fits(geometry, replace(tile, splits=splits), isa):
                            yield replace(tile, splits=splits)


def fits(geometry: ConvGeometry, tile: Tile, isa: CudaIsa) -> bool:
    """Whether a tile works and is not absurd: threads fetch whole rows, slices get equal shares, stages fit shared
    memory and sums fit registers, parts have enough to do.
    """
    g = replace(geometry, tile=tile)
    units = KSTEP // g.chunk
    if tile.ksteps > g.ksteps or (tile.threads // units > tile.rows and g.in_block < KSTEP):
        return False
    if tile.slices > 1 and not isa.has_cp_async:
        return False
    if tile.slices > 1 and (tile.ksteps % tile.slices or tile.rows * tile.columns > MOST_SLICED or tile.threads > 512):
        return False
    if g.multiplies_nibbles and tile.ksteps // tile.slices % 2:
        return False
    is_unpacked = g.weight_bits == 4 and not g.multiplies_nibbles
    if is_unpacked and tile.m_tiles >= 4 and tile.ksteps // tile.slices > 4:
        # Read from machine code: unpacking so many k-steps ahead spills.
        return False
    # Without asynchronous copies a stage waits in registers.
    held = 0 if isa.has_cp_async else ceil(g.stage_bytes / 4 / tile.threads)
    most = min(MOST_REGISTERS, isa.max_registers // tile.threads)
    if g.memory_bytes > isa.shared_bytes or registers(g) + held > most:
        return False
    if tile.splits == 1:
        return True
    if tile.splits * prod(g.out_shape) >= 2**31:
        # Parts are written with indices of 32 bits.
        return False
    per_part = g.iterations * tile.ksteps
    is_divisible = g.interleave is None and per_part * (tile.splits - 1) < g.ksteps
    return is_divisible and per_part >= max(4 * tile.ksteps, 8)


def registers(g: ConvGeometry) -> int:
    """Registers of a thread, roughly: sums, two sets of fragments, and what copies remember of each pixel."""
    tile = g.tile
    fragments = tile.m_tiles * 4 * (2 if g.multiplies_nibbles else 1) + tile.n_blocks * 8
    steps = tile.ksteps // tile.slices // (2 if g.multiplies_nibbles else 1)
    pixels = ceil(tile.rows * (KSTEP // g.chunk) / tile.threads)
    return tile.m_tiles * tile.n_blocks * 16 + fragments * min(2, steps) + 32 + 3 * pixels


def resident(g: ConvGeometry, isa: CudaIsa) -> int:
    """Thread blocks that fit a multiprocessor."""
    tile = g.tile
    by_memory = isa.shared_bytes_total // (g.memory_bytes + 1024)
    by_registers = isa.max_registers // (ceil(registers(g) / 8) * 8 * tile.threads)
    most_threads = {75: 1024, 86: 1536, 87: 1536, 89: 1536, 120: 1536}.get(isa.number, 2048)
    return max(1, min(by_memory, by_registers, most_threads // tile.threads))


def estimate(geometry: ConvGeometry, isa: CudaIsa) -> float:
    """Cycles, roughly: what the busiest multiprocessor does, and no less than device memory takes."""
    g, tile, rates = geometry, geometry.tile, RATES.get(isa.arch, Rates())
    blocks = g.row_tiles * g.column_tiles * tile.splits
    busiest = ceil(blocks / isa.multiprocessors)
    concurrent = min(resident(g, isa), busiest)
    rounds, rest = divmod(busiest, concurrent)
    time = rounds * _round(g, isa, concurrent) + (_round(g, isa, rest) if rest else 0.0) + FILL
    out_bytes = prod(g.written_shape) * (4 if g.out_dtype == "float32" else 1)
    moved = prod(g.in_shape) + prod(g.weight_shape) + out_bytes * (2 if g.has_residual else 1)
    memory = moved / (rates.memory * isa.multiprocessors)
    time = max(time, memory) + 0.2 * min(time, memory)
    if tile.splits > 1:
        sums = g.pixels * g.out_blocks * BLOCK * 4
        time += rates.launch + 2 * tile.splits * sums / (isa.multiprocessors * rates.copies / 2)
    return time


def _round(g: ConvGeometry, isa: CudaIsa, concurrent: int) -> float:
    """Cycles of `concurrent` blocks that share a multiprocessor: its units take turns with them, while each on its own
    waits for memory, for barriers and for its own instructions.
    """
    tile, warps = g.tile, g.tile.threads // WARP
    outputs = tile.rows * tile.columns
    finish = outputs * ((12 if g.has_residual else 7) + (3 if g.has_table else 0)) / (4 * WARP)
    added = tile.slices * outputs * 8 / 128 + 2 * BARRIER if tile.slices > 1 else 0.0
    idle = _idle(warps * concurrent)
    busy = _stage(g, isa, idle, idle)
    together = concurrent * (g.iterations * (busy + BARRIER / concurrent) + finish * idle + added)
    # A warp by itself issues about every other cycle.
    idle = _idle(warps)
    busy = _stage(g, isa, idle, 2 * idle)
    waiting = max(busy + BARRIER, LATENCY / max(1, tile.stages - 1))
    return max(together, FILL + g.iterations * waiting + finish * 2 * idle + added)


def _idle(warps: int) -> float:
    """How much longer work takes because the schedulers' shares are uneven: warps are dealt out to four of them."""
    return ceil(warps / 4) * 4 / warps


def _stage(g: ConvGeometry, isa: CudaIsa, products: float, instructions: float) -> float:
    """Cycles of a stage whose products and instructions take so many times longer than `stage_cycles` says."""
    units = stage_cycles(g, isa)
    units["products"] *= products
    units["instructions"] *= instructions
    most = max(units.values())
    return most + 0.15 * (sum(units.values()) - most)


def stage_cycles(g: ConvGeometry, isa: CudaIsa) -> dict[str, float]:
    """Cycles of a multiprocessor that one block's stage takes of each unit: matrix products, instructions of four
    schedulers, shared memory, and copies from level 2 caches.
    """
    tile, rates = g.tile, RATES.get(isa.arch, Rates())
    warps, units = tile.threads // WARP, KSTEP // g.chunk
    products = tile.rows * tile.columns * KSTEP * tile.ksteps / (rates.products * (2 if g.multiplies_nibbles else 1))
    weight_bytes = tile.columns // BLOCK * g.kstep_bytes
    read = tile.rows * KSTEP * tile.warps_n + weight_bytes * tile.warps_m
    shared = (tile.ksteps * read + g.stage_bytes) / 128
    # Instructions of a warp: per k-step of its own, per copy, per position in the filter, per stage.
    unpacked = 12 * tile.n_blocks if g.weight_bits == 4 and not g.multiplies_nibbles else 0
    matrix = tile.m_tiles * tile.n_blocks * (4 if isa.has_mma_s8_k32 else 16)
    own = tile.ksteps / tile.slices * (matrix + tile.m_tiles + 2 * tile.n_blocks + unpacked)
    passes = max(1.0, tile.ksteps * tile.rows * units / tile.threads)
    per_position = 12 if g.taps > 1 else 2
    positions = per_position * max(1.0, tile.ksteps * min(1.0, tile.rows * units / tile.threads))
    weights = tile.ksteps * weight_bytes / 16 / tile.threads
    instructions = own + passes * (6 if g.is_padded else 4) + positions + 3 * weights + 20
    return {
        "products": products,
        "instructions": warps * instructions / 4,
        "shared": shared,
        "copies": g.stage_bytes / rates.copies,
    }
