"""The choices that float kernels with a register tile offer."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array
from lpsn_tvm.schedules.llvm.float_tiles import MOST_BLOCKS, TALLEST, WIDEST, Tile, estimate, fits
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import LANES
from lpsn_tvm.schedules.template import Config, Value

HOPELESS = 2.0
"""Tiles that the analytic estimate puts this far behind the default are not tried."""


class TileSpace:
    """Register tiles of a float kernel.

    Parameters
    ----------
    height, width : int
        Output pixels (of one phase).
    channel_blocks : int
        Blocks of output channels that may be tiled together.
    reduction : int
        Steps.
    isa : Isa
        Vector width and registers.
    overhang_copies : bool
        As for `choose_tile`.
    phases : int
        As for `choose_tile`.
    """

    def __init__(
        self, height: int, width: int, channel_blocks: int, reduction: int, isa: Isa,
        overhang_copies: bool = False, phases: int = 1,
    ) -> None:  # fmt: skip
        self.height, self.width, self.channel_blocks = height, width, channel_blocks
        self.isa, self.phases = isa, phases
        self._problem = (height, width, reduction, isa, overhang_copies, phases)
        self._reduction = reduction

    def choices(self) -> dict[str, tuple[Value, ...]]:
        """Knobs "rows", "columns" and "blocks"."""
        most = min(MOST_BLOCKS, self.channel_blocks)
        return {
            "rows": tuple(range(1, min(TALLEST, self.height) + 1)),
            "columns": tuple(range(1, min(WIDEST, self.width) + 1)),
            "blocks": tuple(b for b in range(1, most + 1) if self.channel_blocks % b == 0),
        }

    def is_valid(self, config: Config, default: Tile) -> bool:
        """Whether the tile fits the registers and is not hopeless."""
        tile = tile_of(config)
        if tile == default:
            return True
        return fits(tile, self.isa, self.phases) and self.estimate(tile) <= HOPELESS * self.estimate(default)

    def estimate(self, tile: Tile) -> float:
        """The analytic cost of a tile."""
        return estimate(tile, *self._problem)

    def features(self, config: Config) -> tuple[float, ...]:
        """Tile, registers, waste, the analytic estimate, sizes."""
        tile = tile_of(config)
        pixels = tile.rows * tile.columns
        tiles = -(-self.height // tile.rows) * -(-self.width // tile.columns)
        parts = self.phases * max(1, LANES // self.isa.float_lanes)
        return (
            float(tile.rows), float(tile.columns), float(tile.blocks), float(pixels),
            (pixels + 1) * tile.blocks * parts / self.isa.registers, tiles * pixels / (self.height * self.width),
            self.estimate(tile), (pixels + tile.blocks * parts) / (pixels * tile.blocks * parts),
            math.log2(tiles * max(1, self.channel_blocks // tile.blocks)), math.log2(self._reduction),
            math.log2(self._reduction * tile.blocks * LANES * 4),
        )  # fmt: skip


def tile_of(config: Config) -> Tile:
    """The tile of a configuration; a knob that is not there is 1."""
    return Tile(*(int(config.get(knob, 1)) for knob in ("rows", "columns", "blocks")))


def workload_of(shape: Any, isa: Isa, chosen: tuple[str, ...]) -> dict[str, Any]:
    """Instruction set and the fields of a shape, but for those that a configuration decides."""
    return {"isa": asdict(isa), "shape": {name: v for name, v in asdict(shape).items() if name not in chosen}}


def example_array(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> Array:
    """Seeded normal numbers."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
