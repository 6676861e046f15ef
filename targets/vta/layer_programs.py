"""One operator of a program as a program of its own, with just the memory that it touches.

Each plane becomes a window of its region (`input`, `output`, numbered where there are several), weights and vectors are
cut to what the operator reads. What overlaps in one region shares a window.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lpsn_tvm.schedules.vta.emit import emit
from lpsn_tvm.schedules.vta.evaluate import plane_tiles
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Step, Store, TileOp, Vector
from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.device_reference import ReferenceMemory, Role, expected_outputs, pack_tiles
from lpsn_tvm.targets.vta.program import Access, Program


@dataclass
class Window:
    """Tiles `[first, end)` of a region of the whole program.

    Parameters
    ----------
    region : str
        Region of the whole program.
    role : {"data", "weight", "vector"}
    first, end : int
        Tiles.
    reads, writes : bool
        What the operator does with it.
    name : str
        Region of the operator's own program.
    """

    region: str
    role: Role
    first: int
    end: int
    reads: bool = True
    writes: bool = False
    name: str = ""

    @property
    def access(self) -> Access:
        """What the program may do with it."""
        return "rw" if self.reads and self.writes else "w" if self.writes else "r"


@dataclass(frozen=True)
class LayerProgram:
    """An operator on its own.

    Parameters
    ----------
    op : TileOp
        On the regions of `program`.
    program : Program
        All inputs are in its regions.
    windows : tuple of Window
        Where its regions lie in the whole program.
    expected : mapping of region to bytes
        What it must leave.
    """

    op: TileOp
    program: Program
    windows: tuple[Window, ...]
    expected: dict[str, bytes] = field(repr=False)


def layer_program(op: TileOp, schedule: Any, memory: ReferenceMemory) -> LayerProgram:
    """The program of one operator.

    Parameters
    ----------
    op : TileOp
        On the regions of the whole program.
    schedule : Schedule
        As in the whole program.
    memory : ReferenceMemory
        Just before the operator runs; it is not changed.

    Raises
    ------
    CompileError
        The operator cannot be emitted.
    """
    windows = _windows(op)
    own = _Mover(windows).op(op)
    builder = ProgramBuilder(memory.config)
    for window in windows:
        tiles = memory.tiles[window.region][window.first : window.end]
        data = pack_tiles(tiles, window.role, memory.config)
        builder.region(window.name, len(data), data=data if _needs_data(window, own) else None, access=window.access)
    builder.mark(op.name)
    emit(builder, own, schedule)
    program = builder.finish()
    expected = expected_outputs([own], program.regions, {}, memory.config)
    return LayerProgram(own, program, tuple(windows), expected)


def _needs_data(window: Window, op: TileOp) -> bool:
    """It is read, or the operator leaves some of its tiles as they were."""
    if window.reads:
        return True
    stores = [step.plane for step in op.steps if isinstance(step, Store) and step.plane.region == window.name]
    return len(np.unique(np.concatenate([plane_tiles(p).reshape(-1) for p in stores]))) < window.end - window.first


def _windows(op: TileOp) -> list[Window]:
    """Named windows of everything that the operator touches."""
    data, rest = [], []
    for step in op.steps:
        if isinstance(step, Gemm):
            data.append(_plane_window(step.source, writes=False))
            rest.append(_weight_window(step))
        elif isinstance(step, Vector):
            rest.append(Window(step.region, "vector", step.base, step.base + op.blocks))
        elif isinstance(step, Store):
            data.append(_plane_window(step.plane, writes=True))
    windows = _merged([*data, *rest])
    names: dict[str, int] = {}
    for window in windows:
        kind = window.role if window.role != "data" else "output" if window.writes else "input"
        count = names[kind] = names.get(kind, -1) + 1
        window.name = f"{kind}.{count}" if count else kind
    return windows


def _plane_window(plane: Plane, *, writes: bool) -> Window:
    tiles = plane_tiles(plane)
    return Window(plane.region, "data", int(tiles.min()), int(tiles.max()) + 1, not writes, writes)


def _weight_window(step: Gemm) -> Window:
    tap = [tap.weight for tap in step.taps] or [0]
    outputs = len(step.first_input) - 1
    last = outputs * step.output_stride + (step.fan_in - 1) * step.input_stride + max(tap)
    return Window(step.weights, "weight", step.weight_base, step.weight_base + last + 1)


def _merged(windows: list[Window]) -> list[Window]:
    """Windows of one region that overlap become one."""
    merged: list[Window] = []
    for window in windows:
        overlapping = [w for w in merged if w.region == window.region and w.first < window.end and window.first < w.end]
        for other in overlapping:
            window = Window(
                window.region,
                window.role,
                min(window.first, other.first),
                max(window.end, other.end),
                window.reads or other.reads,
                window.writes or other.writes,
            )
            merged.remove(other)
        merged.append(window)
    return merged


class _Mover:
    """Rewrites an operator from the program's regions to windows."""

    def __init__(self, windows: list[Window]) -> None:
        self._windows = windows

    def op(self, op: TileOp) -> TileOp:
        """The operator on its own regions."""
        return replace(op, steps=tuple(self._step(step) for step in op.steps))

    def _step(self, step: Step) -> Step:
        if isinstance(step, Gemm):
            window = self._find(step.weights, step.weight_base, "weight")
            base = step.weight_base - window.first
            return replace(step, source=self._plane(step.source), weights=window.name, weight_base=base)
        if isinstance(step, Vector):
            window = self._find(step.region, step.base, "vector")
            return replace(step, region=window.name, base=step.base - window.first)
        return replace(step, plane=self._plane(step.plane)) if isinstance(step, Store) else step

    def _plane(self, plane: Plane) -> Plane:
        window = self._find(plane.region, plane.base, "data")
        return replace(plane, region=window.name, base=plane.base - window.first)

    def _find(self, region: str, tile: int, role: Role) -> Window:
        return next(w for w in self._windows if (w.region, w.role) == (region, role) and w.first <= tile < w.end)
