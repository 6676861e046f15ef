"""Sums over all pixels: a block of threads takes the neighbouring channels of one sample and reads them once."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics, tir
from lpsn_tvm.schedules.cuda.threads import LANES
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec

LOADS = 4
"""Loads of one thread: enough to hide that memory is slow, few enough to leave some for other threads."""
FEWEST, MOST = 64, 1024
"""Threads of a block."""


def plane_sum(
    name: str, data: TensorSpec, out: TensorSpec, dtype: str, numbers: Array, finish: Callable[[Any, Any], Any]
) -> Kernel:
    """Kernel of a sum over H and W; parameters as `Maker.plane_sum` has them."""
    block, pixels = max(data.block, 1), prod(data.shape[2:])
    lanes = LANES if block % LANES == 0 else 1
    planes = prod(data.memory_shape) // (pixels * block)
    width = block // lanes
    slots = _slots(pixels, width)

    def body(x: Any, p: Any, target: Any) -> None:
        with tir.launch((planes,), slots * width) as ((plane,), thread):
            # Static: dynamic arrays of all kernels of one source must have one type.
            scratch = T.alloc_buffer((slots * block,), dtype, scope="shared")
            part, slot = (T.truncmod(thread, width), T.truncdiv(thread, width)) if width > 1 else (0, thread)
            first = plane * (pixels * block) + part * lanes
            sums = _sums(x, data, dtype, lanes, slot, slots, lambda pixel: first + pixel * block)
            for i in range(lanes):
                tir.store(scratch, thread * lanes + i, sums[i])
            _fold(scratch, thread, width, slots, lanes)
            with tir.when(thread < block):
                tir.store(target, plane * block + thread, finish(scratch[thread], p))

    arguments = [
        ("data", data.memory_shape, data.dtype),
        ("numbers", numbers.shape, "float32"),
        ("out", out.memory_shape, out.dtype),
    ]
    return Kernel(lambda: tir.prim_func(arguments, body), (numbers,), out, (name, data, out), (data,))


def _slots(pixels: int, width: int) -> int:
    """How many pixels a block of threads sums side by side, a power of two; there is a thread for every output."""
    wanted = max(-(-pixels // LOADS), FEWEST // width, LANES)
    return int(min(1 << (wanted - 1).bit_length(), MOST // width))


def _sums(x: Any, data: TensorSpec, dtype: str, lanes: int, slot: Any, slots: int, at: Callable[[Any], Any]) -> Any:
    """The sums of one thread, `lanes` channels of every `slots`-th pixel; `at` is where a pixel lies."""
    pixels = prod(data.shape[2:])
    sums, loaded = tir.registers(lanes, dtype), tir.registers(lanes, data.dtype)
    for i in range(lanes):
        tir.store(sums, i, tirx.const(0, dtype))
    size = lanes * np.dtype(data.dtype).itemsize
    steps = -(-pixels // slots)
    with T.unroll(0, steps) if steps <= 2 * LOADS else T.serial(0, steps) as step:
        pixel = step * slots + slot
        with tir.when(pixel < pixels if pixels % slots else True):
            if lanes > 1:
                tir.call(intrinsics.copy(size), tir.pointer(loaded), tir.pointer(x, at(pixel)))
            else:
                tir.store(loaded, 0, x[at(pixel)])
            for i in range(lanes):
                tir.store(sums, i, sums[i] + T.cast(loaded[i], dtype))
    return sums


def _fold(scratch: Any, thread: Any, width: int, slots: int, lanes: int) -> None:
    """Add what all slots have to the values of slot 0, half of them at a time."""
    tir.barrier()
    while slots > 1:
        slots //= 2
        with tir.when(thread < slots * width):
            for i in range(lanes):
                at = thread * lanes + i
                tir.store(scratch, at, scratch[at] + scratch[at + slots * width * lanes])
        tir.barrier()
