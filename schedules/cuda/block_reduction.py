"""Reductions by all threads of a block: global averages, softmax and instance normalization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import tir
from lpsn_tvm.schedules.expressions import exponential
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]
THREADS = 128


def _shared(dtype: str) -> Any:
    # Static: dynamic arrays of all kernels of one source must have one type.
    return T.alloc_buffer((THREADS,), dtype, scope="shared")


def _combined(scratch: Any, thread: Any, lanes: int, value: Any, function: Callable[[Any, Any], Any]) -> Any:
    """What `function` makes of the values of all threads of one lane (thread % lanes), known to every thread after
    it; halving, so the number of slots is a power of two.
    """
    tir.store(scratch, thread, value)
    tir.barrier()
    slots = THREADS // lanes // 2
    while slots:
        with tir.when(thread < slots * lanes):
            tir.store(scratch, thread, function(scratch[thread], scratch[thread + slots * lanes]))
        tir.barrier()
        slots //= 2
    return scratch[T.truncmod(thread, lanes) if lanes > 1 else 0]


def _planes(data: TensorSpec) -> tuple[int, int, int]:
    """(samples times channel blocks, pixels, channels per block): element (plane, pixel, lane) lies in this order."""
    pixels, lanes = prod(data.shape[2:]), max(data.block, 1)
    return data.shape[0] * (data.blocks if data.block else data.shape[1]), pixels, lanes


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


def block_sum(
    name: str, data: TensorSpec, out: TensorSpec, dtype: str, numbers: Array, finish: Callable[[Any, Any], Any]
) -> Kernel:
    """Sum over H and W in `dtype`, then `finish(total, numbers)`; one block per sample and block of channels."""
    planes, pixels, lanes = _planes(data)

    def body(x: Any, p: Any, target: Any) -> None:
        with tir.launch((planes,), THREADS) as ((plane,), thread):
            scratch = _shared(dtype)
            lane, slot = (T.truncmod(thread, lanes), T.truncdiv(thread, lanes)) if lanes > 1 else (0, thread)

            def step(total: Any, pixel: Any) -> Any:
                return total + T.cast(x[(plane * pixels + pixel) * lanes + lane], dtype)

            part = _accumulate(pixels, slot, THREADS // lanes, tirx.const(0, dtype), step, dtype)
            total = _combined(scratch, thread, lanes, part[0], lambda a, b: a + b)
            with tir.when(thread < lanes):
                tir.store(target, plane * lanes + lane, finish(total, p))

    arguments = [
        ("data", data.memory_shape, data.dtype),
        ("numbers", numbers.shape, "float32"),
        ("out", out.memory_shape, out.dtype),
    ]
    return Kernel(lambda: tir.prim_func(arguments, body), (numbers,), out, (name, data, out), (data,))


def float_instance_norm(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_instance_norm`: sum, sum of squared differences, result; one block per plane."""
    data, scale, shift = inputs[0], constants.get("scale"), constants.get("shift")
    if data.dtype != "float32" or len(data.shape) != 4 or scale is None or shift is None:
        return None
    planes, pixels, lanes = _planes(data)
    width, epsilon = planes // data.shape[0] * lanes, float(attrs["epsilon"])
    packed = tuple(
        np.concatenate([array.reshape(-1), np.zeros(width - array.size)]).astype(np.float32) for array in (scale, shift)
    )

    def body(x: Any, scales: Any, shifts: Any, target: Any) -> None:
        with tir.launch((planes,), THREADS) as ((plane,), thread):
            scratch = _shared("float32")
            lane, slot = (T.truncmod(thread, lanes), T.truncdiv(thread, lanes)) if lanes > 1 else (0, thread)
            slots, inverse, zero = THREADS // lanes, tirx.const(1.0 / pixels, "float32"), tirx.const(0.0, "float32")
            channel = T.truncmod(plane, width // lanes) * lanes + lane

            def at(pixel: Any) -> Any:
                return (plane * pixels + pixel) * lanes + lane

            part = _accumulate(pixels, slot, slots, zero, lambda total, pixel: total + x[at(pixel)])
            mean = tir.registers(1, "float32")
            tir.store(mean, 0, _combined(scratch, thread, lanes, part[0], lambda a, b: a + b) * inverse)
            tir.barrier()

            def squared(total: Any, pixel: Any) -> Any:
                return total + (x[at(pixel)] - mean[0]) * (x[at(pixel)] - mean[0])

            spread = _accumulate(pixels, slot, slots, zero, squared)
            factor = tir.registers(1, "float32")
            variance = _combined(scratch, thread, lanes, spread[0], lambda a, b: a + b) * inverse
            tir.store(factor, 0, scales[channel] / T.sqrt(variance + tirx.const(epsilon, "float32")))
            _strided(
                pixels,
                slot,
                slots,
                lambda i: tir.store(target, at(i), (x[at(i)] - mean[0]) * factor[0] + shifts[channel]),
            )

    arguments = [
        ("data", data.memory_shape, "float32"),
        ("scales", (width,), "float32"),
        ("shifts", (width,), "float32"),
        ("out", data.memory_shape, "float32"),
    ]
    key = ("float_instance_norm", data, epsilon)
    return Kernel(lambda: tir.prim_func(arguments, body), packed, data, key, (data,))


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
