"""Reductions by all threads of a block: softmax and instance normalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import tir
from lpsn_tvm.schedules.expressions import exponential
from lpsn_tvm.schedules.kernel import Attrs, Constants, Inputs, Kernel, TensorSpec

THREADS = 128
NORM_THREADS = 512
"""A norm reads its channels three times: few blocks with many threads each."""
SECTOR = 32
"""Bytes that memory moves at once: a block takes as many neighbouring channels."""


def _shared(dtype: str, threads: int = THREADS) -> Any:
    # Static: dynamic arrays of all kernels of one source must have one type.
    return T.alloc_buffer((threads,), dtype, scope="shared")


def _combined(
    scratch: Any, thread: Any, lanes: int, value: Any, function: Callable[[Any, Any], Any], threads: int = THREADS
) -> Any:
    """What `function` makes of the values of all threads of one lane (thread % lanes), known to every thread after
    it; halving, so the number of slots is a power of two.
    """
    tir.store(scratch, thread, value)
    tir.barrier()
    slots = threads // lanes // 2
    while slots:
        with tir.when(thread < slots * lanes):
            tir.store(scratch, thread, function(scratch[thread], scratch[thread + slots * lanes]))
        tir.barrier()
        slots //= 2
    return scratch[T.truncmod(thread, lanes) if lanes > 1 else 0]


@dataclass(frozen=True)
class _Planes:
    """How blocks of threads share a tensor: each takes `width` neighbouring channels of one sample.

    Parameters
    ----------
    data : TensorSpec
    threads : int
        Of a block; thread `t` takes channel `t % width` and every `slots`-th pixel from `t / width` on.
    """

    data: TensorSpec
    threads: int = THREADS

    @property
    def pixels(self) -> int:
        return prod(self.data.shape[2:])

    @property
    def lanes(self) -> int:
        """Channels that lie side by side."""
        return max(self.data.block, 1)

    @property
    def width(self) -> int:
        return min(self.lanes, SECTOR // np.dtype(self.data.dtype).itemsize)

    @property
    def channels(self) -> int:
        """Of one sample, with those that only fill blocks."""
        return self.data.blocks * self.lanes if self.data.block else self.data.shape[1]

    @property
    def slots(self) -> int:
        return self.threads // self.width

    @property
    def grid(self) -> tuple[int]:
        return (self.data.shape[0] * self.channels // self.width,)

    def of(self, block: Any, thread: Any) -> tuple[Any, Any, Any]:
        """Which channel of all samples a thread takes, its slot, and where the channel's first pixel lies."""
        lane, slot = (T.truncmod(thread, self.width), T.truncdiv(thread, self.width)) if self.width > 1 else (0, thread)
        channel = block * self.width + lane
        if self.lanes == 1:
            return channel, slot, channel * self.pixels
        first = T.truncdiv(channel, self.lanes) * (self.pixels * self.lanes) + T.truncmod(channel, self.lanes)
        return channel, slot, first


