"""Table lookups: any function of one quantized tensor. Tables are widened to 256 entries, so that every byte is a
valid index.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import View, compute, elementwise_kernel


def lookup(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `lpsn.lookup`: `table[q - qmin]`."""
    data, table = inputs[0], constants.get("table")
    if table is None or data.dtype not in ("uint8", "int8"):
        return None
    out = TensorSpec(data.shape, str(table.dtype), data.block)

    def define(q: View, t: Any) -> Any:
        return compute(out, lambda *i: t[_byte(q(*i))])

    return elementwise_kernel(
        "lookup", (data,), (widened(table, data.dtype, int(attrs["qmin"])),), out, define, vectorized=False
    )


def channel_lookup(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `lpsn.channel_lookup`: one table per channel."""
    data, table = inputs[0], constants.get("table")
    if table is None or data.dtype not in ("uint8", "int8"):
        return None
    out = TensorSpec(data.shape, str(table.dtype), data.block)
    channels = data.blocks * data.block if data.block else data.shape[1]
    wide = np.zeros((channels, 256), table.dtype)
    wide[: table.shape[0]] = widened(table, data.dtype, int(attrs["qmin"]))

    def define(q: View, t: Any) -> Any:
        return compute(out, lambda n, c, *rest: t[c, _byte(q(n, c, *rest))])

    return elementwise_kernel("channel_lookup", (data,), (wide,), out, define, vectorized=False)


def widened(table: Array, dtype: str, qmin: int) -> Array:
    """[..., 2**bits] -> [..., 256], indexed by the byte of the stored integer (two's complement)."""
    entries = table.shape[-1]
    index = np.clip(np.arange(256, dtype=np.uint8).view(dtype).astype(np.int32) - qmin, 0, entries - 1)
    return np.ascontiguousarray(table[..., index])


def _byte(q: Any) -> Any:
    return q.astype("int32") & 255
