"""How a tile operator is cut into pieces and where the pieces live in SRAM: the space that schedule search walks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lpsn_tvm.errors import CompileError


@dataclass(frozen=True)
class Schedule:
    """One schedule of a `TileOp`. Tiles of the output are `[tile_b][tile_co][tile_h][tile_w]` accumulators; the last
    tile along an axis may be smaller. Of an operator with a `Pool`, `tile_h` and `tile_w` count pooled positions.

    Parameters
    ----------
    tile_b, tile_co, tile_h, tile_w : int
        Batch tiles, output blocks, rows and columns of one output tile.
    tile_ci : int
        Input blocks per reduction chunk: what one load of INP and one of WGT bring.
    threads : int
        Accumulator slots, 1 or 2. With 2 the next tile computes while the previous one is stored.
    thread_axis : {"oc", "h"}
        Consecutive tiles, which alternate between the accumulator slots, are neighbours along this axis.
    order : {"oc", "spatial"}
        The outer loop over tiles.
    inner : {"ci", "co", "x"}
        What is a loop of the instruction beside the rows: input blocks, output blocks or columns (`nest_columns`, which
        needs three output blocks; else as "co"). The other axes are written out.
    inp_slots, wgt_slots : int
        Upper limits for the slots of INP and WGT; 0 lets the emitter choose. Every slot holds one chunk. A slot costs
        micro-op sequences, as base addresses exist only there.
    """

    tile_b: int = 1
    tile_co: int = 1
    tile_h: int = 1
    tile_w: int = 1
    tile_ci: int = 1
    threads: int = 2
    thread_axis: Literal["oc", "h"] = "h"
    order: Literal["oc", "spatial"] = "oc"
    inner: Literal["ci", "co", "x"] = "co"
    inp_slots: int = 0
    wgt_slots: int = 0

    def __post_init__(self) -> None:
        if min(self.tile_b, self.tile_co, self.tile_h, self.tile_w, self.tile_ci) < 1:
            raise CompileError(f"schedule: tile sizes must be at least 1, got {self}")
        if self.threads not in (1, 2) or min(self.inp_slots, self.wgt_slots) < 0:
            raise CompileError(f"schedule: threads must be 1 or 2 and slots 0 (all) or more, got {self}")
        if (
            self.thread_axis not in ("oc", "h")
            or self.order not in ("oc", "spatial")
            or self.inner not in ("ci", "co", "x")
        ):
            raise CompileError(f'schedule: axes are "oc" | "h", "oc" | "spatial" and "ci" | "co" | "x", got {self}')

    def to_json(self) -> dict[str, Any]:
        """A dictionary of integers and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Schedule:
        """The schedule that `to_json` wrote.

        Raises
        ------
        CompileError
            Unknown keys or values out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise CompileError(f"schedule: unknown keys {unknown}, known are {sorted(known)}")
        return cls(**data)
