"""Loops of pooling: a thread makes a few neighbouring outputs of up to 16 bytes of channels. What their windows share
it loads once; columns are reduced first, so that overlapping windows share that too.

Bytes are taken apart into pairs of 16 bits, of which one instruction adds or compares two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics, tir
from lpsn_tvm.schedules.cuda.threads import MANY, SMALL_THREADS, THREADS, element_kernel, reduction
from lpsn_tvm.schedules.cuda.vectors import VECTOR_BYTES
from lpsn_tvm.schedules.cuda.window_sums import axes, inside, tap
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.pooling import Pooling, Window
from lpsn_tvm.schedules.views import View

REGISTERS, MOST_REGISTERS = 64, 128
"""Partial results of a thread: wished for, and at most."""
WRITTEN_OUT = 48
"""Loads of a window that are written out; more are a loop over rows."""
PAIR_LIMIT = 257
"""So many bytes fit into a sum of 16 bits."""
FLIP = 0x80808080
"""Makes signed bytes unsigned ones in the same order, 128 larger."""
MAXIMUM = (
    "lpsn_max_pair",
    "__device__ __forceinline__ unsigned int lpsn_max_pair(unsigned int a, unsigned int b) {\n"
    "  return __vmaxu2(a, b);\n}\n",
)


def pool(
    name: str, data: TensorSpec, constants: tuple[Array, ...], out: TensorSpec, window: Window, pooling: Pooling
) -> Kernel:
    """Kernel of a reduction over a window; parameters as `Maker.pool` has them."""
    # Finishing sums takes registers of its own.
    plans = (_Plan(data, out, window, outputs) for outputs in ((4, 2, 1) if pooling.is_maximum else (2, 1)))
    plan = next((plan for plan in plans if plan.is_wanted), None)
    if plan is None or (plan.is_packed and prod(window.kernel) > PAIR_LIMIT):
        return _element_pool(name, data, constants, out, window, pooling)
    made = plan
    arguments = [("data", data.memory_shape, data.dtype)]
    arguments += [(f"p{i}", array.shape, str(array.dtype)) for i, array in enumerate(constants)]
    arguments.append(("out", out.memory_shape, out.dtype))

    def body(x: Any, *rest: Any) -> None:
        extra = [_Indexed(buffer, array.shape) for buffer, array in zip(rest[:-1], constants, strict=True)]
        _Emitter(made, pooling, x, rest[-1], extra).emit()

    key = (name, data, out, window, made.outputs)
    return Kernel(lambda: tir.prim_func(arguments, body), constants, out, key, (data,))


@dataclass(frozen=True)
class _Plan:
    """What one thread does.

    Parameters
    ----------
    data, out : TensorSpec
    window : Window
    outputs : int
        Neighbouring columns of the output that it makes.
    """

    data: TensorSpec
    out: TensorSpec
    window: Window
    outputs: int

    @property
    def is_packed(self) -> bool:
        return np.dtype(self.data.dtype).itemsize == 1

    @property
    def lanes(self) -> int:
        """Channels."""
        return gcd(self.data.block, VECTOR_BYTES // np.dtype(self.data.dtype).itemsize)

    @property
    def registers(self) -> int:
        """Of one reduced column."""
        return self.lanes // 2 if self.is_packed else self.lanes

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Input columns that the windows touch, from the first one's left edge."""
        stride, dilation = self.window.strides[1], self.window.dilation[1]
        steps = range(self.window.kernel[1])
        return tuple(sorted({q * stride + s * dilation for q in range(self.outputs) for s in steps}))

    @property
    def extents(self) -> tuple[int, int, int, int]:
        """Planes, output rows, groups of output columns, vectors of channels."""
        height, width = self.window.size
        return self.out.shape[0] * self.out.blocks, height, -(-width // self.outputs), self.out.block // self.lanes

    @property
    def is_wanted(self) -> bool:
        """Whether this many outputs fit registers and leave enough threads; one output need only be possible."""
        if self.data.block % 4 or self.data.block == 0 or self.data.dtype not in ("uint8", "int8", "float32"):
            return False
        size = len(self.columns) * self.registers
        if self.outputs == 1:
            return size <= MOST_REGISTERS
        return size <= REGISTERS and self.outputs <= self.window.size[1] and prod(self.extents) >= MANY


class _Indexed:
    """A flat buffer indexed like an array of `shape`."""

    def __init__(self, buffer: Any, shape: tuple[int, ...]) -> None:
        self.buffer, self.shape = buffer, shape

    def __getitem__(self, index: Any) -> Any:
        flat: Any = 0
        for i, extent in zip(index if isinstance(index, tuple) else (index,), self.shape, strict=True):
            flat = flat * extent + i
        return self.buffer[flat]


class _Emitter:
    """The code of a pooling kernel."""

    def __init__(self, plan: _Plan, pooling: Pooling, x: Any, target: Any, extra: list[_Indexed]) -> None:
        self.plan, self.pooling, self.x, self.target, self.extra = plan, pooling, x, target, extra
        self.is_signed = plan.data.dtype == "int8"

    def emit(self) -> None:
        plan = self.plan
        total = prod(plan.extents)
        threads = THREADS if total >= MANY else SMALL_THREADS
        with tir.launch((-(-total // threads),), threads) as ((block,), thread):
            index = block * threads + thread
            with tir.when(index < total if total % threads else True):
                plane, y, group, part = tir.unravel(index, *plan.extents)
                columns = self._columns(plane, y, group * plan.outputs, part)
                for q in range(plan.outputs):
                    z = group * plan.outputs + q
                    with tir.when(z < plan.window.size[1] if plan.window.size[1] % plan.outputs else True):
                        self._output(columns, q, (plane, y, z, part))

    def _columns(self, plane: Any, y: Any, z: Any, part: Any) -> Any:
        """Registers with every input column reduced over the rows of the window."""
        plan, (rows, _) = self.plan, self.plan.window.kernel
        size = plan.registers
        dtype = "uint32" if plan.is_packed else "float32"
        columns = tir.registers(len(plan.columns) * size, dtype)
        low = tirx.min_value(dtype) if self.pooling.is_maximum else tirx.const(0, dtype)
        for i in range(len(plan.columns) * size):
            tir.store(columns, i, low)
        frame = T.unroll(0, rows) if rows * len(plan.columns) <= WRITTEN_OUT else T.serial(0, rows)
        with frame as row:
            for j, column in enumerate(plan.columns):
                for i, value in enumerate(self._loaded(plane, y, z, part, row, column)):
                    at = j * size + i
                    tir.store(columns, at, self._combined(columns[at], value))
        return columns

    def _loaded(self, plane: Any, y: Any, z: Any, part: Any, row: Any, column: int) -> list[Any]:
        """The channels of one pixel, or what padding counts as."""
        plan, window = self.plan, self.plan.window
        height, width = plan.data.shape[2:]
        at_y = y * window.strides[0] + row * window.dilation[0] - window.padding[0]
        at_z = z * window.strides[1] + column - window.padding[1]
        last = -(-window.size[1] // plan.outputs) * plan.outputs - plan.outputs
        wide = last * window.strides[1] + plan.columns[-1] + 1
        conditions = inside(window, (height, width), (at_y, at_z), (window.reach[0], wide))
        words = plan.lanes // 4 if plan.is_packed else plan.lanes
        loaded = tir.registers(words, "uint32" if plan.is_packed else "float32")
        if conditions:
            for i in range(words):
                tir.store(loaded, i, self._fill())
        at = ((plane * height + at_y) * width + at_z) * plan.data.block + part * plan.lanes
        with tir.when(tirx.all(*conditions) if conditions else True):
            tir.call(intrinsics.copy(words * 4), tir.pointer(loaded), tir.pointer(self.x, at))
        if not plan.is_packed:
            return [loaded[i] for i in range(words)]
        pairs = []
        for i in range(words):
            word = loaded[i] ^ tirx.const(FLIP, "uint32") if self.is_signed else loaded[i]
            pairs += [self._pair(word), self._pair(word >> tirx.const(8, "uint32"))]
        return pairs

    def _pair(self, word: Any) -> Any:
        return word & tirx.const(0x00FF00FF, "uint32")

    def _fill(self) -> Any:
        fill = self.pooling.fill(*self.extra)
        if not self.plan.is_packed:
            return fill
        return T.cast(T.cast(fill, "int32") & 255, "uint32") * tirx.const(0x01010101, "uint32")

    def _combined(self, a: Any, b: Any) -> Any:
        if not self.pooling.is_maximum:
            return a + b
        return tir.call(MAXIMUM, a, b, returns="uint32") if self.plan.is_packed else T.max(a, b)

    def _output(self, columns: Any, q: int, place: tuple[Any, Any, Any, Any]) -> None:
        """Reduce the columns of one window and store its output."""
        plan, window = self.plan, self.plan.window
        plane, y, z, part = place
        size = plan.registers
        totals = tir.registers(size, "uint32" if plan.is_packed else "float32")
        for i in range(size):
            value = None
            for s in range(window.kernel[1]):
                column = columns[plan.columns.index(q * window.strides[1] + s * window.dilation[1]) * size + i]
                value = column if value is None else self._combined(value, column)
            tir.store(totals, i, value)
        results = self._results(totals, y, z)
        at = ((plane * window.size[0] + y) * window.size[1] + z) * plan.out.block + part * plan.lanes
        step = min(plan.lanes, VECTOR_BYTES // np.dtype(plan.out.dtype).itemsize)
        size = step * np.dtype(plan.out.dtype).itemsize
        for first in range(0, plan.lanes, step):
            tir.call(intrinsics.copy(size), tir.pointer(self.target, at + first), tir.pointer(results, first))

    def _results(self, totals: Any, y: Any, z: Any) -> Any:
        """Registers with the outputs, or with words of four of them."""
        plan, taps = self.plan, prod(self.plan.window.kernel)
        if self.pooling.finish is None:
            if not plan.is_packed:
                return totals
            words = tir.registers(plan.lanes // 4, "uint32")
            for i in range(plan.lanes // 4):
                word = totals[2 * i] | (totals[2 * i + 1] << tirx.const(8, "uint32"))
                tir.store(words, i, word ^ tirx.const(FLIP, "uint32") if self.is_signed else word)
            return words
        results = tir.registers(plan.lanes, plan.out.dtype)
        for lane in range(plan.lanes):
            total = totals[lane]
            if plan.is_packed:
                pair = totals[lane // 4 * 2 + lane % 2]
                half = pair >> tirx.const(16, "uint32") if lane % 4 > 1 else pair & tirx.const(0xFFFF, "uint32")
                total = T.cast(half, "int32") - (128 * taps if self.is_signed else 0)
            tir.store(results, lane, self.pooling.finish(total, y, z, *self.extra))
        return results


def _element_pool(
    name: str, data: TensorSpec, constants: tuple[Array, ...], out: TensorSpec, window: Window, pooling: Pooling
) -> Kernel:
    """Any layout and any window, one output per thread."""
    from tvm import te

    combine: Callable[..., Any] = te.max if pooling.is_maximum else te.sum

    def define(x: View, *extra: Any) -> Any:
        rows, columns = axes(window)
        fill = pooling.fill(*extra).astype(pooling.dtype)

        def term(*index: Any) -> Any:
            pixel = tap(x, window, index, rows, columns, fill, lambda value: value.astype(pooling.dtype))
            return combine(pixel, axis=[rows, columns])

        def finish(total: Any, n: Any, c: Any, y: Any, z: Any) -> Any:
            return total if pooling.finish is None else pooling.finish(total, y, z, *extra)

        return reduction(out, pooling.dtype, term, finish)

    return element_kernel(name, (data,), constants, out, define, window, is_reduction=True)
