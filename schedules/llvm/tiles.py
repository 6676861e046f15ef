"""Register tiles for convolution-like kernels by an analytic rule, no tuning."""

from __future__ import annotations

from dataclasses import dataclass

from lpsn_tvm.schedules.llvm.isa import Isa

LATENCY = 5
"""Cycles until an accumulator may be used again (vpdpbusd, vpmaddwd + vpaddd)."""

TALLEST, WIDEST = 8, 28
"""Most rows and columns of a tile."""


@dataclass(frozen=True)
class Tile:
    """Pixels (rows x columns) times blocks of 16 output channels that one register tile holds."""

    rows: int
    columns: int
    blocks: int

    @property
    def pixels(self) -> int:
        """Output pixels of the tile."""
        return self.rows * self.columns


def choose_tile(isa: Isa, height: int, width: int, blocks: int, *, max_blocks: int = 16) -> Tile:
    """The tile of least estimated cycles among those whose accumulators, weights and one broadcast fit the registers.

    Parameters
    ----------
    isa : Isa
        Registers and vector width.
    height, width : int
        Output map.
    blocks : int
        Output channel blocks; the tile's blocks divide it.
    max_blocks : int
        Most blocks in a tile.
    """
    best: tuple[float, int, int] | None = None
    tile = Tile(1, 1, 1)
    for ocb in (b for b in range(1, min(blocks, max_blocks) + 1) if blocks % b == 0):
        for columns in range(1, min(width, WIDEST) + 1):
            for rows in range(1, 1 + (min(height, TALLEST) if columns == width and columns < 8 else 1)):
                candidate = Tile(rows, columns, ocb)
                if not fits(isa, candidate):
                    break
                # Among equals: fewer, larger tiles in pixels (weights are streamed once per tile).
                rank = (estimate(isa, height, width, blocks, candidate), -candidate.pixels, -ocb)
                if best is None or rank < best:
                    best, tile = rank, candidate
    return tile


def fits(isa: Isa, tile: Tile) -> bool:
    """Whether accumulators, weights and one broadcast stay in registers."""
    return registers(isa, tile) <= isa.registers - 1


def registers(isa: Isa, tile: Tile) -> int:
    """Vector registers that a tile wants."""
    return (tile.pixels * tile.blocks + min(tile.blocks, 4)) * max(1, 64 // isa.vector_bytes) + 1


def estimate(isa: Isa, height: int, width: int, blocks: int, tile: Tile) -> float:
    """Cycles of one reduction step of the whole map.

    A step of a tile issues pixels x blocks products (two per cycle), pixels broadcasts and `blocks` weight loads (two
    per cycle), and takes at least one latency. Partial tiles are computed in full (the last tile overlaps its
    neighbour), so their waste counts.
    """
    per_block = max(1, 64 // isa.vector_bytes)
    tiles = -(-height // tile.rows) * -(-width // tile.columns) * (blocks // tile.blocks)
    products, loads = tile.pixels * tile.blocks * per_block, tile.pixels + tile.blocks * per_block
    return tiles * max(products / 2, loads / 2 + products / 8, float(LATENCY))
