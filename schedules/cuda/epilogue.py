"""From int32 sums to the output of a weighted layer: bias, float32 scale, residual, clamp, rounding (`quant._finish`)
and a table (`quant._looked_up`), eight neighbouring channels at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.geometry import TABLE
from lpsn_tvm.schedules.cuda.isa import CudaIsa
from lpsn_tvm.schedules.cuda.plain_output import PlainOutput, PlainStores
from lpsn_tvm.schedules.cuda.tir import call, pointer, registers, store, when
from lpsn_tvm.schedules.kernel import Array, TensorSpec
from lpsn_tvm.schedules.lookup import byte_table

CHANNELS = 8
"""Channels that a thread finishes at once: 8 bytes of output."""


@dataclass
class Epilogue:
    """Buffers of an epilogue.

    Parameters
    ----------
    bias, scale, floats, integers, out : Buffer
        As `weights.per_channel` and `weights.parameters` make them.
    residual : Buffer or None
        In the layout of the output.
    out_dtype : str
        "uint8", "int8" or "float32".
    is_scaled : bool
        The sums are 16 times too large (4-bit weights that were unpacked).
    is_shifted : bool
        The sums are those of 4-bit weights, which have a power of two left out.
    clamps_residual : bool
        Whether residuals may reach 2**20 in units of the output (see `is_small_residual`).
    saturation : str
        "" where outputs are clamped; what `saturation_of` says otherwise.
    table, table_at : Buffer or None, int
        What stands for the integers, as `tables` makes it, and where it begins in the buffer.
    plain : PlainOutput or None
        Where float32 outputs go that are not written in blocks.
    """

    bias: Any
    scale: Any
    floats: Any
    integers: Any
    residual: Any
    out: Any
    out_dtype: str
    is_scaled: bool
    is_shifted: bool = False
    clamps_residual: bool = True
    saturation: str = ""
    table: Any = None
    table_at: int = 0
    plain: PlainOutput | None = None

    def with_shared_table(self, memory: Any, at: int, thread: Any, *, is_asynchronous: bool = False) -> Epilogue:
        """Begin to copy the table to the block's shared memory, and read it there: behind a barrier, and if
        asynchronous behind a wait for the group of copies that is open now.
        """
        if self.table is None:
            return self
        with when(thread < TABLE // 16):
            to, source = pointer(memory, at + thread * 16), pointer(self.table, thread * 16)
            if is_asynchronous:
                call(intrinsics.copy_async(16), to, source, source, T.bool(True))
            else:
                call(intrinsics.copy(16), to, source)
        return replace(self, table=memory, table_at=at)

    def load(self, channel: Any, pixels: int = 1) -> None:
        """Read bias and scale of `CHANNELS` channels into registers, and the numbers of the layer: what follows a
        condition would read them again and again. Residuals of `pixels` pixels can be fetched ahead.
        """
        self.float_values, self.integer_values = registers(4, "float32"), registers(4)
        call(intrinsics.copy(16), pointer(self.float_values), pointer(self.floats))
        call(intrinsics.copy(16), pointer(self.integer_values), pointer(self.integers))
        self.bias_values = registers(CHANNELS)
        self.scale_values = registers(CHANNELS, "float32")
        self.results = registers(CHANNELS, "float32" if self.out_dtype == "float32" else "int32")
        if self.plain is not None:
            self.stores = PlainStores.begin(self.plain, channel, CHANNELS)
        if self.residual is not None:
            self.fetched, self.others = registers(2 * pixels), registers(CHANNELS, "float32")
        for i in range(0, CHANNELS, 4):
            call(intrinsics.copy(16), pointer(self.bias_values, i), pointer(self.bias, channel + i))
            call(intrinsics.copy(16), pointer(self.scale_values, i), pointer(self.scale, channel + i))

    def fetch(self, at: Any, pixel: int) -> None:
        """Begin to read the residual of one pixel."""
        if self.residual is not None:
            call(intrinsics.copy(8), pointer(self.fetched, 2 * pixel), pointer(self.residual, at))

    def finish(self, sums: list[Any], at: Any, *, has_bias: bool = False, fetched: int | None = None) -> None:
        """Write the outputs of eight sums to `out[at ...]`; `has_bias` says that the sums began with `bias_values`,
        `fetched` as which pixel the residual was fetched ahead.
        """
        values = []
        for i, total in enumerate(sums):
            if self.is_scaled:
                total = T.shift_left(T.shift_right(total, 4), self.integer_values[2])
            elif self.is_shifted:
                total = T.shift_left(total, self.integer_values[2])
            if not has_bias:
                total = total + self.bias_values[i]
            values.append(call(intrinsics.SCALED, total, self.scale_values[i], returns="float32"))
        if self.out_dtype == "float32":
            for i, value in enumerate(values):
                store(self.results, i, value)
            if self.plain is not None:
                self.stores.store(self.out, self.results, at)
                return
            for i in range(0, CHANNELS, 4):
                call(intrinsics.copy(16), pointer(self.out, at + i), pointer(self.results, i))
            return
        if self.residual is not None:
            if fetched is None:
                self.fetch(at, 0)
            words, zero_point = pointer(self.fetched, 2 * (fetched or 0)), self.integer_values[1]
            call(intrinsics.residual(self.residual.dtype == "int8"), pointer(self.others), words, zero_point)
            add = intrinsics.with_residual(self.clamps_residual)
            values = [
                call(add, value, self.others[i], self.float_values[2], returns="float32")
                for i, value in enumerate(values)
            ]
        if self.saturation:
            has_zero_point = self.saturation == "full"
            convert = intrinsics.TO_BITS if has_zero_point else intrinsics.TO_INTEGER
            for i, value in enumerate(values):
                store(self.results, i, call(convert, value, returns="int32"))
            saturated = intrinsics.store_saturated(self.out_dtype == "int8", has_zero_point)
            call(saturated, pointer(self.out, at), pointer(self.results), self.integer_values[0])
            return
        for i, value in enumerate(values):
            result = call(intrinsics.ROUNDED, value, self.float_values[0], self.float_values[1], returns="int32")
            store(self.results, i, result)
        if self.table is not None:
            table = pointer(self.table, self.table_at)
            call(intrinsics.STORE_LOOKED_UP, pointer(self.out, at), pointer(self.results), table)
            return
        store_bytes = intrinsics.store_bytes(self.out_dtype == "int8")
        call(store_bytes, pointer(self.out, at), pointer(self.results), self.integer_values[0])


def has_table(attrs: Mapping[str, Any]) -> bool:
    """Whether a weighted layer ends in a table."""
    return attrs.get("table") is not None


def tables(attrs: Mapping[str, Any]) -> tuple[Array, ...]:
    """The table of a layer, if it has one: uint8[256], the output's bytes by the low byte of `q - out_zero_point`,
    which is what `ROUNDED` leaves.
    """
    return tuple(
        np.ascontiguousarray(np.roll(table, -int(attrs.get("out_zero_point", 0))).view(np.uint8))
        for table in stored_tables(attrs)
    )


def stored_tables(attrs: Mapping[str, Any]) -> tuple[Array, ...]:
    """The table of a layer, if it has one: uint8 or int8[256], the output by the byte of q."""
    if not has_table(attrs):
        return ()
    qmin = int(attrs.get("qmin", 0))
    given = np.asarray(attrs["table"], str(attrs.get("out_dtype", "uint8")))
    made = byte_table(TensorSpec((1,), "int8" if qmin < 0 else "uint8"), {"table": given}, {"qmin": qmin})
    assert made is not None
    return (made,)


def is_small_residual(attrs: Mapping[str, Any]) -> bool:
    """Whether no residual byte, less its zero point and times its multiplier, comes near 2**20."""
    return abs(float(attrs.get("residual_multiplier", 0.0))) * 512 < 2**19


def saturation_of(constants: Mapping[str, Array], attrs: Mapping[str, Any], out_dtype: str, isa: CudaIsa) -> str:
    """How outputs may be made bytes: "full" where the clamp is the range of the type, so that packing with saturation
    is all that it takes, "zero" where the zero point is 0 besides, "" where outputs must be clamped (or where packing
    does not saturate, before sm_72; or where a sum could reach 2**21 in units of the output; or where a table is read
    with what is clamped).

    `constants` hold the weight as [O, ...], bias and scale.
    """
    if out_dtype == "float32" or isa.number < 72 or has_table(attrs):
        return ""
    info = np.iinfo(out_dtype)
    if (attrs.get("qmin", 0), attrs.get("qmax", 255)) != (info.min, info.max):
        return ""
    weight = np.abs(constants["weight"].astype(np.int64))
    sums = weight.reshape(len(weight), -1).sum(axis=1) * 255 + np.abs(constants["bias"].astype(np.int64)).reshape(-1)
    if float((sums * np.abs(np.asarray(constants["scale"], np.float64).reshape(-1))).max(initial=0)) >= 2**21:
        return ""
    return "zero" if int(attrs.get("out_zero_point", 0)) == 0 else "full"
