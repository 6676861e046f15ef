"""The meaning of a `TileOp` in numpy: what every emitted program computes, bit for bit, before any scheduling.

Memory is a mapping from region to its tiles, unpacked: data [tiles, BATCH, BLOCK], weights [tiles, BLOCK_OUT,
BLOCK_IN], vectors int32[tiles, BATCH, BLOCK_OUT]. Accumulators are int32 and wrap; a stored value is the low bits of
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Pool, Scalar, Span, Store, Tap, TileOp, Vector

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

Array = npt.NDArray[Any]
Memory = Mapping[str, Array]
SMALLEST = int(np.iinfo(np.int32).min)


def evaluate(op: TileOp, memory: Memory, config: VtaConfig) -> None:
    """Run `op`: reads its operands from `memory` and writes what it stores there, in place.

    Parameters
    ----------
    op : TileOp
        The operator.
    memory : mapping of region to int array of tiles
        Data int[tiles, BATCH, BLOCK], weights int[tiles, BLOCK_OUT, BLOCK_IN], vectors int32[tiles, BATCH, BLOCK_OUT].
    config : VtaConfig
        BATCH, BLOCK and the width of outputs.

    Raises
    ------
    IndexError
        A plane or a weight leaves its region (a bug of whoever built the operator).
    ValueError
        A stored rectangle does not have the extents of its plane.
    """
    shape = (op.batches, op.blocks, op.height, op.width, config.batch, config.block_out)
    acc = np.zeros(shape, np.int32)
    for step in op.steps:
        if isinstance(step, Gemm):
            _gemm(step, acc, memory)
        elif isinstance(step, Vector):
            operand = memory[step.region][step.base : step.base + op.blocks].astype(np.int64)
            acc = _VECTOR[step.kind](acc, operand[None, :, None, None])
        elif isinstance(step, Scalar):
            acc = _SCALAR[step.kind](acc, step.value)
        elif isinstance(step, Pool):
            acc = _pool(step, acc)
        else:
            _store(step, acc, memory, config.out_bits)


def plane_tiles(plane: Plane) -> Array:
    """int64[batches, blocks, height, width]: index of each tile of the plane in its region."""
    extents = (plane.batches, plane.blocks, plane.height, plane.width)
    strides = (plane.batch_stride, plane.block_stride, plane.row_stride, 1)
    index = np.asarray(plane.base, np.int64)
    for axis, (extent, stride) in enumerate(zip(extents, strides, strict=True)):
        steps = np.arange(extent, dtype=np.int64) * stride
        index = index + steps.reshape((-1,) + (1,) * (3 - axis))
    return index


def _wrap(value: Array) -> Array:
    """int64 -> int32, modulo 2**32."""
    return value.astype(np.int32)


_VECTOR: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda acc, operand: _wrap(acc.astype(np.int64) + operand),
    "shr": lambda acc, operand: _wrap(np.right_shift(acc.astype(np.int64), operand)),
}
_SCALAR: dict[str, Callable[[Array, int], Array]] = {
    "min": lambda acc, value: np.minimum(acc, np.int32(value)),
    "max": lambda acc, value: np.maximum(acc, np.int32(value)),
    "add": lambda acc, value: _wrap(acc.astype(np.int64) + value),
    "shr": lambda acc, value: np.right_shift(acc, np.int32(value)),
    "double": lambda acc, _: _wrap(acc.astype(np.int64) * 2),
}


def _positions(span: Span) -> Array:
    return span.start + span.step * np.arange(span.count, dtype=np.int64)


def _inside(positions: Array, extent: int) -> Array:
    """Positions, if all are within [0, extent): numpy would take negative ones from the end."""
    if positions.size and (positions.min() < 0 or positions.max() >= extent):
        raise IndexError(f"positions {positions.min()}..{positions.max()} leave an extent of {extent}")
    return positions


def _gemm(step: Gemm, acc: Array, memory: Memory) -> None:
    """All taps; reductions in float64, exact below 2**53."""
    source, region = step.source, memory[step.source.region]
    tiles = plane_tiles(source)
    if tiles.size and (tiles.min() < 0 or tiles.max() >= len(region)):
        raise IndexError(f"the plane leaves region {source.region} of {len(region)} tiles")
    for tap in step.taps:
        if tap.dst_y.count != tap.src_y.count or tap.dst_x.count != tap.src_x.count:
            raise ValueError(f"a tap reads {tap.src_y.count} x {tap.src_x.count} tiles for another number of outputs")
        rows, columns = (
            _inside(_positions(tap.src_y), source.height),
            _inside(_positions(tap.src_x), source.width),
        )
        data = region[tiles[:, :, rows[:, None], columns[None, :]]].astype(np.float64)
        _add_tap(step, tap, data, acc, memory[step.weights])


def _add_tap(step: Gemm, tap: Tap, data: Array, acc: Array, weights: Array) -> None:
    """`data` float64[batches, blocks, y, x, BATCH, BLOCK_IN] times the tap's weights; output blocks that read the same
    inputs at once.
    """
    rows = _inside(_positions(tap.dst_y), acc.shape[2])[:, None]
    columns = _inside(_positions(tap.dst_x), acc.shape[3])[None, :]
    fan_in = np.arange(step.fan_in)
    for first in sorted(set(step.first_input)):
        outputs = np.flatnonzero(np.asarray(step.first_input) == first)
        inputs = _inside(first + fan_in, data.shape[1])
        index = step.weight_base + tap.weight + outputs[:, None] * step.output_stride + fan_in * step.input_stride
        tiles = weights[_inside(index, len(weights))].astype(np.float64)
        products = np.einsum("nkyxbi,okci->noyxbc", data[:, inputs], tiles, optimize=True)
        total = acc[:, outputs[:, None, None], rows, columns].astype(np.int64)
        acc[:, outputs[:, None, None], rows, columns] = _wrap(total + step.passes * products.astype(np.int64))


def _pool(step: Pool, acc: Array) -> Array:
    """Maximum over windows; what lies outside the rectangle is smaller than anything."""
    (kernel_y, kernel_x), (stride_y, stride_x), (top, left) = step.kernel, step.strides, step.padding
    need_y = (step.height - 1) * stride_y + kernel_y
    need_x = (step.width - 1) * stride_x + kernel_x
    bottom, right = max(0, need_y - top - acc.shape[2]), max(0, need_x - left - acc.shape[3])
    spare = ((0, 0), (0, 0))
    padded = np.pad(acc, (*spare, (top, bottom), (left, right), *spare), constant_values=SMALLEST)
    windows = [
        padded[
            :,
            :,
            r : r + (step.height - 1) * stride_y + 1 : stride_y,
            s : s + (step.width - 1) * stride_x + 1 : stride_x,
        ]
        for r in range(kernel_y)
        for s in range(kernel_x)
    ]
    result: Array = np.maximum.reduce(windows)
    return result


def _store(step: Store, acc: Array, memory: Memory, bits: int) -> None:
    plane = step.plane
    if (plane.batches, plane.blocks, plane.height, plane.width) != acc.shape[:4]:
        raise ValueError(f"a rectangle of {acc.shape[:4]} tiles does not fit {plane}")
    sign = np.int32(1 << (bits - 1))
    low = ((acc & np.int32((1 << bits) - 1)) ^ sign) - sign
    region = memory[plane.region]
    region[_inside(plane_tiles(plane), len(region))] = low.astype(region.dtype)
