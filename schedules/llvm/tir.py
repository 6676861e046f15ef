"""Small vocabulary for writing kernels directly as TIR: flat buffers, vector loads and stores, byte copies, and the
requantization epilogue.

Kernels here are generated as loops and vector statements (not scheduled from TE): register tiles, overlapping last
tiles and strided layouts are said directly, a function is made in milliseconds, and LLVM keeps local accumulators in
registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.indices import coordinates

MAGIC = 12582912.0
"""1.5 * 2**23: adding it to a float32 of magnitude below 2**22 rounds to an integer, ties to even, into the low
mantissa bits.
"""
MAGIC_BITS = 0x4B400000
LIMIT = 1048576.0
PARALLEL_WORK = 6_000_000
"""Below this much work (multiply-accumulates, or bytes moved times 8; about 20 microseconds) starting threads costs
more than it saves.
"""


def prim_func(arguments: Sequence[tuple[str, Sequence[int], str]], body: Callable[..., None]) -> Any:
    """A PrimFunc with the given (name, shape, dtype) buffers; `body` gets them flattened to one dimension."""
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("main")
            # 8 is opaque: operator fusion leaves a finished kernel alone.
            T.func_attr({"tirx.noalias": True, "op_pattern": 8})
            buffers = [T.arg(name, T.Buffer(tuple(shape), dtype)) for name, shape, dtype in arguments]
            body(*(flat(buffer, shape, dtype) for buffer, (_, shape, dtype) in zip(buffers, arguments, strict=True)))
    return builder.get()


def flat(buffer: Any, shape: Sequence[int], dtype: str) -> Any:
    """A one-dimensional view of a buffer."""
    size = 1
    for extent in shape:
        size *= int(extent)
    return T.decl_buffer((size,), dtype, data=buffer.data)


def vload(buffer: Any, index: Any, lanes: int) -> Any:
    """`lanes` consecutive elements."""
    if lanes == 1:
        return buffer[index]
    return buffer.vload([index], f"{buffer.dtype}x{lanes}")


def vstore(buffer: Any, index: Any, value: Any, lanes: int) -> None:
    """Store `lanes` consecutive elements."""
    T.buffer_store(buffer, value, [T.ramp(index, 1, lanes) if lanes > 1 else index])


def vector(value: Any, lanes: int) -> Any:
    """A scalar in every lane."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def vcast(value: Any, dtype: str, lanes: int) -> Any:
    """Convert every lane."""
    return T.cast(value, f"{dtype}x{lanes}" if lanes > 1 else dtype)


def loop(extent: int, work: float = 0.0) -> Any:
    """A loop: parallel if it has iterations to share and enough work in all of them together."""
    return T.parallel(0, extent) if extent > 1 and work >= PARALLEL_WORK else T.serial(0, extent)


@contextmanager
def nest(*extents: int) -> Iterator[list[Any]]:
    """Serial loops over `extents`; loops of one iteration become the constant 0."""
    indices: list[Any] = []
    frames: list[Any] = []
    try:
        for extent in extents:
            if extent == 1:
                indices.append(0)
                continue
            frame = T.serial(0, extent)
            indices.append(frame.__enter__())
            frames.append(frame)
        yield indices
    finally:
        for frame in reversed(frames):
            frame.__exit__(None, None, None)


def unravel(index: Any, *extents: int) -> list[Any]:
    """Coordinates of a fused loop index; extents of one cost nothing."""
    return coordinates(index, extents, T.floordiv, T.floormod)


def _pieces(count: int, widest: int) -> Iterator[tuple[int, int, int]]:
    """Cut `count` elements into (start, lanes, repeats) with lanes a power of two."""
    start, lanes = 0, widest
    while count and lanes:
        repeats = count // lanes
        if repeats:
            yield start, lanes, repeats
        start, count, lanes = start + repeats * lanes, count - repeats * lanes, lanes // 2


def map_elements(count: int, widest: int, statement: Callable[[Any, int], None]) -> None:
    """Emit `statement(start, lanes)` over `count` elements: a loop of full vectors, then shrinking tails."""
    for start, lanes, repeats in _pieces(count, widest):
        if repeats == 1:
            statement(start, lanes)
        else:
            with T.serial(0, repeats) as i:
                statement(start + i * lanes, lanes)


def requantized(value: Any, low: Any, high: Any, offset: Any, dtype: str, lanes: int) -> Any:
    """float32 lanes -> integers: clamp, round half to even, add the zero point (`offset` is zero point - MAGIC_BITS).

    The clamp in front of the addition keeps LLVM from contracting it with an earlier product into one fused multiply-
    add.
    """
    clamped = T.max(T.min(value, vector(high, lanes)), vector(low, lanes))
    wide = f"int32x{lanes}" if lanes > 1 else "int32"
    bits = T.reinterpret(wide, clamped + vector(T.float32(MAGIC), lanes))
    return vcast(bits + vector(offset, lanes), dtype, lanes)


def bounded(value: Any, lanes: int) -> Any:
    """Clamp to +-2**20 (the rule of `quant.py` where two products are added)."""
    return T.max(T.min(value, vector(T.float32(LIMIT), lanes)), vector(T.float32(-LIMIT), lanes))
