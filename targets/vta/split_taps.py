"""Windows too large for the buffers (global averages of large images, giant kernels): their taps are cut into several
`Gemm` steps on the same accumulators, each of which brings its own part of the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lpsn_tvm.schedules.vta.ops import Gemm, Tap, TileOp
from lpsn_tvm.schedules.vta.placement import is_shared, reach
from lpsn_tvm.schedules.vta.reduction import tap_range

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

SLOTS = 2
"""One part is loaded while the other one is used."""


def split_taps(op: TileOp, config: VtaConfig) -> TileOp:
    """The operator with every step's window, for a single output position, in half of its buffer or less."""
    steps = list(op.steps)
    for index in range(len(steps) - 1, -1, -1):
        step = steps[index]
        if isinstance(step, Gemm) and len(step.taps) > 1:
            steps[index : index + 1] = _parts(op, index, step, config)
    return op if len(steps) == len(op.steps) else replace(op, steps=tuple(steps))


def _parts(op: TileOp, index: int, step: Gemm, config: VtaConfig) -> Iterator[Gemm]:
    if len(step.taps) == 1 or _fits(op, index, step, config):
        yield step
        return
    for taps in _halves(step.taps):
        yield from _parts(op, index, replace(step, taps=taps), config)


def _halves(taps: tuple[Tap, ...]) -> tuple[tuple[Tap, ...], tuple[Tap, ...]]:
    """Upper and lower part of the window, or left and right of a single row."""
    for axis in range(2):
        offsets = [_offset(tap, axis) for tap in taps]
        different = sorted(set(offsets))
        if len(different) > 1:
            middle = different[len(different) // 2]
            pairs = list(zip(taps, offsets, strict=True))
            return (
                tuple(tap for tap, offset in pairs if offset < middle),
                tuple(tap for tap, offset in pairs if offset >= middle),
            )
    return taps[: len(taps) // 2], taps[len(taps) // 2 :]


def _offset(tap: Tap, axis: int) -> int:
    """Position inside the window, whichever part of the image the tap reaches."""
    dst, src = (tap.dst_y, tap.src_y) if axis == 0 else (tap.dst_x, tap.src_x)
    return src.start * dst.step - dst.start * src.step


def _fits(op: TileOp, index: int, step: Gemm, config: VtaConfig) -> bool:
    weights = 1 if is_shared(step) else tap_range(step.taps).count
    if weights > config.wgt_depth // SLOTS:
        return False
    alone = replace(op, steps=(*op.steps[:index], step, *op.steps[index + 1 :]))
    nth = sum(isinstance(before, Gemm) for before in op.steps[:index])
    return reach(alone, nth, 0, 1) * reach(alone, nth, 1, 1) <= config.inp_depth // SLOTS