def _accumulate(
    extent: int, slot: Any, slots: int, start: Any, function: Callable[[Any, Any], Any], dtype: str = "float32"
) -> Any:
    """`function(total, index)` over slot, slot + slots, ... below extent; the register that holds the total."""
    total = tir.registers(1, dtype)
    tir.store(total, 0, start)
    with T.serial(0, -(-extent // slots)) as step:
        index = step * slots + slot
        with tir.when(index < extent if extent % slots else True):
            tir.store(total, 0, function(total[0], index))
    return total


def float_instance_norm(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_instance_norm`: sum and sum of squared differences in float64, as the reference has them,
    then every value; one block per sample and eight channels.
    """
    data, scale, shift = inputs[0], constants.get("scale"), constants.get("shift")
    if data.dtype != "float32" or len(data.shape) != 4 or scale is None or shift is None:
        return None
    planes = _Planes(data, NORM_THREADS)
    packed = tuple(
        np.concatenate([array.reshape(-1), np.zeros(planes.channels - array.size)]).astype(np.float32)
        for array in (scale, shift)
    )
    # A constant in memory: in source code it would be rounded to a few digits.
    numbers = np.asarray([attrs["epsilon"]], np.float64)

    def body(x: Any, scales: Any, shifts: Any, p: Any, target: Any) -> None:
        with tir.launch(planes.grid, planes.threads) as ((block,), thread):
            channel, slot, first = planes.of(block, thread)
            norm = _statistics(planes, (thread, slot), lambda pixel: x[first + pixel * planes.lanes], p[0])
            own = T.truncmod(channel, planes.channels)
            centre, slope, offset = (tir.registers(1, "float32") for _ in range(3))
            factor = T.cast(scales[own], "float64") / norm[1]
            tir.store(centre, 0, T.cast(norm[0], "float32"))
            tir.store(slope, 0, T.cast(factor, "float32"))
            rest = norm[0] - T.cast(centre[0], "float64")
            tir.store(offset, 0, T.cast(T.cast(shifts[own], "float64") - rest * factor, "float32"))

            def result(pixel: Any) -> None:
                index = first + pixel * planes.lanes
                tir.store(target, index, (x[index] - centre[0]) * slope[0] + offset[0])

            _strided(planes.pixels, slot, planes.slots, result)

    arguments = [
        ("data", data.memory_shape, "float32"),
        ("scales", (planes.channels,), "float32"),
        ("shifts", (planes.channels,), "float32"),
        ("numbers", (1,), "float64"),
        ("out", data.memory_shape, "float32"),
    ]
    key = ("float_instance_norm", data)
    return Kernel(lambda: tir.prim_func(arguments, body), (*packed, numbers), data, key, (data,))


def _statistics(planes: _Planes, place: tuple[Any, Any], at: Callable[[Any], Any], epsilon: Any) -> Any:
    """Two float64 registers: mean of a channel's pixels, and the root of their variance plus epsilon."""
    thread, slot = place
    scratch, norm = _shared("float64", planes.threads), tir.registers(2, "float64")
    zero, pixels = tirx.const(0.0, "float64"), tirx.const(float(planes.pixels), "float64")

    def mean(function: Callable[[Any, Any], Any]) -> Any:
        part = _accumulate(planes.pixels, slot, planes.slots, zero, function, "float64")
        return _combined(scratch, thread, planes.width, part[0], lambda a, b: a + b, planes.threads) / pixels

    tir.store(norm, 0, mean(lambda total, pixel: total + T.cast(at(pixel), "float64")))
    tir.barrier()

    def squared(total: Any, pixel: Any) -> Any:
        difference = T.cast(at(pixel), "float64") - norm[0]
        return total + difference * difference

    tir.store(norm, 1, T.sqrt(mean(squared) + epsilon))
    return norm


def _strided(extent: int, slot: Any, slots: int, statement: Callable[[Any], None]) -> None:
    with T.serial(0, -(-extent // slots)) as step:
        index = step * slots + slot
        with tir.when(index < extent if extent % slots else True):
            statement(index)


def float_softmax(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_softmax`: plain memory, one block per row."""
    data = inputs[0].with_block(0)
    axis = int(attrs["axis"]) % len(data.shape)
    if data.dtype != "float32":
        return None
    extent, inner = data.shape[axis], prod(data.shape[axis + 1 :])
    rows = prod(data.shape) // extent

    def body(x: Any, target: Any) -> None:
        with tir.launch((rows,), THREADS) as ((row,), thread):
            scratch = _shared("float32")
            base = T.truncdiv(row, inner) * (extent * inner) + T.truncmod(row, inner) if inner > 1 else row * extent
            low, zero = tirx.min_value("float32"), tirx.const(0.0, "float32")
            part = _accumulate(extent, thread, THREADS, low, lambda total, k: T.max(total, x[base + k * inner]))
            largest = tir.registers(1, "float32")
            tir.store(largest, 0, _combined(scratch, thread, 1, part[0], T.max))
            tir.barrier()

            def power(k: Any) -> Any:
                return exponential(x[base + k * inner] - largest[0])

            part = _accumulate(extent, thread, THREADS, zero, lambda total, k: total + power(k))
            total = tir.registers(1, "float32")
            tir.store(total, 0, _combined(scratch, thread, 1, part[0], lambda a, b: a + b))
            _strided(extent, thread, THREADS, lambda k: tir.store(target, base + k * inner, power(k) / total[0]))

    arguments = [("data", data.shape, "float32"), ("out", data.shape, "float32")]
    return Kernel(lambda: tir.prim_func(arguments, body), (), data, ("float_softmax", data, axis), (data,))
