"""From int32 sums to the output of a weighted layer: bias, float32 scale, residual, clamp, rounding (`quant._finish`),
eight neighbouring channels at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.tir import call, pointer, registers, store

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

    def load(self, channel: Any) -> None:
        """Read bias and scale of `CHANNELS` channels into registers, and the numbers of the layer: what follows a
        condition would read them again and again.
        """
        self.float_values, self.integer_values = registers(4, "float32"), registers(4)
        call(intrinsics.copy(16), pointer(self.float_values), pointer(self.floats))
        call(intrinsics.copy(16), pointer(self.integer_values), pointer(self.integers))
        self.bias_values = registers(CHANNELS)
        self.scale_values = registers(CHANNELS, "float32")
        self.results = registers(CHANNELS, "float32" if self.out_dtype == "float32" else "int32")
        if self.residual is not None:
            self.others = registers(CHANNELS, self.residual.dtype)
        for i in range(0, CHANNELS, 4):
            call(intrinsics.copy(16), pointer(self.bias_values, i), pointer(self.bias, channel + i))
            call(intrinsics.copy(16), pointer(self.scale_values, i), pointer(self.scale, channel + i))

    def finish(self, sums: list[Any], at: Any, *, has_bias: bool = False) -> None:
        """Write the outputs of eight sums to `out[at ...]`; `has_bias` says that the sums began with `bias_values`."""
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
            for i in range(0, CHANNELS, 4):
                call(intrinsics.copy(16), pointer(self.out, at + i), pointer(self.results, i))
            return
        if self.residual is not None:
            call(intrinsics.copy(8), pointer(self.others), pointer(self.residual, at))
            values = [
                call(
                    intrinsics.WITH_RESIDUAL,
                    value,
                    T.cast(self.others[i], "int32"),
                    self.integer_values[1],
                    self.float_values[2],
                    returns="float32",
                )
                for i, value in enumerate(values)
            ]
        for i, value in enumerate(values):
            result = call(intrinsics.ROUNDED, value, self.float_values[0], self.float_values[1], returns="int32")
            store(self.results, i, result)
        store_bytes = intrinsics.store_bytes(self.out_dtype == "int8")
        call(store_bytes, pointer(self.out, at), pointer(self.results), self.integer_values[0])
