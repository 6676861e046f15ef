"""How many output pixels and channel blocks a float microkernel keeps in vector registers."""

from __future__ import annotations

from dataclasses import dataclass

from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import LANES

L1_BYTES = 32 * 1024

TALLEST, WIDEST, MOST_BLOCKS = 8, 28, 8
"""Most rows, columns and channel blocks of a tile."""


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` output pixels of `blocks` channel blocks: that many accumulators of 16 lanes."""

    rows: int
    columns: int
    blocks: int


def choose_tile(
    height: int,
    width: int,
    channel_blocks: int,
    reduction: int,
    isa: Isa,
    overhang_copies: bool = False,
    phases: int = 1,
) -> Tile:
    """The tile with the least estimated cycles.

    One step of the reduction costs the most of: its multiply-adds at two a cycle, its loads (weights and broadcast
    pixels) at two a cycle, the latency of dependent multiply-adds, and the weights' way from L2 where they do not stay
    in L1. Tiles that overhang the image pay for the pixels they waste.

    Parameters
    ----------
    height, width : int
        Output pixels.
    channel_blocks : int
        Blocks of 16 output channels that may be tiled together.
    reduction : int
        Steps: input channels of a group x kernel positions.
    isa : Isa
        Vector width and number of registers.
    overhang_copies : bool
        Whether a tile that overhangs the image makes a padded copy of the input necessary (else there is one anyway).
    phases : int
        Weight vectors per block and step: a strided transposed convolution computes so many outputs of each input pixel
        together.
    """
    problem = (height, width, reduction, isa, overhang_copies, phases)
    tiles = [
        Tile(rows, columns, blocks)
        for blocks in range(1, min(MOST_BLOCKS, channel_blocks) + 1)
        if channel_blocks % blocks == 0
        for rows in range(1, min(TALLEST, height) + 1)
        for columns in range(1, min(WIDEST, width) + 1)
        if fits(Tile(rows, columns, blocks), isa, phases)
    ]
    return min(tiles, key=lambda tile: estimate(tile, *problem), default=Tile(1, 1, 1))


def fits(tile: Tile, isa: Isa, phases: int = 1) -> bool:
    """Whether accumulators, weights of one step and one broadcast pixel stay in registers."""
    parts = max(1, LANES // isa.float_lanes)
    return (tile.rows * tile.columns + 1) * tile.blocks * phases * parts + 1 <= isa.registers


def estimate(
    tile: Tile, height: int, width: int, reduction: int, isa: Isa, overhang_copies: bool = False, phases: int = 1
) -> float:
    """Cycles of a reduction step per useful pixel and channel block; see `choose_tile`."""
    pixels, parts = tile.rows * tile.columns, max(1, LANES // isa.float_lanes)
    cost = _cycles(pixels, tile.blocks, parts * phases, reduction)
    covered = -(-height // tile.rows) * tile.rows * -(-width // tile.columns) * tile.columns
    # Ties: wide tiles, because their pixels are neighbours in memory.
    cost = cost * covered / (pixels * height * width) * (1 + 0.01 * (tile.rows - 1))
    return cost * 1.15 if overhang_copies and covered > height * width else cost


def _cycles(pixels: int, blocks: int, parts: int, reduction: int) -> float:
    """Cycles of one reduction step per channel block."""
    multiply_adds = pixels * blocks * parts / 2
    loads = pixels + blocks * parts
    latency = 4.0
    weights_stay = reduction * blocks * LANES * 4 <= L1_BYTES
    stream = 0.0 if weights_stay else blocks * LANES * 4 / 32
    # Tile start and end (zeroing, epilogue) over the reduction's length, and loads that do not overlap perfectly.
    overhead = 4.0 / max(1, reduction) * pixels * blocks * parts + 0.1 * loads + 0.2 * stream + 0.3
    return (max(multiply_adds, loads / 2, latency, stream) + overhead) / blocks
